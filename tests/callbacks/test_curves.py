"""The curves of a rollout whose numbers are known, with garbage at padding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.callbacks.curves import PPOCurves
from rlhf.ops.kl_control import FixedKL
from rlhf.rollout import Rollout, response_masks

LENGTHS = torch.tensor([1, 3])
JUNK = 99.0


def curves(reduce_sum: Any, ranks: int) -> dict[str, float]:
    mask, value_mask = response_masks(LENGTHS, 4)
    rollout = Rollout(
        responses=torch.zeros(2, 4, dtype=torch.long),
        lengths=LENGTHS,
        has_eos=torch.tensor([True, False]),
        mask=mask,
        value_mask=value_mask,
        logprobs=torch.tensor([[-1.0, JUNK, JUNK, JUNK], [-1.0, -2.0, -3.0, JUNK]]),
        kl=torch.tensor([[0.5, 0.0, 0.0, 0.0], [1.0, 2.0, -0.5, 0.0]]),
        values=torch.tensor([[1.0, 3.0, JUNK, JUNK], [2.0, 4.0, 6.0, 8.0]]),
        scores=torch.tensor([5.0, 1.0]),
    )
    module = SimpleNamespace(kl_control=FixedKL(0.1), reduce_sum=reduce_sum)
    data = SimpleNamespace(last_rollout=rollout, batch_size=2 * ranks)
    trainer = SimpleNamespace(datamodule=data, current_epoch=2, state=SimpleNamespace(fn="fit"))
    return PPOCurves().curves(trainer, module)


def alone(x: Tensor) -> Tensor:
    return x


def with_an_equal_rank(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize(("reduce_sum", "ranks"), [(alone, 1), (with_an_equal_rank, 2)])
def test_curves_are_means_over_episodes_and_over_real_tokens(reduce_sum: Any, ranks: int) -> None:
    """KL per response 0.5 and 2.5, surprise 1 and 6, scores 5 and 1; the values are 1, 3 and 2, 4, 6, 8."""
    expected = {
        "objective/kl": 1.5,
        "objective/entropy": 3.5,
        "objective/non_score_reward": -0.15,
        "objective/scores": 3.0,
        "objective/scores_std": 2.0,
        "objective/rlhf_reward": 2.85,
        "objective/value": 4.0,
        "objective/kl_coefficient": 0.1,
        "rollout/eos_share": 0.5,
        "rollout/response_length": 2.0,
        "val/num_eos_tokens": 1.0 * ranks,
        "episode": 6.0 * ranks,
    }
    found = curves(reduce_sum, ranks)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
