"""Activation checkpointing saves activations, and changes no number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.callbacks.invariants import Invariants
from rlhf.modules import DPOModule, Optimization, PPOModule, PPOSettings, RewardModule, SFTModule

Make = Callable[..., Any]
STAGES = {"sft": SFTModule, "reward": RewardModule, "dpo": DPOModule, "ppo": PPOModule}


def weights(module: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("stage", STAGES)
def test_it_keeps_less_and_changes_no_number(
    stage: str, request: pytest.FixtureRequest, trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.models.backbone.last_mlp", lambda _: None)  # off with checkpointing
    path = request.getfixturevalue("model_path")
    data: Make = request.getfixturevalue({"sft": "sft_data", "ppo": "rollout_data"}.get(stage, "preference_data"))
    arguments: dict[str, Any] = {"optimization": Optimization(1e-2)}
    if stage == "ppo":
        settings = PPOSettings(response_length=6, ppo_epochs=2)
        arguments |= {"reward_path": request.getfixturevalue("reward_path"), "ppo": settings}
    results, kept = [], []
    for on in (False, True):
        module = STAGES[stage](path, activation_checkpointing=on, **arguments)
        watch = Invariants(demonstration_reward="off")
        saved: list[int] = []

        def pack(tensor: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer(limit_val_batches=1, callbacks=[watch]).fit(module, data())
        assert [f for f in watch.findings.values() if not f.holds] == []
        results.append(weights(module))
        kept.append(sum(saved))
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=0)
    assert kept[1] < 0.6 * kept[0]
