"""Curves of a run, read back from its TensorBoard files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rlhf import run_folder
from rlhf.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


def read_curves(run: str | Path) -> dict[str, pd.Series]:
    """Every scalar of a run: name -> values, indexed by step (episodes in PPO).

    A step that was logged twice, because the run was stopped and resumed, keeps its last value.
    """
    import pandas as pd
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(run) / run_folder.CURVES
    if not folder.is_dir():
        raise UserError(f"{run} is not a finished run: it has no folder {run_folder.CURVES}.")
    curves: dict[str, pd.Series] = {}
    for file in sorted(folder.glob("events.out.tfevents.*"), key=lambda f: f.stat().st_mtime):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            points = pd.Series({point.step: point.value for point in events.Scalars(name)}, dtype=float)
            curves[name] = pd.concat([curves[name], points]) if name in curves else points
    return {name: curve[~curve.index.duplicated(keep="last")].sort_index() for name, curve in curves.items()}
