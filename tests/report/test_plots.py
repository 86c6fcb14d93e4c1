from __future__ import annotations

from pathlib import Path

import pandas as pd

from rlhf.report.plots import plot_curves

CURVES = {name: pd.Series([1.0, 2.0], index=[1, 2]) for name in "abcd"}


def test_panels_without_curves_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "plot.png"
    assert not plot_curves(CURVES, [("nothing", ["x"])], "steps", file)
    assert not file.exists()
    assert plot_curves(CURVES, [(name, [name, "x"]) for name in "abcd"], "steps", file)
    assert file.stat().st_size > 1000
