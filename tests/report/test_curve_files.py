from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from rlhf.callbacks.curves import CurveLogger
from rlhf.errors import UserError
from rlhf.report.curve_files import curve_rows, last_quarter, read_curves
from rlhf.report.runs import Run


def test_a_resumed_run_is_one_curve(tmp_path: Path) -> None:
    for steps, value in (((1, 2, 3), 1.0), ((3, 4), 2.0)):
        logger = CurveLogger(tmp_path)
        for step in steps:
            logger.log_metrics({"score": value}, step)
    curve = read_curves(tmp_path)["score"]
    assert curve.to_dict() == {1: 1.0, 2: 1.0, 3: 2.0, 4: 2.0}


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a finished run"):
        read_curves(tmp_path)


def test_curves_of_several_runs(tmp_path: Path) -> None:
    for name, value in (("one", 1.0), ("two", 2.0)):
        logger = CurveLogger(tmp_path / name)
        for step in range(1, 9):
            logger.log_metrics({"kl": value * step, "other": 0.0}, 10 * step)
    runs = [
        Run("1b", None, seed, {"PPO": "x"}, stages={"ppo": str(tmp_path / name)})
        for seed, name in ((1, "one"), (2, "two"))
    ]
    rows = curve_rows(runs, ["kl", "none"])
    assert len(rows) == 16
    assert rows[rows["seed"] == 2]["value"].tolist() == [2.0 * step for step in range(1, 9)]
    assert list(curve_rows([], ["kl"])) == list(rows) == ["size", "seed", "stage", "curve", "step", "value"]


def test_the_last_quarter_of_each_run() -> None:
    points = pd.DataFrame({"run": ["a"] * 8 + ["b"] * 4, "step": [*range(10, 90, 10), *range(1, 5)]})
    assert last_quarter(points, ["run"])["step"].tolist() == [70, 80, 4]
