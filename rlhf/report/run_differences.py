"""Any runs held against the first one, query by query, and the ends of their curves beside each other."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from rlhf.evaluation.statistics import NOTHING, paired_difference, seed_means
from rlhf.evaluation.tables import read_notes
from rlhf.report.curve_files import last_quarter
from rlhf.report.runs import Run

MEASURES = {"win rate": "outcome", "score": "a_score", "gold": "a_gold"}
OTHERS = {"win rate": "judges", "score": "reward models"}
COLUMNS = ["policy", "measure", "run", "baseline", "queries", "difference", "low", "high", "note"]


def run_differences(runs: Sequence[Run], rows: pd.DataFrame) -> pd.DataFrame:
    """Computes what each policy of each run has more than the same policy of the first run that has it.

    Win rate, score and gold score are averaged over the seeds of a run and paired by query, with the interval of the
    paired bootstrap. Win rates of different judges and scores of different reward models are not compared; `note` says
    so.

    Args:
        runs: in the order of the report; those of the same `size` are seeds of one run.
        rows: their judged rows.
    """
    table = []
    for policy in dict.fromkeys(label for run in runs for label in run.policies):
        names = list(dict.fromkeys(run.size for run in runs if policy in run.policies))
        own = {name: rows[(rows["size"] == name) & (rows["policy"] == policy)] for name in names}
        for measure, column in MEASURES.items():
            means = {name: seed_means(part, column) for name, part in own.items()}
            by = {name: _measured_by(runs, name, policy, own[name], measure) for name in names}
            for name in names[1:]:
                found, queries = paired_difference(means[name], means[names[0]])
                same = by[name] == by[names[0]] and len(by[name]) == 1
                note = "" if same else f"not compared: the runs have other {OTHERS[measure]}"
                if queries:
                    table.append((policy, measure, name, names[0], queries, *(found if same else NOTHING), note))
    return pd.DataFrame(table, columns=COLUMNS)


def curve_ends(curves: pd.DataFrame) -> pd.DataFrame:
    """Puts the ends of curves beside each other: `stage`, `curve`, and a column per run.

    The end is the mean over the last quarter, averaged over the seeds of a run; NaN where a run has no such curve.

    Args:
        curves: as returned by `curve_files.curve_rows`.
    """
    keys = ["stage", "curve", "size"]
    ends = last_quarter(curves, [*keys, "seed"]).groupby([*keys, "seed"], sort=False)["value"].mean()
    return ends.groupby(keys, sort=False).mean().unstack().reset_index().rename_axis(columns=None)


def _measured_by(runs: Sequence[Run], name: str, policy: str, rows: pd.DataFrame, measure: str) -> set[str]:
    """Returns who measured: judges, or reward models, as far as the notes beside the tables say."""
    if measure == "gold":
        return {""}
    found = set()
    for table in (Path(run.policies[policy]) for run in runs if run.size == name and policy in run.policies):
        responses = table.with_name(table.name.replace("judge_", "generate_", 1))
        notes, setting = (table, "judge") if measure == "win rate" else (responses, "reward")
        found.add(json.dumps(read_notes(notes).get("settings", {}).get(setting), sort_keys=True))
    if measure == "win rate" and found == {"null"} and "judge" in rows:
        return set(map(str, rows["judge"].dropna().unique())) or {""}
    return found
