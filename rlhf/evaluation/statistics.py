"""Statistics of judged tables: win rates, intervals, paired differences."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
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
    """A mean of numbers between 0 and 1 with Wilson's score interval.

    For numbers that are 0 or 1 it is Wilson's. With ties (0.5) it is too wide rather than too narrow, since no number
    between 0 and 1 has a variance above mean · (1 - mean).

    Args:
        mean: of the numbers.
        n: how many, or how many independent ones.
    """
    from statsmodels.stats.proportion import proportion_confint

    if n == 0:
        return NOTHING
    low, high = proportion_confint(mean * n, n, alpha=1 - LEVEL, method="wilson")
    return Estimate(mean, max(0.0, round(low, 12)), min(1.0, round(high, 12)))  # no 1e-17 in the place of 0


def proportion_difference(x: float, n: float, y: float, m: float) -> Estimate:
    """Difference x - y of two independent means of `n` and `m` numbers between 0 and 1, with Newcombe's interval.

    It combines the two Wilson intervals (Newcombe 1998, method 10).
    """
    from statsmodels.stats.proportion import confint_proportions_2indep

    if n == 0 or m == 0:
        return NOTHING
    low, high = confint_proportions_2indep(x * n, n, y * m, m, method="newcomb", compare="diff", alpha=1 - LEVEL)
    return Estimate(x - y, low, high)


def mean_interval(values: Sequence[float] | np.ndarray) -> Estimate:
    """A mean with its bootstrap interval; rows are drawn.

    Args:
        values: one number per row; NaN is left out.
    """
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
    """Mean of x - y over the queries that both have, with the paired bootstrap interval.

    Queries are drawn with replacement, both numbers of a query together (percentile interval, 10,000 draws).

    Args:
        x, y: numbers indexed by query; NaN counts as missing.

    Returns:
        The difference, and over how many queries.
    """
    differences = (x - y).dropna()
    return mean_interval(differences.to_numpy()), len(differences)


def win_rates(rows: pd.DataFrame, keys: Sequence[str] = tuple(KEYS)) -> pd.DataFrame:
    """Win rate of every policy, size and seed, with counts.

    Args:
        rows: judged rows; a NaN `outcome` is invalid and counts in `invalid` only.
        keys: what to group by.

    Returns:
        The keys, `rows`, `invalid`, `wins`, `ties`, `losses`, `win_rate` (mean outcome), Wilson's `low` and `high`, and
        `position_bias` as of that function.
    """
    import pandas as pd

    table = []
    for key, part in rows.groupby(list(keys), sort=False):
        outcomes = part["outcome"].dropna()
        rate = proportion(outcomes.mean(), len(outcomes))
        table.append({
            **dict(zip(keys, _tuple(key), strict=True)),
            "rows": len(part),
            "invalid": len(part) - len(outcomes),
            "wins": int((outcomes > 0.5).sum()),
            "ties": int((outcomes == 0.5).sum()),
            "losses": int((outcomes < 0.5).sum()),
            "win_rate": rate.value,
            "low": rate.low,
            "high": rate.high,
            "position_bias": position_bias(part),
        })  # fmt: skip
    return pd.DataFrame(table)


def position_bias(rows: pd.DataFrame) -> float:
    """P(the text that stood first won) minus P(the second one won), over the valid answers that are no ties.

    0 for a judge that looks at the texts alone, 1 for one that always prefers the first text, -1 the second; NaN where
    every answer is a tie or invalid.

    Args:
        rows: judged rows; those whose `asked` is False, about which no judge was asked, are left out.
    """
    if "asked" in rows:
        rows = rows[rows["asked"].ne(False)]
    first = (rows["a_first"] == "a").sum() + (rows["b_first"] == "b").sum()
    second = (rows["a_first"] == "b").sum() + (rows["b_first"] == "a").sum()
    return float((first - second) / (first + second)) if first + second else float("nan")


def over_seeds(table: pd.DataFrame, values: Sequence[str], keys: Sequence[str]) -> pd.DataFrame:
    """Mean and standard deviation (n - 1) over seeds; with one seed the deviation is NaN.

    Args:
        table: a row per seed.
        values: columns to summarise; each gives `<name>` and `<name>_std`.
        keys: what to group by.

    Returns:
        The keys, `seeds` and two columns per value.
    """
    groups = table.groupby(list(keys), sort=False, dropna=False)
    columns = {"seeds": ("seed", "nunique")}
    for name in values:
        columns |= {name: (name, "mean"), f"{name}_std": (name, "std")}
    return groups.agg(**columns).reset_index()


def seed_means(rows: pd.DataFrame, value: str = "outcome") -> pd.Series:
    """Mean over seeds of each query's number, indexed by query; NaN where a seed has none."""
    table = rows.pivot(index="query", columns="seed", values=value)
    return table.mean(axis=1, skipna=False)


def policy_differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Win rate of each policy minus that of each earlier one, with the same size and seed, over shared queries.

    Also of every size over all seeds (`seed` is "all"): each query's outcomes are averaged over the seeds first, so
    that the interval tells what other queries would give with these seeds.

    Returns:
        `size`, `parameters`, `seed`, `policy`, `baseline`, `queries`, `difference`, `low`, `high`.
    """
    import pandas as pd

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
    names = ["size", "parameters", "seed", "policy", "baseline", "queries", "difference", "low", "high"]
    return pd.DataFrame(table, columns=names)


def _tuple(key: Hashable) -> tuple[Hashable, ...]:
    return key if isinstance(key, tuple) else (key,)
