"""A GPU without float64, that of a Mac: all stages train, validate and export on it. Here the CPU plays its part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf import hardware
from rlhf.modules import PPOModule, PPOSettings, RewardModule, SFTModule

Make = Callable[..., Any]
PPO = PPOSettings(response_length=4, ppo_epochs=1, critic_warmup=1, kl_target=1.0)


class WithoutFloat64(TorchDispatchMode):
    """Refuses every float64 tensor that an operation gives, as MPS does."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = operation(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(given)):
            raise TypeError(f"{operation}: Cannot convert a MPS Tensor to float64 dtype")
        return given


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU has no float64."""
    monkeypatch.setattr(hardware, "WITHOUT_FLOAT64", {"mps", "cpu"})
    with WithoutFloat64():
        yield


def test_only_mps_sums_in_float32() -> None:
    found = {name: hardware.accumulator_dtype(torch.device(name)) for name in ("cpu", "cuda", "mps")}
    assert found == {"cpu": torch.float64, "cuda": torch.float64, "mps": torch.float32}


def test_a_float64_would_be_noticed(without_float64: None) -> None:
    with pytest.raises(TypeError, match="float64"):
        torch.ones(2).double()
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stage_needs_no_float64(
    stage: str, model_path: str, reward_path: str, trainer: Make, sft_data: Make, preference_data: Make,
    rollout_data: Make, without_float64: None,
) -> None:  # fmt: skip
    curve, module, data = {
        "sft": ("rouge1", SFTModule(model_path, response_length=4), sft_data),
        "reward": ("accuracy", RewardModule(model_path), preference_data),
        "ppo": ("score", PPOModule(model_path, reward_path, ppo=PPO), rollout_data),
    }[stage]
    fitted = trainer(max_epochs=2 if stage == "ppo" else 1, limit_val_batches=1)
    fitted.fit(module, data())
    module.prepare_export()
    assert f"validation/{curve}" in fitted.callback_metrics
