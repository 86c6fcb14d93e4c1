"""Any runs held against the first one, query by query."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from rlhf.evaluation.statistics import NOTHING, paired_difference
from rlhf.evaluation.tables import read_notes
from rlhf.report.runs import Run

MEASURES = {"win rate": "outcome", "score": "a_score", "gold": "a_gold"}
COLUMNS = ["policy", "measure", "run", "baseline", "queries", "difference", "low", "high", "note"]


def run_differences(runs: Sequence[Run], rows: pd.DataFrame) -> pd.DataFrame:
    """Computes what each policy of each run has more than the same policy of the first run that has it.

    Win rate, score and gold score are paired by query, with the interval of the paired bootstrap. Win rates of
    different judges and scores of different reward models are not compared; `note` says so.

    Args:
        runs: in the order of the report.
        rows: their judged rows.
    """
    table = []
    for policy in dict.fromkeys(label for run in runs for label in run.policies):
        base, *others = (run for run in runs if policy in run.policies)
        first = _of(rows, base, policy)
        for run in others:
            own = _of(rows, run, policy)
            for measure, column in MEASURES.items():
                note = ""
                if (before := _measured_by(base, policy, first, measure)) != _measured_by(run, policy, own, measure):
                    note = f"not compared: the runs have other {'judges' if before[0] == 'judge' else 'reward models'}"
                found, queries = paired_difference(own[column], first[column])
                if queries:
                    shown = NOTHING if note else found
                    table.append((policy, measure, _name(run, runs), _name(base, runs), queries, *shown, note))
    return pd.DataFrame(table, columns=COLUMNS)


def _of(rows: pd.DataFrame, run: Run, policy: str) -> pd.DataFrame:
    same = (rows["size"] == run.size) & (rows["seed"] == run.seed) & (rows["policy"] == policy)
    return rows[same].set_index("query")


def _name(run: Run, runs: Sequence[Run]) -> str:
    return run.size if sum(other.size == run.size for other in runs) == 1 else run.name


def _measured_by(run: Run, policy: str, rows: pd.DataFrame, measure: str) -> tuple[str, str]:
    """Returns who measured: the judge, or the reward model, as far as the notes beside the table say."""
    table = Path(run.policies[policy])
    if measure == "win rate":
        known = read_notes(table).get("settings", {}).get("judge")
        names = rows["judge"].dropna().unique() if "judge" in rows else []
        return "judge", json.dumps(known, sort_keys=True) if known else ", ".join(map(str, names))
    if measure == "score":
        responses = table.with_name(table.name.replace("judge_", "generate_", 1))
        return "reward", str(read_notes(responses).get("settings", {}).get("reward"))
    return "gold", ""
