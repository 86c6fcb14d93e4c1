from __future__ import annotations

import pandas as pd
import pytest

from rlhf.errors import UserError
from rlhf.report.overoptimisation import course, kl_after, turning_points

KL = [0.0, 1.0, 4.0, 9.0]


def checkpoints(scores: dict[int, tuple[float, float, float]]) -> pd.DataFrame:
    """Four rows per update with this score, gold score and outcome."""
    parts = []
    for update, (score, gold, outcome) in scores.items():
        part = pd.DataFrame(
            {"outcome": [outcome] * 4, "a_score": score, "a_gold": gold, "a_first": "a", "b_first": "a"}
        )
        parts.append(part.assign(size="s", parameters=1, seed=1, update=update))
    return pd.concat(parts, ignore_index=True)


def curve(values: list[float], name: str = "objective/kl") -> pd.DataFrame:
    table = pd.DataFrame({"step": range(100, 100 * len(values) + 1, 100), "value": values})
    return table.assign(size="s", seed=1, stage="ppo", curve=name)


def test_kl_is_measured_at_the_start_of_the_next_update() -> None:
    """The first point of the curve is the KL of the policy before PPO: 0."""
    kl = pd.Series(KL)
    assert [kl_after(kl, update) for update in range(5)] == [0, 1, 4, 9, 9]
    with pytest.raises(UserError, match="checkpoint of update 5, but PPO made only 4 updates"):
        kl_after(kl, 5)


def test_the_course() -> None:
    rows = checkpoints({3: (2.0, 4.0, 0.5), 0: (0.0, 3.0, 0.25), 1: (1.0, 5.0, 1.0)})
    found = course(rows, pd.concat([curve(KL), curve([7.0] * 4, "val/ratio")]))
    assert found["update"].tolist() == [0, 1, 3]
    assert found["sqrt_kl"].tolist() == [0, 1, 3]
    assert found["score"].tolist() == [0, 1, 2]
    assert found["gold"].tolist() == [3, 5, 4]
    assert found["win_rate"].tolist() == [0.25, 1, 0.5]
    turns = turning_points(found).set_index("measure")
    assert turns["best_update"].to_dict() == {"score": 3, "gold": 1, "win_rate": 1}
    assert turns.loc["gold", ["sqrt_kl", "best", "last"]].tolist() == [1, 5, 4]


def test_an_estimate_below_0_has_no_root() -> None:
    found = course(checkpoints({1: (0.0, float("nan"), 0.5)}), curve([0.0, -0.01]))
    assert found["sqrt_kl"].tolist() == [0]
    assert set(turning_points(found)["measure"]) == {"score", "win_rate"}


def test_no_curve() -> None:
    with pytest.raises(UserError, match=r"no curve objective/kl; give its run folder as stages.ppo"):
        course(checkpoints({1: (0.0, 0.0, 0.5)}), curve(KL, "val/ratio"))
