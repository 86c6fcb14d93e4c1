"""Settings out of range are refused by name, in Python as on the command line."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rlhf.modules import Optimization, PPOSettings


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        (Optimization, "learning_rate", 0),
        (Optimization, "learning_rate", float("nan")),
        (Optimization, "weight_decay", -0.1),
        (Optimization, "warmup_steps", -1),
        (PPOSettings, "temperature", 0),
        (PPOSettings, "temperature", float("inf")),
        (PPOSettings, "evaluation_temperature", 0),
        (PPOSettings, "response_length", 0),
        (PPOSettings, "ppo_epochs", 0),
        (PPOSettings, "minibatches", 0),
        (PPOSettings, "kl_target", 0),
        (PPOSettings, "kl_horizon", 0),
        (PPOSettings, "lam", 1.1),
        (PPOSettings, "gamma", -0.1),
        (PPOSettings, "kl_coefficient", -1),
        (PPOSettings, "value_clip", 0),
        (PPOSettings, "critic_warmup", -1),
        (PPOSettings, "kl_estimator", "k4"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(group: Any, name: str, value: Any) -> None:
    with pytest.raises(ValidationError) as refused:
        group(**{name: value})
    (error,) = refused.value.errors()
    assert refused.value.title == {Optimization: "model.optimization", PPOSettings: "model.ppo"}[group]
    assert error["loc"][0] == name
