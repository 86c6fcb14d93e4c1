"""What stands in for models that a pipeline has not trained yet."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from rlhf.models.scalar_model import ScalarModel
from rlhf.studies.trial import _stand_in


def test_rewards_of_a_stand_in_have_a_mean_of_0_and_differ(model_path: str, tmp_path: Path) -> None:
    stage: Any = SimpleNamespace(name="reward", settings={})
    model = ScalarModel.from_pretrained(_stand_in(model_path, tmp_path, stage), "model.reward_path")
    ids = torch.randint(2, 400, (64, 12))
    with torch.no_grad():
        rewards = model.score(ids, torch.ones_like(ids))
    assert rewards.mean().abs() < 1e-3  # which the invariant demonstration_reward allows
    assert len(rewards.unique()) == 64
