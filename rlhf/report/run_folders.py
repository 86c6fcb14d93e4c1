"""From folders and tables, as a user names them, to the runs of a report: what is there, and how far it is."""

import json
import os
import re
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
KINDS: dict[StageName, str] = {  # stage -> start of its curves
    "ppo": "objective/", "reward": "loss/reward", "dpo": "loss/dpo", "sft": "loss/sft",
}  # fmt: skip
FINISHED = "finished"
ENDS = {"report", files.ENDED}  # what is in the state of a pipeline of which nothing more is to come
SEED = re.compile(r"seed-(\d+)")  # a run's folder in that of a study, or of ablations


class NothingYetError(UserError):
    """All runs have begun, but logged nothing yet."""


def resolved(runs: Sequence[str | Run]) -> list[Run]:
    """Replaces folders and judged tables by runs; the tables are policies of one run, named by their files.

    Runs that have logged nothing yet are left out, unless there is nothing else.
    """
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
    places = [_place(Path(os.path.abspath(path))) for path in folders]
    names = dict(zip(dict.fromkeys(places), _names([str(place) for place in dict.fromkeys(places)]), strict=True))
    found = [run_of(Path(path), names[place]) for path, place in zip(folders, places, strict=True)]
    if folders and not (any(found) or tables or len(paths) < len(runs)):
        raise NothingYetError(f"runs: nothing to show yet in {', '.join(folders)}: no curves and no judged tables.")
    stranger = [Run(TABLES, None, 0, policies)] if policies else []
    return [*(run for run in runs if isinstance(run, Run)), *filter(None, found), *stranger]


def _place(folder: Path) -> Path:
    """Returns the folder that a run is called by: several seeds are in the folder of their size, or ablation."""
    return folder.parent if SEED.fullmatch(folder.name) else folder


def run_of(folder: Path, name: str) -> Run | None:
    """Finds what a pipeline, or one stage of it, has left in a folder so far: judged tables, margins and curves.

    Returns nothing for a run that has begun, but logged nothing yet.

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
        if _begun(folder):
            return None
        inner = f"; its runs are {folder}/*/seed-*" if any(folder.glob("*/seed-*")) else ""
        raise UserError(
            f"runs: {folder} is no run: it has no judge_*.parquet and no {files.CURVES}, neither itself nor in "
            f"{', '.join(STAGES)}{inner}."
        )
    seed = SEED.fullmatch(folder.name)
    seeds = [config["seed_everything"] for place in stages.values() if (config := _config(place))]
    return Run(
        size=name,
        parameters=None,
        seed=next((seed for seed in reversed(seeds) if type(seed) is int), 0) if seed is None else int(seed[1]),
        policies={LABELS.get(key, key): judged[key] for key in labels},
        margins=str(margins) if margins.is_file() else None,
        stages=stages,
    )


def _begun(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (files.STATE, files.CONFIG, files.OWNER))


def progress(runs: Sequence[Run]) -> pd.DataFrame:
    """Says how far the stages of runs are: `size`, `seed`, `stage`, `state`, and the `steps` so far `of` all.

    Steps are episodes in PPO.
    """
    rows = []
    for run in runs:
        for stage, folder in run.stages.items():
            curves = read_curves(folder)
            total = curves.pop(f"{files.TOTAL}{stage}", pd.Series([None])).iloc[-1]
            state = FINISHED if files.is_complete(Path(folder) / files.EXPORT) else "not finished"
            last = max((int(curve.index[-1]) for curve in curves.values()), default=0)
            steps = last if stage == "ppo" else last + 1  # optimizer steps are counted from 0
            rows.append((run.size, run.seed, stage, state, steps, total))
    return pd.DataFrame(rows, columns=["size", "seed", "stage", "state", "steps", "of"]).astype({"of": "Int64"})


def finished(given: str | Run) -> bool:
    """Tells whether nothing more is to come from a run: its pipeline, or its only stage, has ended."""
    folder = Path(given) if isinstance(given, str) else None
    if folder is None or not folder.is_dir():
        return True
    state = folder / files.STATE
    if state.is_file():
        entries = json.loads(state.read_text())
        return not ENDS.isdisjoint(entries) and all(entry.get("finished", False) for entry in entries.values())
    return files.is_complete(folder / files.EXPORT) or not _begun(folder)


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

    Paths within a run's own folder count as alike. Of the seeds of a run the first one stands for all.
    """
    columns: dict[str, dict[tuple[str, str], str]] = {}
    for run in {run.size: run for run in reversed(runs)}.values():
        own: dict[tuple[str, str], str] = {}
        for stage, folder in run.stages.items():
            config = _config(folder)
            above = str(config.get("run_dir", folder)).removesuffix(f"/{stage}")
            for key, value in _flat(config):
                if value is not None and key not in ("run_dir", "ckpt_path"):
                    own[stage, key] = json.dumps(value).replace(f"{above}/", "{run}/")
        columns[run.size] = own
    columns = {name: own for name, own in reversed(columns.items()) if own}  # a run of tables alone has none
    if len(columns) < 2:
        return pd.DataFrame()
    table = pd.DataFrame(columns).rename_axis(["stage", "setting"])
    differs = table.nunique(axis=1, dropna=False) > 1
    return table[differs].reset_index().fillna("")


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
    starts = {stage: (start, f"{files.TOTAL}{stage}") for stage, start in KINDS.items()}
    return next((stage for stage, start in starts.items() if any(name.startswith(start) for name in names)), None)


def _config(folder: str | Path) -> dict[str, Any]:
    file = Path(folder) / files.CONFIG
    return yaml.safe_load(file.read_text()) or {} if file.is_file() else {}


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, prefix if key == "init_args" else f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}".removesuffix(".class_path"), value
