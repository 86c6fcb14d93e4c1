"""Curves of a run, read back from the file that it wrote."""

import json
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pandas as pd

from rlhf import files
from rlhf.errors import UserError
from rlhf.report.runs import Run

COLUMNS = ["size", "seed", "stage", "curve", "step", "value"]


def read_curves(run: str | Path) -> dict[str, pd.Series]:
    """Reads every scalar of a run: name -> values, indexed by step (episodes in PPO).

    A step that was logged twice keeps its last value.
    """
    file = Path(run) / files.CURVES
    if not file.is_file():
        raise UserError(f"{run} is not a finished run: it has no file {files.CURVES}.")
    curves: dict[str, dict[int, float]] = {}
    with file.open() as lines:
        for line in filter(lambda line: line.endswith("\n"), lines):  # the last one may be cut off by a kill
            points = json.loads(line)
            step = points.pop("step")
            for name, value in points.items():
                curves.setdefault(name, {})[step] = value
    return {name: pd.Series(points, dtype=float).sort_index() for name, points in curves.items()}


def curve_rows(runs: Iterable[Run], names: Sequence[str]) -> pd.DataFrame:
    """Reads the curves with one of these names, or patterns such as `validation/*`, of all stages into a table."""
    parts = []
    for run in runs:
        for stage, folder in run.stages.items():
            for name, curve in sorted(read_curves(folder).items()):
                if any(fnmatchcase(name, pattern) for pattern in names):
                    points = curve.rename_axis("step").rename("value").reset_index()
                    parts.append(points.assign(size=run.size, seed=run.seed, stage=stage, curve=name))
    return pd.concat(parts, ignore_index=True)[COLUMNS] if parts else pd.DataFrame(columns=COLUMNS)


def last_quarter(points: pd.DataFrame, run: Sequence[str], step: str = "step") -> pd.DataFrame:
    """Keeps the points of the last quarter of each run, by which its end is judged.

    Args:
        run: columns that tell one run, or one of its curves, from another.
        step: column of the x-axis.
    """
    return points[points[step] > 0.75 * points.groupby([*run])[step].transform("max")]
