"""Types of models, one of each kind, through the three stages against plain transformers: benchmarks/type_checks.py."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.modules import ppo
from rlhf.sampling import sampler
from rlhf.sampling.token_readers import KeyValueReader

ROOT = Path(__file__).parent.parent.parent
KINDS = [
    ("llama", "transformers", "cache"),
    ("gpt2", "transformers", "cache"),  # learned positions
    ("cohere", "ours", "cache"),  # no class for classification, scaled logits
    ("gemma3_text", "transformers", "cache"),  # sliding windows
    ("llama4_text", "ours", "cache"),  # its `base_model` is the model itself
    ("phimoe", "transformers", "cache"),  # experts that are chosen at random in training mode
    ("qwen3_next", "transformers", "cache"),  # layers with states and layers with keys and values
    ("mamba", "ours", "own state"),
    ("openai-gpt", "transformers", "no cache"),
]


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def part(name: str) -> Any:
    return importlib.import_module(name)


@pytest.mark.cpu_only("benchmarks/type_checks.py trains on the CPU")
@pytest.mark.parametrize(("model_type", "head", "sampling"), KINDS)
def test_a_type_of_each_kind_passes_all_stages(model_type: str, head: str, sampling: str, tmp_path: Path) -> None:
    result = part("type_checks").check_type(model_type, tmp_path)
    assert {name: stage.status for name, stage in result.stages.items()} == {
        "SFT": "passes", "reward model": "passes", "PPO": "passes"
    }, result  # fmt: skip
    assert (result.head, result.sampling) == (head, sampling)


@pytest.mark.cpu_only("benchmarks/type_checks.py trains on the CPU")
def test_a_wrong_cache_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "reader_for", lambda _: KeyValueReader)
    worst = part("type_checks").check_type("mamba", tmp_path).worst
    assert (worst.status, worst.detail) == ("wrong", "samples")
    assert worst.difference > 0.01


@pytest.mark.cpu_only("benchmarks/type_checks.py trains on the CPU")
def test_a_wrong_temperature_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ppo.response_logprobs
    monkeypatch.setattr(ppo, "response_logprobs", lambda *inputs: original(*inputs[:-1], temperature=1.0))
    worst = part("type_checks").check_type("gpt2", tmp_path).worst
    assert (worst.status, worst.detail) == ("wrong", "log-probabilities of the reference")


@pytest.mark.cpu_only("benchmarks/type_checks.py trains on the CPU")
@pytest.mark.parametrize("model_type", ["cpmant", "xlnet"])
def test_a_type_that_sees_later_tokens_is_refused(model_type: str, tmp_path: Path) -> None:
    result = part("type_checks").check_type(model_type, tmp_path)
    assert result.worst.status == "refused", result
    assert list(result.stages) == ["SFT"]
    assert "is no causal language model" in result.worst.detail


@pytest.mark.cpu_only("benchmarks/type_checks.py trains on the CPU")
def test_a_type_without_hidden_states_to_score_is_refused_for_rewards_in_one_sentence(tmp_path: Path) -> None:
    stages = part("type_checks").check_type("blt", tmp_path).stages
    assert {name: stage.status for name, stage in stages.items()} == {"SFT": "passes", "reward model": "refused"}
    assert "of type blt cannot become a reward model or PPO's critic" in stages["reward model"].detail


def test_the_types_read_text_and_are_no_encoders() -> None:
    types = part("model_types").model_types()
    assert {"llama", "gpt2", "mamba", "gemma3_text", "dbrx", "mpt"} <= set(types)
    assert not {"bert", "bart", "t5", "whisper", "gemma3", "llama4", "gpt-sw3", "musicgen"} & set(types)


def test_a_tiny_model_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    first, again, other = (part("model_types").tiny_model("llama", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [model.lm_head.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
