"""Curves of a run, read back from its TensorBoard files."""

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

    A step that was logged twice, because the run was stopped and resumed, keeps its last value.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(run) / files.CURVES
    if not folder.is_dir():
        raise UserError(f"{run} is not a finished run: it has no folder {files.CURVES}.")
    curves: dict[str, pd.Series] = {}
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda f: f.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            points = pd.Series({point.step: point.value for point in events.Scalars(name)}, dtype=float)
            curves[name] = pd.concat([curves[name], points]) if name in curves else points
    return {name: curve[~curve.index.duplicated(keep="last")].sort_index() for name, curve in curves.items()}


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
