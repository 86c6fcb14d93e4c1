"""The largest micro-batches that fit, by the estimate of memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig

from rlhf.data import token_budget
from rlhf.data.texts import TextFormat
from rlhf.data.token_budget import ROOM, auto_tokens
from rlhf.errors import UserError
from rlhf.hardware import device_memory
from rlhf.models.memory import estimate
from rlhf.modules import SFTModule

LONGEST, SHARE = 100, 32
Make = Callable[..., Any]
# A large vocabulary, so that the gradient of the output layer decides at first, and activations later.
CONFIG = GPTNeoXConfig(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, vocab_size=40_000
)  # fmt: skip


def run(kind: str, checkpointing: bool = False, reduce_max: Any = lambda x: x) -> tuple[Any, Any, Any]:
    """Trainer, module and data of two processes, as far as they are looked at."""
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("cpu")), num_devices=2, world_size=2, precision="32-true"
    )
    ppo = SimpleNamespace(has_critic=True, vllm_cache_gib=0.5)
    module = SimpleNamespace(
        kind=kind, model_config=CONFIG, reduce_max=reduce_max, activation_checkpointing=checkpointing, lora=None,
        quantization=None, response_room=16, placements=("device", "cpu"), reward_path="reward", ppo=ppo,
        sampler="builtin",
    )  # fmt: skip
    data = SimpleNamespace(
        longest=lambda: LONGEST, tokens=None, micro_batch_size=1, eval_batch_size=1, rollout_batch_size=1,
        sequences=2 if kind == "reward" else 1,
        batch_size=2 * SHARE * (4 if kind == "ppo" else 1), minibatches=4 if kind == "ppo" else 1, text=TextFormat(),
    )  # fmt: skip
    return trainer, module, data


def needed(kind: str, rows: int, checkpointing: bool) -> int:
    how = replace(token_budget.workload(*run(kind, checkpointing)), micro_batch=rows)
    return estimate(CONFIG, how)["training"].total


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how much of it may be used."""

    def memory(usable: float) -> None:
        monkeypatch.setattr(token_budget, "device_memory", lambda device, processes: usable / ROOM)

    return memory


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["sft", "reward", "ppo"])
def test_the_largest_micro_batch_that_fits_is_found(
    memory: Callable[[float], None], kind: str, checkpointing: bool
) -> None:
    """One row more would not fit."""
    sides = 2 if kind == "reward" else 1
    for rows in (1, 2, 5, SHARE - 1):
        low, high = (needed(kind, r, checkpointing) for r in (rows, rows + 1))
        assert low <= high
        if low + 4096 < high:  # the memory is a float32
            memory((low + high) / 2)
            assert auto_tokens(*run(kind, checkpointing)) == rows * sides * LONGEST


@pytest.mark.parametrize("kind", ["sft", "reward", "ppo"])
def test_there_is_no_more_to_take_than_the_rows_of_a_step(memory: Callable[[float], None], kind: str) -> None:
    memory(1e15)
    assert auto_tokens(*run(kind)) == SHARE * (2 if kind == "reward" else 1) * LONGEST


def test_the_process_with_the_least_memory_decides(memory: Callable[[float], None]) -> None:
    """As the others would wait for micro-batches that it does not have."""
    usable = (needed("sft", 3, False) + needed("sft", 4, False)) / 2

    def with_another(x: Tensor) -> Tensor:
        return torch.maximum(x, torch.tensor(-usable))

    memory(1e15)
    assert auto_tokens(*run("sft", reduce_max=with_another)) == 3 * LONGEST


@pytest.mark.parametrize("kind", ["sft", "reward", "ppo"])
def test_too_little_memory_for_one_example_is_an_error(memory: Callable[[float], None], kind: str) -> None:
    memory(needed(kind, 1, False) * 0.9)
    with pytest.raises(UserError, match=r"max_tokens_per_micro_batch auto: .* GiB are needed for the longest example"):
        auto_tokens(*run(kind))


def test_memory_of_the_machine_is_shared_by_its_processes() -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert device_memory(torch.device("cpu"), 1) == whole
    assert device_memory(torch.device("cpu"), 4) == whole // 4


@pytest.mark.parametrize(("device", "sleeps"), [("cpu", False), ("cuda", True)])
def test_the_engine_of_another_program_is_counted(device: str, sleeps: bool) -> None:
    trainer, module, data = run("ppo")
    assert token_budget.workload(trainer, module, data).engine_cache_gib == 0
    trainer.strategy.root_device, module.sampler = torch.device(device), "vllm"
    found = token_budget.workload(trainer, module, data)
    assert (found.engine_cache_gib, found.engine_sleeps) == (0.5, sleeps)


def test_memory_of_a_gpu_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert device_memory(torch.device("cuda", 1), 8) == 80 * 2**30


def test_a_budget_is_estimated_as_so_many_of_the_longest_rows() -> None:
    for kind, expected in (("sft", 7), ("reward", 3), ("ppo", 7)):
        trainer, module, data = run(kind)
        data.tokens = 7 * LONGEST + 50
        assert token_budget.workload(trainer, module, data).micro_batch == expected
        data.tokens = None
        assert token_budget.workload(trainer, module, data).micro_batch == 1


@pytest.mark.parametrize(("rollout", "evaluation"), [(3, 7), (7, 3), (0, 7)])
def test_the_larger_batch_of_rollout_and_evaluation_counts(rollout: int, evaluation: int) -> None:
    trainer, module, data = run("ppo")
    data.rollout_batch_size, data.eval_batch_size = rollout, evaluation
    assert token_budget.workload(trainer, module, data).inference_batch == 7


def test_a_run_takes_what_fits(model_path: str, trainer: Make, sft_data: Make, memory: Callable[[float], None]) -> None:
    """All examples of a step at once where there is room; the same weights where there is not."""
    weights, parts = [], []
    for usable in (1e12, 4e6):
        memory(usable)
        module, data, t = SFTModule(model_path), sft_data(max_tokens_per_micro_batch="auto"), trainer()
        t.fit(module, data)
        parts.append(t.accumulate_grad_batches)
        assert data.tokens % data.longest() == 0
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert parts[0] == 1 < parts[1]
    torch.testing.assert_close(*weights, atol=1e-6, rtol=0)
