"""Statistics of judged tables: win rates, intervals, paired differences."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

LEVEL = 0.95
RESAMPLES = 10_000
KEYS = ["size", "parameters", "seed", "policy"]


class Estimate(NamedTuple):
    """A number with its 95% interval."""

    value: float
    low: float
    high: float


NOTHING = Estimate(float("nan"), float("nan"), float("nan"))


def proportion(mean: float, n: float) -> Estimate:
    """Computes Wilson's score interval of the mean of `n` independent numbers between 0 and 1.

    With ties (0.5) it is too wide rather than too narrow, since no number between 0 and 1 has a variance above
    mean · (1 - mean).
    """
    from statsmodels.stats.proportion import proportion_confint

    if n == 0:
        return NOTHING
    low, high = proportion_confint(mean * n, n, alpha=1 - LEVEL, method="wilson")
    return Estimate(mean, max(0.0, round(low, 12)), min(1.0, round(high, 12)))  # 0, not 1e-17


def proportion_difference(x: float, n: float, y: float, m: float) -> Estimate:
    """Computes Newcombe's interval of the difference x - y of two independent means of `n` and `m` numbers in [0, 1].

    It combines the two Wilson intervals (Newcombe 1998, method 10).
    """
    from statsmodels.stats.proportion import confint_proportions_2indep

    if n == 0 or m == 0:
        return NOTHING
    low, high = confint_proportions_2indep(x * n, n, y * m, m, method="newcomb", compare="diff", alpha=1 - LEVEL)
    return Estimate(x - y, low, high)


def mean_interval(values: Sequence[float] | np.ndarray) -> Estimate:
    """Computes the mean of the values that are not NaN, with its bootstrap percentile interval."""
    from scipy.stats import bootstrap

    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if len(known) < 2:
        return Estimate(float(known.mean()), float("nan"), float("nan")) if len(known) else NOTHING
    found = bootstrap(
        (known,), np.mean, n_resamples=RESAMPLES, batch=100, vectorized=True, confidence_level=LEVEL,
        method="percentile", rng=np.random.default_rng(1),
    ).confidence_interval  # fmt: skip
    return Estimate(float(known.mean()), float(found.low), float(found.high))


def paired_difference(x: pd.Series, y: pd.Series) -> tuple[Estimate, int]:
    """Computes the mean of x - y with its paired bootstrap interval, and counts the queries that both have.

    Both are indexed by query; NaN counts as missing.
    """
    differences = (x - y).dropna()
    return mean_interval(differences.to_numpy()), len(differences)


def win_rates(rows: pd.DataFrame, keys: Sequence[str] = tuple(KEYS)) -> pd.DataFrame:
    """Computes the win rate of every group of judged rows; a row without `outcome` counts in `invalid` only.

    Returns:
        The keys, `rows`, `invalid`, `wins`, `ties`, `losses`, `win_rate` (mean outcome), Wilson's `low` and `high`, and
        `position_bias`.
    """
    table = []
    for key, part in rows.groupby(list(keys), sort=False):
        outcomes = part["outcome"].dropna()
        table.append({
            **dict(zip(keys, key, strict=True)),
            "rows": len(part),
            "invalid": len(part) - len(outcomes),
            "wins": int((outcomes > 0.5).sum()),
            "ties": int((outcomes == 0.5).sum()),
            "losses": int((outcomes < 0.5).sum()),
            **dict(zip(("win_rate", "low", "high"), proportion(outcomes.mean(), len(outcomes)), strict=True)),
            "position_bias": position_bias(part),
        })  # fmt: skip
    return pd.DataFrame(table)


def position_bias(rows: pd.DataFrame) -> float:
    """Computes P(the first text wins) - P(the second text wins), over the valid answers that are not ties.

    It is 0 for a judge that looks at the texts alone, 1 for one that always prefers the first text, -1 for the second,
    and NaN if every answer is a tie or invalid, or none is known. Rows about which no judge was asked (`asked` is
    False) do not count.
    """
    if not {"a_first", "b_first"} <= set(rows):
        return float("nan")
    if "asked" in rows:
        rows = rows[rows["asked"].ne(False)]
    first = (rows["a_first"] == "a").sum() + (rows["b_first"] == "b").sum()
    second = (rows["a_first"] == "b").sum() + (rows["b_first"] == "a").sum()
    return float((first - second) / (first + second)) if first + second else float("nan")


def over_seeds(table: pd.DataFrame, values: Sequence[str], keys: Sequence[str]) -> pd.DataFrame:
    """Computes `<name>`, the mean over seeds, and `<name>_std`, the deviation (n - 1; NaN with one seed), of values."""
    columns = {"seeds": ("seed", "nunique")}
    for name in values:
        columns |= {name: (name, "mean"), f"{name}_std": (name, "std")}
    return table.groupby(list(keys), sort=False, dropna=False).agg(**columns).reset_index()


def best_of_n_kl(n: int) -> float:
    """Computes log n - (n - 1) / n, an upper bound of the KL of best-of-n to its policy, in nats per response.

    It is the KL itself if no two responses have the same reward (Stiennon et al. 2020), and else above it
    (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def seed_means(rows: pd.DataFrame, value: str = "outcome") -> pd.Series:
    """Computes the mean over seeds of each query's number, indexed by query; NaN if a seed lacks the query."""
    return rows.pivot(index="query", columns="seed", values=value).mean(axis=1, skipna=False)


def policy_differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Computes the win rate of each policy minus that of each earlier one, per size and seed, over shared queries.

    The same over all seeds of a size (`seed` is "all"): each query's outcomes are averaged over the seeds first, so
    that the interval says what other queries would give with these seeds.

    Returns:
        `size`, `parameters`, `seed`, `policy`, `baseline`, `queries`, `difference`, `low`, `high`.
    """
    table = []
    for (size, parameters), part in rows.groupby(["size", "parameters"], sort=False):
        seeds: list[Hashable] = list(part["seed"].unique())
        for seed in [*seeds, "all"] if len(seeds) > 1 else seeds:
            own = part if seed == "all" else part[part["seed"] == seed]
            means = {label: seed_means(group) for label, group in own.groupby("policy", sort=False)}
            labels = list(means)
            for index, policy in enumerate(labels):
                for baseline in labels[:index]:
                    found, queries = paired_difference(means[policy], means[baseline])
                    table.append((size, parameters, seed, policy, baseline, queries, *found))
    return pd.DataFrame(table, columns=[*KEYS, "baseline", "queries", "difference", "low", "high"])
