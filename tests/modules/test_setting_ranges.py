"""Settings out of range are refused by name, in Python as on the command line."""

from __future__ import annotations

import importlib
import math
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import pytest
from pydantic import TypeAdapter, ValidationError

import rlhf
from rlhf.callbacks.last_checkpoint import LastCheckpoint
from rlhf.callbacks.progress_bar import StageProgress
from rlhf.cli.main import VERBS
from rlhf.evaluation.judges import LocalJudge, OpenAIJudge, RewardJudge
from rlhf.modules import Optimization, PPOSettings
from rlhf.report.runs import Baseline, Run
from rlhf.synthetic.synthesize import Sizes, SmallModel


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        (Optimization, "learning_rate", 0),
        (Optimization, "learning_rate", float("nan")),
        (Optimization, "weight_decay", -0.1),
        (Optimization, "warmup_steps", -1),
        (PPOSettings, "temperature", 0),
        (PPOSettings, "temperature", float("inf")),
        (PPOSettings, "missing_eos_score", float("nan")),
        (PPOSettings, "entropy_coefficient", float("inf")),
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


SETTABLE = [
    *(getattr(importlib.import_module(module), verb) for verb, (module, _) in VERBS.items()),
    *(kind for name in rlhf.__all__ if isinstance(kind := getattr(rlhf, name), type)),
    *(Sizes, SmallModel, Run, Baseline, OpenAIJudge, LocalJudge, RewardJudge, StageProgress, LastCheckpoint),
]


@pytest.mark.parametrize("settable", SETTABLE, ids=lambda settable: settable.__name__)
def test_no_number_may_be_nan_or_infinite(settable: Any) -> None:
    plain = not isinstance(settable, type) or is_dataclass(settable)
    hints = get_type_hints(settable if plain else settable.__init__, include_extras=True)
    for name, hint in hints.items():
        if "float" in str(hint) and name != "return":
            for value in (math.nan, math.inf, -math.inf):
                with pytest.raises(ValidationError):
                    TypeAdapter(hint).validate_python(value)
