"""What speaks against runs: what their stages found while they trained, and what their judged tables show."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from rlhf import files
from rlhf.evaluation import symptoms
from rlhf.report.runs import PPO, SFT, Run

COLUMNS = ["size", "seed", "stage", "name", "finding"]
TABLES = "judged tables"  # in the place of a stage


def read_findings(stage: str | Path) -> dict[str, str]:
    """Reads what a stage found while it trained, by name; nothing if all is well."""
    file = Path(stage) / files.FINDINGS
    return json.loads(file.read_text()) if file.is_file() else {}


def all_findings(run: str | Path) -> list[str]:
    """Lists what the stages of a pipeline's run folder found, and what its report adds, a line each."""
    run = Path(run)
    found = (file.parent for file in run.glob(f"*/{files.FINDINGS}"))
    stages = sorted(stage for stage in found if not stage.suffix)  # `sft.1` was moved aside
    lines = [f"{stage.name}: {text}" for stage in stages for text in read_findings(stage).values()]
    summary = run / files.SUMMARY
    found = json.loads(summary.read_text())["findings"] if summary.is_file() else []
    return lines + [f"{row['stage']}: {row['finding']}" for row in found if row["stage"] == TABLES]


def findings_table(runs: Iterable[Run], rows: pd.DataFrame) -> pd.DataFrame:
    """Collects the findings of the stages of runs and of their `judged_rows`, a row each, with all of COLUMNS."""
    found: list[tuple[str, int, str, str, str]] = []
    for run in runs:
        known: dict[str, dict[str, str]] = {stage: read_findings(folder) for stage, folder in run.stages.items()}
        found += [(run.size, run.seed, stage, *item) for stage, own in known.items() for item in own.items()]
        if rows.empty:
            continue
        own = rows[(rows["size"] == run.size) & (rows["seed"] == run.seed)]
        said = {label for label in (SFT, PPO) if "no_eos" in known.get(label.lower(), {})}
        found += [(run.size, run.seed, TABLES, *item) for item in _in_tables(own, said)]
    return pd.DataFrame(found, columns=COLUMNS)


def _in_tables(rows: pd.DataFrame, said: set[str]) -> Iterator[tuple[str, str]]:
    for label, part in rows.groupby("policy", sort=False):
        ends = part["a_has_eos"].dropna()
        if label not in said and (text := symptoms.hardly_any_eos(ends.sum(), len(ends), str(label))):
            yield "no_eos", text
    texts = {label: rows[rows["policy"] == label].set_index("query")["a"] for label in (SFT, PPO)}
    both = pd.concat(texts, axis=1, join="inner")
    if text := symptoms.same_responses(int((both[SFT] == both[PPO]).sum()), len(both)):
        yield "same_responses", text
