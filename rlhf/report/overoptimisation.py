"""Over-optimisation: what the policy gains and loses as it moves away from the reference policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rlhf.errors import UserError
from rlhf.evaluation.statistics import win_rates

if TYPE_CHECKING:
    import pandas as pd

RUN = ["size", "parameters", "seed"]
KL = "objective/kl"
VALIDATION = "validation/"
NO_SCORES = (f"{VALIDATION}eos", f"{VALIDATION}length")
NO_MEASURES = {*RUN, "update", "episodes", "kl", "sqrt_kl", "rows", "low", "high"}


def kl_after(kl: pd.Series, update: int) -> float:
    """Returns the KL of the policy as it was after an update, in nats per response.

    KL is measured on the responses that an update begins with. So the policy after update n is measured by point n + 1;
    the last policy has no such point and takes the last one.

    Args:
        kl: one point per update, in order.
        update: 0 is the policy before PPO, whose KL is 0.

    Raises:
        UserError: the curve has fewer points.
    """
    if update > len(kl):
        raise UserError(f"runs: there is a checkpoint of update {update}, but PPO made only {len(kl)} updates.")
    return 0.0 if update == 0 else float(kl.iloc[min(update, len(kl) - 1)])


def course(rows: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Computes proxy score, gold score and win rate of each checkpoint over the square root of its KL.

    Args:
        rows: as of `runs.checkpoint_rows`; update 0 is the policy that PPO starts from.
        curves: as of `curves.curve_rows`, with the KL of PPO.

    Returns:
        `size`, `parameters`, `seed`, `update`, `kl`, `sqrt_kl`, `score`, `gold` (means of the policy's, NaN where a
        table has none), `rows`, `win_rate`, `low`, `high`.

    Raises:
        UserError: a run has checkpoints and no curve of KL, or too short a one.
    """
    keys = [*RUN, "update"]
    table = win_rates(rows, keys)[[*keys, "rows", "win_rate", "low", "high"]]
    means = rows.groupby(keys, sort=False)[["a_score", "a_gold"]].mean().reset_index()
    table = table.merge(means.rename(columns={"a_score": "score", "a_gold": "gold"}), on=keys)
    known = curves[(curves["curve"] == KL) & (curves["stage"] == "ppo")]
    kls = {}
    for size, seed, update in zip(table["size"], table["seed"], table["update"], strict=True):
        own = known[(known["size"] == size) & (known["seed"] == seed)]["value"]
        if own.empty:
            raise UserError(
                f"runs: size {size!r}, seed {seed} has checkpoints, but no curve {KL}; give its run folder of PPO as "
                "stages.ppo."
            )
        kls[size, seed, update] = kl_after(own, update)
    kl = [kls[key] for key in zip(table["size"], table["seed"], table["update"], strict=True)]
    table = table.assign(kl=kl, sqrt_kl=np.sqrt(np.maximum(kl, 0.0)))
    return table.sort_values(["parameters", "seed", "update"], ignore_index=True)[
        [*keys, "kl", "sqrt_kl", "score", "gold", "rows", "win_rate", "low", "high"]
    ]


def validated_course(whose: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Computes proxy score and gold score at each validation of PPO, from its curves.

    Args:
        whose: a row per run: `size`, `parameters`, `seed`.
        curves: as of `curves.curve_rows`. Runs whose PPO has no curve of the score of an evaluation function are left
            out; all such curves are measures.

    Returns:
        `size`, `parameters`, `seed`, `update`, `episodes`, `kl`, `sqrt_kl`, `score`, and the other scores under the
        names of their functions.
    """
    import pandas as pd

    parts = []
    for run in whose.to_dict("records"):
        own = curves[(curves["size"] == run["size"]) & (curves["seed"] == run["seed"]) & (curves["stage"] == "ppo")]
        known = {name: points.set_index("step")["value"] for name, points in own.groupby("curve")}
        names = [name for name in known if name.startswith(VALIDATION) and name not in NO_SCORES]
        if KL not in known or f"{VALIDATION}score" not in names or len(names) == 1:
            continue
        scores = pd.DataFrame({name.removeprefix(VALIDATION): known[name] for name in names})
        updates = known[KL].index.searchsorted(scores.index, side="right")
        kl = [kl_after(known[KL], update) for update in updates]
        table = scores.assign(**run, update=updates, kl=kl, sqrt_kl=np.sqrt(np.maximum(kl, 0.0)))
        parts.append(table.rename_axis("episodes").reset_index())
    if not parts:
        return pd.DataFrame()
    found = pd.concat(parts, ignore_index=True)
    others = sorted({*measures(found)} - {"score"})
    return found[[*RUN, "update", "episodes", "kl", "sqrt_kl", "score", *others]]


def measures(table: pd.DataFrame) -> list[str]:
    """Lists the columns of a course that say how good the policy is, those that have any number."""
    return [name for name in table if name not in NO_MEASURES and table[name].notna().any()]


def turning_points(table: pd.DataFrame) -> pd.DataFrame:
    """Finds where each measure is highest, a row per run and measure.

    Over-optimisation is a proxy score that is best at the end, and a gold score or win rate that was best before.

    Args:
        table: as of `course` or `validated_course`.

    Returns:
        `size`, `parameters`, `seed`, `measure`, `best_update`, `sqrt_kl`, `best`, `last`.
    """
    import pandas as pd

    found = []
    for key, part in table.sort_values("update").groupby(RUN, sort=False):
        for measure in measures(table):
            known = part[part[measure].notna()]
            if len(known):
                best = known.loc[known[measure].idxmax()]
                last = known[measure].iloc[-1]
                found.append((*key, measure, int(best["update"]), best["sqrt_kl"], best[measure], last))
    return pd.DataFrame(found, columns=[*RUN, "measure", "best_update", "sqrt_kl", "best", "last"])
