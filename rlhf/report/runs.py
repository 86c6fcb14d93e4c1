"""The runs of a report over sizes and seeds, and their tables below each other."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from pydantic import ConfigDict, PositiveInt
from pydantic.dataclasses import dataclass

from rlhf.errors import Fraction, UserError
from rlhf.evaluation.tables import read_table

SFT, PPO = "SFT", "PPO"  # labels of the policies that the paper compares
REFERENCE = "reference"
StageName = Literal["sft", "reward", "dpo", "ppo"]
STAGES: tuple[StageName, ...] = get_args(StageName)
RUN = ["size", "parameters", "seed"]
NEEDED = ("query", "a", "b", "outcome")
WORDS = {"a": 1.0, "tie": 0.5, "b": 0.0}  # an outcome in words
NUMBERS = ("a_tokens", "b_tokens", "a_score", "b_score", "a_gold", "b_gold", "a_has_eos", "a_kl")
TEXTS = ("query", "a", "b")
OTHERS = ("b_name", "judge", "a_first", "b_first", "asked")  # what else a report looks at
MARGINS = ("split", "batch", "confidence", "margin")


@dataclass(frozen=True, config=ConfigDict(title="runs"))
class Run:
    """One pipeline: a model size and a seed.

    Attributes:
        size: of the model, as it is shown, or another name of the run.
        parameters: of the policy, the x-axis of plots against size; None for all where sizes are mere names.
        seed: of the pipeline.
        policies: label such as `SFT` or `PPO` -> judged table, in which A is the policy and B the reference; empty
            where nothing is judged yet.
        margins: table of the reward model's margins.
        stages: any of `sft`, `reward`, `ppo` -> run folder, for its curves.
        checkpoints: number of a PPO update -> judged table of the policy as it was after that update.
    """

    size: str
    parameters: PositiveInt | None
    seed: int
    policies: dict[str, str]
    margins: str | None = None
    stages: dict[StageName, str] = field(default_factory=dict)
    checkpoints: dict[PositiveInt, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its size and seed, for messages."""
        return f"size {self.size}, seed {self.seed}"


@dataclass(frozen=True, config=ConfigDict(title="baselines"))
class Baseline:
    """A star in the figure of win rate (against the reference, 0 to 1) against size."""

    name: str
    parameters: PositiveInt
    win_rate: Fraction


def ordered(runs: Sequence[Run]) -> list[Run]:
    """Sorts runs from the smallest size to the largest, then by seed, and refuses those that cannot be sorted.

    Runs without parameters keep their order.
    """
    if not runs:
        raise UserError("runs: give at least one run.")
    parameters = {run.size: run.parameters for run in runs}
    for index, run in enumerate(runs):
        if run.name in [other.name for other in runs[:index]]:
            raise UserError(f"runs: {run.name} is given twice.")
        if parameters[run.size] != run.parameters:
            raise UserError(f"runs: size {run.size} has {run.parameters} and {parameters[run.size]} parameters.")
        if not run.policies and not run.stages:
            raise UserError(f"runs: {run.name} has neither policies nor stages; there is nothing to show.")
        if run.parameters is None and any(parameters.values()):
            raise UserError(f"runs: size {run.size} has no parameters; with several sizes, give them for each.")
    if not any(parameters.values()):
        return list(runs)  # named, not sized
    if len(set(parameters.values())) < len(parameters):
        raise UserError("runs: two sizes have the same number of parameters.")
    return sorted(runs, key=lambda run: (run.parameters or 0, run.seed))


def judged_rows(runs: Iterable[Run], key: Literal["policy", "update"] = "policy") -> pd.DataFrame:
    """Reads the judged tables of policies, or of checkpoints, into one.

    Returns:
        `size`, `parameters` (1 where unknown), `seed`, the key, TEXTS, `outcome`, all of NUMBERS (NaN where a table has
        none), and those of OTHERS that the tables have.
    """
    parts = []
    for run in runs:
        for label, path in (run.policies if key == "policy" else run.checkpoints).items():
            setting = f"runs: {key} {label} of {run.name}"
            table = read_table(path, setting, NEEDED)
            known = {name: table[name].fillna("").astype(str) for name in TEXTS}
            known["outcome"] = _outcomes(table["outcome"], f"{setting}: {path}")
            known |= {name: _numbers(table, name, f"{setting}: {path}") for name in NUMBERS}
            known |= {name: table[name] for name in OTHERS if name in table}
            parts.append(_labelled(pd.DataFrame(known), run, **{key: label}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _outcomes(given: pd.Series, table: str) -> pd.Series:
    """Takes outcomes from 0 to 1, or the words `a`, `tie` and `b`; a missing one stays missing."""
    words = given.map(lambda value: WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value)
    found = pd.to_numeric(words, errors="coerce").astype(float)
    if (bad := given[found.isna() & given.notna() | ~found.fillna(0).between(0, 1)]).size:
        raise UserError(
            f"{table} has an outcome that is not between 0 and 1, nor one of the words {', '.join(WORDS)}: "
            f"{str(bad.iloc[0])[:40]!r}."
        )
    return found


def _numbers(table: pd.DataFrame, name: str, path: str) -> pd.Series:
    """Takes a column of numbers; NaN where a table has none."""
    try:
        return table.get(name, pd.Series(np.nan, table.index)).astype(float)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} has a value in {name} that is not a number: {error}.") from error


def reference_name(rows: pd.DataFrame) -> str:
    """Returns what the judged tables call the text that all policies are compared with."""
    names = rows["b_name"].dropna().unique() if "b_name" in rows else []
    return str(names[0]) if len(names) == 1 and names[0] not in set(rows["policy"]) else REFERENCE


def margin_rows(runs: Iterable[Run]) -> pd.DataFrame:
    """Reads the margins of runs into one table, with `size`, `parameters` and `seed`."""
    parts = []
    for run in runs:
        if run.margins is not None:
            table = read_table(run.margins, f"runs: margins of {run.name}", MARGINS)
            if table["margin"].isna().any():
                raise UserError(f"runs: {run.margins} has a margin that is not a number.")
            parts.append(_labelled(table, run))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _labelled(table: pd.DataFrame, run: Run, **more: object) -> pd.DataFrame:
    labels = {"size": run.size, "parameters": run.parameters or 1, "seed": run.seed, **more}
    return pd.concat([pd.DataFrame(labels, index=table.index), table.drop(columns=[*labels], errors="ignore")], axis=1)


def check_shared_queries(rows: pd.DataFrame) -> None:
    """Refuses judged tables that share no query, since differences are paired by query."""
    if rows.empty:
        return
    queries = rows.groupby(["policy", "size", "seed"], sort=False)["query"].agg(set)
    names = ["{} of size {}, seed {}".format(*key) for key in queries.index]
    for count, name in enumerate(names, 1):
        if not set.intersection(*queries[:count]):
            raise UserError(
                f"runs: the table of {name} shares no query with that of {names[0]} and the others; judge all policies "
                "on the same queries."
            )


def per_group(rows: pd.DataFrame, keys: list[str], compute: Callable[[pd.DataFrame], dict[str, Any]]) -> pd.DataFrame:
    """Makes a table with a row per group of rows: its keys, and what `compute` returns, if it returns anything."""
    groups = ((key, compute(part)) for key, part in rows.groupby(keys, sort=False))
    table = [{**dict(zip(keys, key, strict=True)), **found} for key, found in groups if found]
    return pd.DataFrame(table, columns=None if table else keys)
