"""What a report is made from: runs over sizes and seeds, and their tables in one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf import files
from rlhf.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

STAGES = ("sft", "reward", "ppo")
NEEDED = ("query", "a", "b", "a_first", "b_first", "outcome")
NUMBERS = ("a_tokens", "b_tokens", "a_score", "b_score", "a_gold", "b_gold", "a_has_eos")
MARGINS = ("split", "batch", "confidence", "margin")


@dataclass(frozen=True)
class Run:
    """One pipeline: a model size and a seed.

    Attributes:
        size: of the model, as it is shown.
        parameters: of the policy, the x-axis of plots against size; None is allowed where there is one size only.
        seed: of the pipeline.
        policies: label such as `SFT` or `PPO` -> judged table, in which A is the policy and B the reference.
        margins: table of the reward model's margins.
        stages: any of `sft`, `reward`, `ppo` -> run folder, whose curves are shown.
        checkpoints: number of a PPO update -> judged table of the policy as it was after that update.
    """

    size: str
    parameters: int | None
    seed: int
    policies: dict[str, str]
    margins: str | None = None
    stages: dict[str, str] = field(default_factory=dict)
    checkpoints: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Baseline:
    """A star in the figure of win rate against size.

    Attributes:
        name: as it is shown.
        parameters: of the model.
        win_rate: against the reference, 0 to 1.
    """

    name: str
    parameters: int
    win_rate: float


def ordered(runs: Sequence[Run]) -> list[Run]:
    """From the smallest size to the largest, then by seed.

    Raises:
        UserError: there is no run, a run stands twice, has no policy or an unknown stage, or sizes can't be ordered.
    """
    if not runs:
        raise UserError("runs: give at least one run.")
    parameters = {run.size: run.parameters for run in runs}
    seen = set()
    for run in runs:
        name = f"size {run.size!r}, seed {run.seed}"
        if (run.size, run.seed) in seen:
            raise UserError(f"runs: {name} stands there twice.")
        seen.add((run.size, run.seed))
        if not run.policies:
            raise UserError(f"runs: {name} has no policies; give a judged table for each, such as SFT and PPO.")
        if parameters[run.size] != run.parameters:
            raise UserError(f"runs: size {run.size!r} has {run.parameters} and {parameters[run.size]} parameters.")
        if unknown := set(run.stages) - set(STAGES):
            raise UserError(f"runs: {name} has a stage {min(unknown)!r}; stages are {', '.join(STAGES)}.")
        if len(parameters) > 1 and (run.parameters is None or run.parameters < 1):
            raise UserError(f"runs: size {run.size!r} has no parameters; with several sizes each needs their number.")
    if len(set(parameters.values())) < len(parameters):
        raise UserError("runs: two sizes have the same number of parameters.")
    return sorted(runs, key=lambda run: (run.parameters or 0, run.seed))


def judged_rows(runs: Sequence[Run]) -> pd.DataFrame:
    """All judged tables below each other: those of NEEDED and NUMBERS (NaN where a table lacks one) and whose they are.

    Returns:
        `size`, `parameters`, `seed`, `policy` (its label) and the columns of judged tables.

    Raises:
        UserError: a file or column is missing, or the tables share no query.
    """
    return _joined([
        (run, {"policy": label}, judged_table(path, f"runs: {label} of size {run.size}, seed {run.seed}"))
        for run in ordered(runs)
        for label, path in run.policies.items()
    ])  # fmt: skip


def checkpoint_rows(runs: Sequence[Run]) -> pd.DataFrame:
    """All judged tables of checkpoints below each other: as `judged_rows`, with `update` in place of `policy`.

    Raises:
        UserError: a file or column is missing, or the tables share no query.
    """
    return _joined([
        (run, {"update": update}, judged_table(path, f"runs: checkpoint {update} of size {run.size}, seed {run.seed}"))
        for run in ordered(runs)
        for update, path in sorted(run.checkpoints.items())
    ])  # fmt: skip


def margin_rows(runs: Sequence[Run]) -> pd.DataFrame:
    """All tables of margins below each other, with `size`, `parameters` and `seed`.

    Raises:
        UserError: a file or column is missing, a table is empty, or a margin is not a number.
    """
    from rlhf.evaluation.tables import read_table

    parts: list[tuple[Run, dict[str, object], pd.DataFrame]] = []
    for run in ordered(runs):
        if run.margins is not None:
            table = read_table(run.margins, f"runs: margins of size {run.size}, seed {run.seed}", MARGINS)
            if table["margin"].isna().any():
                raise UserError(f"runs: {run.margins} has a margin that is not a number.")
            parts.append((run, {}, table))
    return _joined(parts)


def judged_table(path: str, setting: str) -> pd.DataFrame:
    """A judged table, with all columns of NUMBERS (NaN where the file lacks one).

    Args:
        path: of the table.
        setting: whose it is, for messages.

    Raises:
        UserError: a file or column is missing, there are no rows, or an outcome is not between 0 and 1.
    """
    from rlhf.evaluation.tables import read_table

    table = read_table(path, setting, NEEDED)
    if not table["outcome"].dropna().between(0, 1).all():
        raise UserError(f"{setting}: {path} has an outcome that is not between 0 and 1.")
    missing = {name: float("nan") for name in NUMBERS if name not in table}
    return table.assign(**missing).astype(dict.fromkeys(NUMBERS, float))


def check_shared_queries(rows: pd.DataFrame) -> None:
    """Refuse judged tables of which some share no query: what is paired by query can't be computed.

    Args:
        rows: as of `judged_rows`.
    """
    tables = list(rows.groupby(["size", "seed", "policy"], sort=False))
    first, shared = tables[0][0], set(tables[0][1]["query"])
    for name, table in tables[1:]:
        shared &= set(table["query"])
        if not shared:
            raise UserError(
                f"runs: the table of {_title(*name)} shares no query with that of {_title(*first)} and the others; "
                "judge all on the same queries."
            )


def check_folders(runs: Sequence[Run]) -> None:
    """Refuse stages without curves, and checkpoints without the curve of KL."""
    for run in runs:
        for stage, folder in run.stages.items():
            if not (Path(folder) / files.CURVES).is_dir():
                raise UserError(
                    f"runs: the stage {stage} of size {run.size}, seed {run.seed} has no folder "
                    f"{Path(folder) / files.CURVES}."
                )


def _title(size: str, seed: int, policy: str) -> str:
    return f"{policy} of size {size}, seed {seed}"


def _joined(parts: Sequence[tuple[Run, dict[str, object], pd.DataFrame]]) -> pd.DataFrame:
    import pandas as pd

    def named() -> Iterator[pd.DataFrame]:
        for run, keys, table in parts:
            whose = {"size": run.size, "parameters": run.parameters or 1, "seed": run.seed, **keys}
            yield pd.concat(
                [pd.DataFrame(whose, index=table.index), table.drop(columns=[*whose], errors="ignore")], axis=1
            )

    return pd.concat(named(), ignore_index=True) if parts else pd.DataFrame()
