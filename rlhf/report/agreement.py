"""Who agrees with whom: the reward model with the judge, the seeds with each other."""

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from rlhf.evaluation.statistics import KEYS, LEVEL, NOTHING, Estimate, proportion
from rlhf.report.runs import per_group

RESAMPLES = 1000


def reward_agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """Computes how often the reward model prefers the text that the judge prefers, of policy and reference.

    Rows without scores, invalid rows and the judge's ties (`undecided`) are left out; equal scores count half.

    Returns:
        A row per size, seed and policy: `pairs`, `undecided`, `agreement`, Wilson's `low`, `high`.
    """

    def compute(part: pd.DataFrame) -> dict[str, Any]:
        decided = part[part["outcome"] != 0.5]
        same = np.sign(decided["a_score"] - decided["b_score"]) * np.sign(decided["outcome"] - 0.5)
        counts = {"pairs": len(decided), "undecided": len(part) - len(decided)}
        return {**counts, **proportion((same.mean() + 1) / 2, len(decided))._asdict()}

    known = rows.dropna(subset=["a_score", "b_score", "outcome"])
    return per_group(known, KEYS, compute).rename(columns={"value": "agreement"})


def ratings(rows: pd.DataFrame) -> pd.DataFrame:
    """Rates each seed (column) on each query (row) that all have: 0 lost, 1 tied, 2 won."""
    table = rows.pivot(index="query", columns="seed", values="outcome").dropna()
    return (np.sign(table - 0.5) + 1).astype(int)


def seed_agreement(rows: pd.DataFrame, group: str = "policy", counted: str = "queries") -> pd.DataFrame:
    """Measures whether the seeds of a size win on the same queries.

    Returns:
        A row per size and policy (or other group) with two seeds or more: `seeds`, `queries`, `pairwise` (share of
        equal outcomes, mean over pairs of seeds), `unanimous` (share of queries on which all are equal), `cohen` (mean
        over pairs of seeds), `fleiss`, its bootstrap interval `low`, `high`. A kappa is NaN where chance alone would
        agree always.
    """

    def compute(part: pd.DataFrame) -> dict[str, Any]:
        outcomes = ratings(part)
        pairs = [(outcomes[x], outcomes[y]) for x, y in combinations(outcomes.columns, 2)]
        if not pairs or outcomes.empty:
            return {}
        return {
            "seeds": outcomes.shape[1],
            counted: len(outcomes),
            "pairwise": np.mean([(x == y).mean() for x, y in pairs]),
            "unanimous": (outcomes.nunique(axis=1) == 1).mean(),
            "cohen": np.mean([cohen_kappa(x, y) for x, y in pairs]),
            **fleiss_kappa(outcomes)._asdict(),
        }

    return per_group(rows, ["size", "parameters", group], compute).rename(columns={"value": "fleiss"})


def reward_seed_agreement(margins: pd.DataFrame) -> pd.DataFrame:
    """Measures whether the reward models of the seeds of a size prefer the same response of the same comparison.

    Splits in which the seeds have different comparisons are left out; `split` and `pairs` replace `policy` and
    `queries` in the table of `seed_agreement`.
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
    from statsmodels.stats.inter_rater import cohens_kappa, to_table

    counts, _ = to_table(np.column_stack([x, y]))
    return float(cohens_kappa(counts, return_results=False)) if len(counts) > 1 else float("nan")


def fleiss_kappa(outcomes: pd.DataFrame) -> Estimate:
    """Computes Fleiss' kappa with its bootstrap interval, for which queries are drawn; NaN if all answers are equal."""
    from statsmodels.stats import inter_rater

    counts, _ = inter_rater.aggregate_raters(outcomes.to_numpy())
    if counts.shape[1] < 2:
        return NOTHING
    random = np.random.default_rng(1)
    samples = (counts[random.integers(len(counts), size=len(counts))] for _ in range(RESAMPLES))
    drawn = [inter_rater.fleiss_kappa(sample) for sample in samples if (sample.sum(0) > 0).sum() > 1]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(inter_rater.fleiss_kappa(counts)), float(low), float(high))
