"""The curves of a rollout whose numbers are known, with garbage at padding; and the point before all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.callbacks.ppo_curves import PPOCurves
from rlhf.modules.ppo import PPOModule
from rlhf.modules.settings import PPOSettings
from rlhf.ops.kl_control import KLControl
from rlhf.report.curve_files import read_curves
from rlhf.sampling.rollout import Rollout, response_masks

Make = Callable[..., Any]
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
    module = SimpleNamespace(kl_control=KLControl(0.1, None, 100), reduce_sum=reduce_sum, ppo=PPOSettings())
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


def test_a_whole_validation_before_the_first_update_is_the_point_at_0(
    model_path: str, reward_path: str, trainer: Make, rollout_data: Make, tmp_path: Path
) -> None:
    """It is what `validate` says of the untrained policy, and changes nothing in training."""

    def module() -> PPOModule:
        return PPOModule(model_path, reward_path, ppo=PPOSettings(response_length=4))

    found = {}
    for steps in (-1, 1, 0):
        folder = tmp_path / str(steps)
        trainer(default_root_dir=folder, num_sanity_val_steps=steps).fit(module(), rollout_data(eval_batch_size=4))
        found[steps] = read_curves(tmp_path / str(steps))
    [expected] = trainer().validate(module(), rollout_data(eval_batch_size=4), verbose=False)
    for name in ("validation/score", "validation/length", "validation/eos"):
        assert found[-1][name].loc[0] == pytest.approx(expected[name])
        assert found[-1][name].loc[8] == found[0][name].loc[8]
        assert found[1][name].index.tolist() == found[0][name].index.tolist() == [8]
    assert found[-1]["loss/policy_avg"].tolist() == found[0]["loss/policy_avg"].tolist()
