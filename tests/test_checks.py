from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.checks import above, at_least
from rlhf.data.texts import TextFormat
from rlhf.errors import UserError, find_user_error
from rlhf.modules import Optimization, PPOSettings


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: at_least("a.b", 0, 1), "a.b is 0"),
        (lambda: above("a.b", 0, 0), "a.b is 0"),
        (lambda: Optimization(learning_rate=0), "learning_rate"),
        (lambda: PPOSettings(temperature=0), "model.ppo.temperature"),
        (lambda: PPOSettings(evaluation_temperature=0), "model.ppo.evaluation_temperature"),
        (lambda: PPOSettings(response_length=0), "model.ppo.response_length"),
        (lambda: PPOSettings(ppo_epochs=0), "model.ppo.ppo_epochs"),
        (lambda: PPOSettings(kl_target=0), "model.ppo.kl_target"),
        (lambda: PPOSettings(lam=1.1), "model.ppo.lam is 1.1"),
        (lambda: PPOSettings(gamma=-0.1), "model.ppo.gamma is -0.1"),
        (lambda: PPOSettings(kl_coefficient=-1), "model.ppo.kl_coefficient"),
        (lambda: Optimization(weight_decay=-0.1), "model.optimization.weight_decay"),
        (lambda: TextFormat(max_response_length=0), "data.text.max_response_length"),
        (lambda: TextFormat(query="POST: {post"), "data.text.query"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(make: Callable[[], Any], setting: str) -> None:
    with pytest.raises(UserError, match=setting):
        make()


def test_a_user_error_is_found_in_what_a_library_made_of_it() -> None:
    cause = UserError("the path is wrong")
    noise = ValueError("Does not validate")
    noise.__cause__ = cause
    assert find_user_error(noise) is cause
    assert find_user_error(KeyError("x")) is None


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    from rlhf import files

    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run_dir"):
        files.claim(str(tmp_path / "file" / "run"), resuming=False)
