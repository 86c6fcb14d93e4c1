"""Over-optimisation: what the policy gains and loses as it moves away from the reference policy."""

from typing import Any

import numpy as np
import pandas as pd

from rlhf.errors import UserError
from rlhf.evaluation.statistics import win_rates
from rlhf.report.runs import RUN, per_group

KL = "objective/kl"
VALIDATION = "validation/"
NO_SCORES = (f"{VALIDATION}eos", f"{VALIDATION}length")
NO_MEASURES = {*RUN, "update", "episodes", "kl", "sqrt_kl", "rows", "low", "high"}


def kl_after(kl: pd.Series, update: int) -> float:
    """Returns the KL of the policy as it was after an update, in nats per response.

    KL has a point per update and is measured on the responses that it begins with. So the policy after update n is
    measured by point n + 1; the last policy has no such point and takes the last one. Update 0 is the start of PPO.
    """
    if update > len(kl):
        raise UserError(f"runs: there is a checkpoint of update {update}, but PPO made only {len(kl)} updates.")
    return 0.0 if update == 0 else float(kl.iloc[min(update, len(kl) - 1)])


def course(rows: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Computes proxy score, gold score and win rate of each checkpoint over the square root of its KL.

    Args:
        rows: judged rows of checkpoints, with `update`; update 0 is the policy that PPO starts from.
        curves: as returned by `curve_files.curve_rows`, with the KL of PPO.

    Returns:
        A row per checkpoint; `score` and `gold` are means over its responses, NaN where a table has none.
    """
    keys = [*RUN, "update"]
    means = rows.groupby(keys, sort=False).agg(score=("a_score", "mean"), gold=("a_gold", "mean")).reset_index()
    table = means.merge(win_rates(rows, keys), on=keys).sort_values(["parameters", "seed", "update"], ignore_index=True)
    known = curves[(curves["curve"] == KL) & (curves["stage"] == "ppo")]
    curve_of = {key: part["value"] for key, part in known.groupby(["size", "seed"])}
    kl = []
    for size, seed, update in table[["size", "seed", "update"]].itertuples(index=False):
        if (size, seed) not in curve_of:
            name = f"size {size}, seed {seed}"
            raise UserError(f"runs: {name} has checkpoints, but no curve {KL}; give its run folder as stages.ppo.")
        kl.append(kl_after(curve_of[size, seed], update))
    return _with_kl(table, kl)[[*keys, "kl", "sqrt_kl", "score", "gold", "rows", "win_rate", "low", "high"]]


def validated_course(runs: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Computes proxy score and gold score at each validation of PPO, from its curves.

    All scores of an evaluation function are measures, under its name; runs of PPO without them are left out. `runs` has
    the `parameters` of each `size` and `seed`.
    """
    parts = []
    for (size, seed), part in curves[curves["stage"] == "ppo"].groupby(["size", "seed"], sort=False):
        known = {name: points.set_index("step")["value"] for name, points in part.groupby("curve")}
        names = [name for name in known if name.startswith(VALIDATION) and name not in NO_SCORES]
        if KL in known and f"{VALIDATION}score" in names and len(names) > 1:
            scores = pd.DataFrame({name.removeprefix(VALIDATION): known[name] for name in names})
            updates = known[KL].index.searchsorted(scores.index, side="right")
            table = scores.assign(size=size, seed=seed, update=updates).rename_axis("episodes").reset_index()
            parts.append(_with_kl(table, [kl_after(known[KL], update) for update in updates]))
    if not parts:
        return pd.DataFrame()
    found = runs.merge(pd.concat(parts, ignore_index=True), on=["size", "seed"])
    others = sorted({*measures(found)} - {"score"})
    return found[[*RUN, "update", "episodes", "kl", "sqrt_kl", "score", *others]]


def _with_kl(table: pd.DataFrame, kl: list[float]) -> pd.DataFrame:
    return table.assign(kl=kl, sqrt_kl=np.sqrt(np.maximum(kl, 0.0)))  # an estimate can be below 0


def measures(table: pd.DataFrame) -> list[str]:
    """Lists the columns of a course that say how good the policy is, those that have any number."""
    return [name for name in table if name not in NO_MEASURES and table[name].notna().any()]


def turning_points(table: pd.DataFrame) -> pd.DataFrame:
    """Finds where each measure is highest, a row per run and measure.

    Over-optimisation is a proxy score that is best at the end, and a gold score or win rate that was best before.
    """

    def compute(part: pd.DataFrame) -> dict[str, Any]:
        best, last = part.loc[part["value"].idxmax()], part["value"].iloc[-1]
        return {"best_update": best["update"], "sqrt_kl": best["sqrt_kl"], "best": best["value"], "last": last}

    long = table.sort_values("update").melt([*RUN, "update", "sqrt_kl"], measures(table), "measure").dropna()
    found = per_group(long, [*RUN, "measure"], compute)
    return found.sort_values(["parameters", "seed"], kind="stable", ignore_index=True)
