"""Who agrees with whom: the reward model with the judge, the seeds with each other."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from rlhf.evaluation.statistics import KEYS, LEVEL, NOTHING, Estimate, proportion
from rlhf.report.runs import per_group

RESAMPLES = 1000


def reward_agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """Computes how often the reward model prefers the text that the judge prefers, of policy and reference.

    Args:
        rows: judged rows with `a_score` and `b_score`. Rows without scores, invalid rows and the judge's ties are left
            out; equal scores count half.

    Returns:
        A row per size, seed and policy: `pairs`, `undecided` (the judge's ties), `agreement`, Wilson's `low`, `high`.
    """

    def compute(part: pd.DataFrame) -> dict[str, Any]:
        decided = part[part["outcome"] != 0.5]
        same = np.sign(decided["a_score"] - decided["b_score"]) * np.sign(decided["outcome"] - 0.5)
        rate, low, high = proportion((same.mean() + 1) / 2, len(decided))
        counts = {"pairs": len(decided), "undecided": len(part) - len(decided)}
        return {**counts, "agreement": rate, "low": low, "high": high}

    return per_group(rows.dropna(subset=["a_score", "b_score", "outcome"]), KEYS, compute)


def ratings(rows: pd.DataFrame) -> pd.DataFrame:
    """Rates what each seed did on each query: 0 lost, 1 tied, 2 won. A row per query, a column per seed.

    Queries that some seed lacks, or for which some outcome is invalid, are left out.
    """
    table = rows.pivot(index="query", columns="seed", values="outcome").dropna()
    return (np.sign(table - 0.5) + 1).astype(int)


def seed_agreement(rows: pd.DataFrame, group: str = "policy", counted: str = "queries") -> pd.DataFrame:
    """Measures whether the seeds of a size win on the same queries.

    Args:
        rows: judged rows.
        group: column that is compared within one value.
        counted: name of the column that counts queries.

    Returns:
        A row per size and policy with two seeds or more: `seeds`, `queries`, `pairwise` (share of equal outcomes, mean
        over pairs of seeds), `unanimous` (share of queries on which all are equal), `cohen` (mean over pairs of
        seeds), `fleiss`, its bootstrap interval `low`, `high`. A kappa is NaN where chance alone would agree always.
    """

    def compute(part: pd.DataFrame) -> dict[str, Any]:
        outcomes = ratings(part)
        pairs = [(outcomes[x], outcomes[y]) for x, y in combinations(outcomes.columns, 2)]
        if not pairs or outcomes.empty:
            return {}
        fleiss, low, high = fleiss_kappa(outcomes)
        return {
            "seeds": outcomes.shape[1],
            counted: len(outcomes),
            "pairwise": np.mean([(x == y).mean() for x, y in pairs]),
            "unanimous": (outcomes.nunique(axis=1) == 1).mean(),
            "cohen": np.mean([cohen_kappa(x, y) for x, y in pairs]),
            "fleiss": fleiss,
            "low": low,
            "high": high,
        }

    return per_group(rows, ["size", "parameters", group], compute)


def reward_seed_agreement(margins: pd.DataFrame) -> pd.DataFrame:
    """Measures whether the reward models of the seeds of a size prefer the same response of the same comparison.

    Args:
        margins: as returned by `runs.margin_rows`. Splits in which the seeds have different comparisons are left out.

    Returns:
        The table of `seed_agreement`, with `split` and `pairs` instead of `policy` and `queries`.
    """
    what = [name for name in ("batch", "confidence", "chosen_policy", "rejected_policy") if name in margins]
    same = []
    for _, part in margins.groupby(["size", "split"], sort=False):
        tables = [own[what].reset_index(drop=True) for _, own in part.groupby("seed", sort=False)]
        if all(table.equals(tables[0]) for table in tables):
            number = part.groupby("seed", sort=False).cumcount()
            same.append(part.assign(query=number, outcome=(np.sign(part["margin"]) + 1) / 2))
    return seed_agreement(pd.concat(same), "split", "pairs") if same else pd.DataFrame()


def cohen_kappa(x: pd.Series, y: pd.Series) -> float:
    """Computes Cohen's kappa of two raters; NaN where both always give the same one answer."""
    from statsmodels.stats.inter_rater import cohens_kappa

    answers = sorted({*x, *y})
    if len(answers) < 2:
        return float("nan")
    counts = pd.crosstab(x, y).reindex(index=answers, columns=answers, fill_value=0)
    return float(cohens_kappa(counts.to_numpy(), return_results=False))


def fleiss_kappa(outcomes: pd.DataFrame) -> Estimate:
    """Computes Fleiss' kappa with its bootstrap interval, for which queries are drawn; NaN where all answers are equal.

    Args:
        outcomes: a row per query, a column per rater.
    """
    from statsmodels.stats import inter_rater

    counts, _ = inter_rater.aggregate_raters(outcomes.to_numpy())
    if counts.shape[1] < 2:
        return NOTHING
    random = np.random.default_rng(1)
    drawn = []
    for _ in range(RESAMPLES):
        sample = counts[random.integers(len(counts), size=len(counts))]
        if (sample.sum(0) > 0).sum() > 1:
            drawn.append(inter_rater.fleiss_kappa(sample))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(inter_rater.fleiss_kappa(counts)), float(low), float(high))
