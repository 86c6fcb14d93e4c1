"""Asks a judge, query by query and in both orders, which of two candidates is better."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from rlhf import files
from rlhf.errors import UserError
from rlhf.evaluation.judges import Answers, Judge, Pair
from rlhf.evaluation.statistics import win_rates
from rlhf.evaluation.tables import claim, owned_table, read_notes, read_table, write_notes, write_table

_POINTS = {"a": 1.0, "tie": 0.5, "b": 0.0}
# Column of texts in a table of responses -> number in a judged table -> column of that number.
_NUMBERS = {
    "response": {name: name for name in ("tokens", "score", "gold", "has_eos", "kl")},
    "reference": {"tokens": "reference_tokens", "score": "reference_score", "gold": "gold_reference"},
}


@dataclass(frozen=True)
class Candidate:
    """One side of a comparison.

    Attributes:
        table: file of a table with `query` and the column; `generate` writes such tables.
        column: the column with the texts of this candidate.
        name: name in tables and reports; by default the name of the file, or `reference`.
    """

    table: str
    column: Literal["response", "reference"] = "response"
    name: str | None = None

    @property
    def label(self) -> str:
        """The name in tables and reports."""
        return self.name or ("reference" if self.column == "reference" else Path(self.table).stem)


def judge(
    output: str,
    a: Candidate,
    b: Candidate,
    judge: Judge,
    answers: str | None = None,
    only_shared: bool = False,
) -> pd.DataFrame:
    """Asks a judge, for every query, which of two responses is better, in both orders, and writes one judged table.

    A killed run resumes, and no question is asked twice. No judge is asked if a text is empty (it loses, or ties with
    another empty one) or if both are equal (a tie). Win rate, ties, position bias and cost are printed, and are in
    `<output>.json`. The columns of the table are described in docs/evaluation.md.

    Args:
        output: file of the judged table, ends in .parquet or .csv.
        a: the first candidate; the win rate is that of this one.
        b: the second candidate.
        judge: OpenAIJudge, LocalJudge, RewardJudge, FunctionJudge, GoldJudge, or the import path of your own.
        answers: file of the judge's answers; tables may share it, so that nothing is paid twice. By default
            `<output>.answers.jsonl`.
        only_shared: judge only the queries that both tables have; otherwise tables with different queries are an error.
    """
    file = Path(output)
    joined = join(a, b, only_shared)
    contents = files.fingerprint([joined.to_csv(index=False)])
    settings = {"tables": contents, "a": a.label, "b": b.label, "judge": judge.settings()}
    with owned_table(file):
        if claim(file, settings):
            _show(read_notes(file)["summary"])
            return read_table(file, "output")
        judge.prepare(Path(answers) if answers else file.with_name(f"{file.name}.answers.jsonl"))
        table = _judged(joined, a, b, judge)
        if table["outcome"].isna().all():
            raise UserError(
                f"judge: not one of {len(table)} pairs has a valid answer in both orders; nothing is written."
            )
        summary = summarise(table) | {"usage": judge.usage()}
        write_notes(file, {"settings": settings, "summary": summary})
        write_table(table, file)
    _show(summary)
    print(f"{len(table)} pairs: {file}")
    return table


def join(a: Candidate, b: Candidate, only_shared: bool) -> pd.DataFrame:
    """Reads `id`, `query`, and the texts and numbers of both candidates, in the order of the first table."""
    if a.column == b.column and Path(a.table).resolve() == Path(b.table).resolve():
        raise UserError(
            f"b.table: {b.table} is compared with itself; name another table, or its references with --b.column "
            "reference."
        )
    ours, theirs = (read_table(c.table, f"{side}.table", ("query", c.column)) for side, c in (("a", a), ("b", b)))
    shared = int(ours["query"].isin(theirs["query"]).sum())
    first, second = len(ours) - shared, len(theirs) - shared
    counts = f"{a.table} and {b.table} share {shared} queries; only the first has {first}, only the second {second}"
    if not shared:
        raise UserError(f"a.table, b.table: {counts}. They must be of the same split, cut to the same length.")
    if first or second:
        if not only_shared:
            raise UserError(f"a.table, b.table: {counts}. To judge the shared ones, set only_shared to true.")
        print(f"{counts}; the shared ones are judged.")
    left = _side("a", ours, a).assign(
        id=ours["id"].astype(str) if "id" in ours else [str(number) for number in range(len(ours))],
        record=ours.get("record", "{}"),
    )
    joined = left.merge(_side("b", theirs, b).drop(columns=["b_has_eos", "b_kl"], errors="ignore"), on="query")
    for side, candidate in (("a", a), ("b", b)):
        joined = _with_reference(joined, side, candidate)
    return joined


def _with_reference(joined: pd.DataFrame, side: str, candidate: Candidate) -> pd.DataFrame:
    """Leaves out rows without a reference, which are of mere prompts; an empty response is one that loses."""
    missing = joined[side].str.strip() == "" if candidate.column == "reference" else pd.Series(False, joined.index)
    if missing.all():
        raise UserError(f"{side}.table: {candidate.table} has no reference in any row, as of mere prompts.")
    if missing.any():
        print(f"{side}.table: {missing.sum()} of {len(joined)} rows have no reference; left out.")
    return joined[~missing].reset_index(drop=True)


def _side(side: str, table: pd.DataFrame, candidate: Candidate) -> pd.DataFrame:
    columns = _NUMBERS[candidate.column].items()
    numbers = {f"{side}_{name}": table[column] for name, column in columns if column in table}
    return pd.DataFrame({"query": table["query"], side: table[candidate.column].fillna("").astype(str), **numbers})


def _judged(pairs: pd.DataFrame, a: Candidate, b: Candidate, judge: Judge) -> pd.DataFrame:
    ruled = [_by_rule(*texts) for texts in zip(pairs["a"], pairs["b"], strict=True)]
    columns = (pairs[name] for name in ("query", "a", "b", "record"))
    texts = [Pair(q, x, y, _record(r)) for q, x, y, r in zip(*columns, strict=True)]
    asked = iter(judge.prefer([pair for pair, rule in zip(texts, ruled, strict=True) if rule is None]))
    found = [next(asked) if rule is None else rule for rule in ruled]
    if next(asked, None) is not None:
        raise UserError(f"judge: {judge.name} gave more answers than there were pairs.")
    points = [[_POINTS.get(winner, np.nan) for winner in answers] for answers in found]
    table = pairs.drop(columns="record").assign(
        a_name=a.label,
        b_name=b.label,
        judge=judge.name,
        a_first=[answers.a_first for answers in found],
        b_first=[answers.b_first for answers in found],
        outcome=np.mean(points, axis=1),
        asked=[rule is None for rule in ruled],
    )
    first = ["id", "query", "a", "b", "a_name", "b_name", "judge", "a_first", "b_first", "outcome", "asked"]
    return table[first + [name for name in table if name not in first]]


def _record(text: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (TypeError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"a.table: the column record must hold JSON objects; one row has {str(text)[:60]!r}.")
    return record


def _by_rule(a: str, b: str) -> Answers | None:
    """Decides pairs that need no judge: an empty text loses, equal ones are a tie."""
    a, b = a.strip(), b.strip()
    if a == b:
        return Answers("tie", "tie")
    if a and b:
        return None
    return Answers("a", "a") if a else Answers("b", "b")


def summarise(table: pd.DataFrame) -> dict[str, Any]:
    """Summarises a judged table.

    Returns:
        `rows`, `ties`, `invalid`, `position_bias`, and the `win_rate` of A with its interval `low`, `high`, as returned
        by `statistics.win_rates`; the number of empty texts `empty_a`, `empty_b`; `by_rule`, the rows that no judge was
        asked about; `order_agreement`, how often the two orders agree where a judge gave two valid answers. NaN is
        given as None.
    """
    rates = win_rates(table, ["judge"]).iloc[0]
    asked = table[table["asked"]]
    valid = asked[asked["outcome"].notna()]
    return {
        **{name: str(table[name].iloc[0]) for name in ("a_name", "b_name", "judge")},
        **{name: int(rates[name]) for name in ("rows", "ties", "invalid")},
        **{name: _known(rates[name]) for name in ("win_rate", "low", "high", "position_bias")},
        **{f"empty_{side}": int((table[side].str.strip() == "").sum()) for side in "ab"},
        "by_rule": len(table) - len(asked),
        "order_agreement": _known((valid["a_first"] == valid["b_first"]).mean()),
    }


def _known(number: float) -> float | None:
    return None if np.isnan(number) else float(number)  # JSON has no NaN


def _show(summary: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{summary['a_name']} against {summary['b_name']}, judged by {summary['judge']}"
    shown = Table(title=title, show_header=False)
    shown.add_row("win rate (95% interval)", "{win_rate:.3f} ({low:.3f} to {high:.3f})".format(**summary))
    counts = ("rows", "ties", "invalid", "empty_a", "empty_b", "by_rule", "position_bias", "order_agreement")
    for name, value in {**{name: summary[name] for name in counts}, **summary["usage"]}.items():
        cell = "none" if value is None else f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
        shown.add_row(name.replace("_", " "), cell)
    Console().print(shown)
    if summary["invalid"] > summary["rows"] / 2:
        invalid = f"{summary['invalid']} of {summary['rows']} rows are invalid"
        print(f"WARNING: {invalid}; the win rate is that of the others.", file=sys.stderr)
