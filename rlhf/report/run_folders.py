"""From folders and tables, as a user names them, to the runs of a report: what is there, and how far it is."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from rlhf import files
from rlhf.errors import UserError
from rlhf.evaluation.tables import SUFFIXES
from rlhf.report.curve_files import read_curves
from rlhf.report.runs import PPO, SFT, STAGES, Run, StageName

TABLES = "tables"  # the size of a run that is made of tables alone
LABELS = {"sft": SFT, "ppo": PPO}
KINDS: dict[StageName, str] = {"ppo": "objective/", "reward": "loss/reward", "sft": "loss/sft"}  # starts of its curves
FINISHED, NOTHING_YET = "finished", "has nothing to show yet"


def resolved(runs: Sequence[str | Run]) -> list[Run]:
    """Replaces folders and judged tables by runs; the tables are policies of one run, named by their files."""
    paths = [os.path.normpath(given) for given in runs if isinstance(given, str)]
    if twice := [path for index, path in enumerate(paths) if path in paths[:index]]:
        raise UserError(f"runs: {twice[0]} is given twice.")
    tables = [path for path in paths if not Path(path).is_dir()]
    for path in tables:
        if path.startswith(("[", "{")):  # refused as settings, it was left as a text
            keys = ", ".join(field.name for field in fields(Run))
            raise UserError(f"runs: {path} are no settings of runs. There are {keys}.")
        if not Path(path).exists():
            raise UserError(f"runs: there is neither a folder nor a table {path}.")
        if Path(path).suffix not in SUFFIXES:
            raise UserError(f"runs: {path} is neither the folder of a run nor a table in {' or '.join(SUFFIXES)}.")
    policies = {str(Path(name).with_suffix("")): path for name, path in zip(_names(tables), tables, strict=True)}
    if len(policies) < len(tables):
        raise UserError(f"runs: two of the tables {', '.join(tables)} have the same name; give one another.")
    folders = [path for path in paths if path not in tables]
    names = _names([os.path.abspath(path) for path in folders])
    found = [run_of(Path(path), name) for path, name in zip(folders, names, strict=True)]
    stranger = [Run(TABLES, None, 0, policies)] if policies else []
    return [*(run for run in runs if isinstance(run, Run)), *found, *stranger]


def run_of(folder: Path, name: str) -> Run:
    """Finds what a pipeline, or one stage of it, has left in a folder so far: judged tables, margins and curves.

    Args:
        folder: of a pipeline, or the run folder of one training stage.
        name: what the run is called, in the place of the size of its model.
    """
    judged = {path.stem.partition("_")[2]: str(path) for path in sorted(folder.glob("judge_*.parquet"))}
    labels = sorted((key for key in judged if not key.isdigit() and "." not in key), key=lambda key: key == "ppo")
    margins = folder / "margins.parquet"
    stages: dict[StageName, str] = {stage: str(folder / stage) for stage in STAGES if _has_curves(folder / stage)}
    if _has_curves(folder) and not stages and (kind := _kind(folder)):
        stages = {kind: str(folder)}
    if not judged and not stages:
        begun = [stage for stage in STAGES if (folder / stage / files.CONFIG).is_file()]
        if begun or (folder / files.STATE).is_file():
            raise UserError(f"runs: {folder} {NOTHING_YET}: no curves and no judged tables.")
        raise UserError(
            f"runs: {folder} is no run: it has no judge_*.parquet and no {files.CURVES}, neither itself nor in "
            f"{', '.join(STAGES)}."
        )
    seeds = [config["seed_everything"] for place in stages.values() if (config := _config(place))]
    return Run(
        size=name,
        parameters=None,
        seed=next((seed for seed in reversed(seeds) if type(seed) is int), 0),
        policies={LABELS.get(key, key): judged[key] for key in labels},
        margins=str(margins) if margins.is_file() else None,
        stages=stages,
    )


def progress(runs: Sequence[Run]) -> pd.DataFrame:
    """Says how far the stages of runs are: `size`, `seed`, `stage`, `state`, the last `step` (episodes in PPO)."""
    rows = []
    for run in runs:
        for stage, folder in run.stages.items():
            steps = [curve.index[-1] for curve in read_curves(folder).values() if len(curve)]
            state = FINISHED if files.is_complete(Path(folder) / files.EXPORT) else "not finished"
            rows.append((run.size, run.seed, stage, state, int(max(steps, default=0))))
    return pd.DataFrame(rows, columns=["size", "seed", "stage", "state", "step"])


def finished(given: str | Run) -> bool:
    """Tells whether nothing more is to come from a run: its pipeline, or its only stage, has ended."""
    folder = Path(given) if isinstance(given, str) else None
    if folder is None or not folder.is_dir():
        return True
    state = folder / files.STATE
    if state.is_file():
        entries = json.loads(state.read_text())
        return bool(entries) and "report" in entries and all(entry.get("finished", False) for entry in entries.values())
    return files.is_complete(folder / files.EXPORT) or not (folder / files.CONFIG).is_file()


def signature(runs: Sequence[str | Run]) -> list[object]:
    """Changes whenever a run has validated, judged, or ended a stage."""
    found: list[object] = []
    for folder in (Path(run) for run in runs if isinstance(run, str)):
        places = [folder, *(folder / stage for stage in STAGES)]
        for file in (place / files.CURVES for place in places):
            found.append(file.read_text().count('"validation') if file.is_file() else -1)
        whole = [*(place / files.EXPORT / files.MANIFEST for place in places), *folder.glob("*.parquet")]
        found.append([(str(file), file.stat().st_mtime_ns) for file in whole if file.is_file()])
        found.append(finished(str(folder)))
    return found


def settings_that_differ(runs: Sequence[Run]) -> pd.DataFrame:
    """Compares the saved configs of runs: `stage`, `setting`, and a column per run; what is alike is left out.

    Paths within a run's own folder count as alike.
    """
    columns = {}
    for run in runs:
        own: dict[tuple[str, str], str] = {}
        for stage, folder in run.stages.items():
            config = _config(folder)
            above = str(config.get("run_dir", folder)).removesuffix(f"/{stage}")
            for key, value in _flat(config):
                if key not in ("run_dir", "ckpt_path"):
                    own[stage, key] = json.dumps(value).replace(f"{above}/", "{run}/")
        columns[f"{run.size}, seed {run.seed}" if _twice(run, runs) else run.size] = own
    columns = {name: own for name, own in columns.items() if own}  # a run of tables alone has none
    if len(columns) < 2:
        return pd.DataFrame()
    table = pd.DataFrame(columns).rename_axis(["stage", "setting"])
    differs = table.nunique(axis=1, dropna=False) > 1
    return table[differs].reset_index().fillna("")


def _twice(run: Run, runs: Sequence[Run]) -> bool:
    return sum(other.size == run.size for other in runs) > 1


def _names(paths: Sequence[str]) -> list[str]:
    """Shortens paths to the last parts by which they differ."""
    parts = [Path(path).parts for path in paths]
    longest = max(map(len, parts), default=0)
    for depth in range(1, longest + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _has_curves(folder: Path) -> bool:
    return (folder / files.CURVES).is_file()


def _kind(folder: Path) -> StageName | None:
    names = read_curves(folder)
    return next((stage for stage, start in KINDS.items() if any(name.startswith(start) for name in names)), None)


def _config(folder: str | Path) -> dict[str, Any]:
    file = Path(folder) / files.CONFIG
    return yaml.safe_load(file.read_text()) or {} if file.is_file() else {}


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}".removesuffix(".class_path"), value
