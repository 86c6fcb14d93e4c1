"""Who agrees with whom: the reward model with the judge, the seeds with each other."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from rlhf.evaluation.statistics import KEYS, LEVEL, Estimate, proportion

if TYPE_CHECKING:
    import pandas as pd

KAPPA_RESAMPLES = 1000


def reward_agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """How often the reward model prefers the text that the judge prefers, of policy and reference.

    Args:
        rows: judged rows with `a_score` and `b_score`. Rows without scores, invalid rows and the judge's ties are left
            out; equal scores count half.

    Returns:
        A row per size, seed and policy: `pairs`, `undecided` (the judge's ties), `agreement`, Wilson's `low`, `high`.
    """
    import pandas as pd

    known = rows.dropna(subset=["a_score", "b_score", "outcome"])
    table = []
    for key, part in known.groupby(KEYS, sort=False):
        decided = part[part["outcome"] != 0.5]
        same = np.sign(decided["a_score"] - decided["b_score"]) * np.sign(decided["outcome"] - 0.5)
        found = proportion((same.mean() + 1) / 2, len(decided))
        table.append((*key, len(decided), len(part) - len(decided), *found))
    return pd.DataFrame(table, columns=[*KEYS, "pairs", "undecided", "agreement", "low", "high"])


def ratings(rows: pd.DataFrame) -> pd.DataFrame:
    """What each seed did on each query: 0 lost, 1 tied, 2 won. A row per query, a column per seed.

    Queries that some seed lacks, or for which some outcome is invalid, are left out.
    """
    table = rows.pivot(index="query", columns="seed", values="outcome").dropna()
    return (np.sign(table - 0.5) + 1).astype(int)


def seed_agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """Whether the seeds of a size win on the same queries.

    Returns:
        A row per size and policy with two seeds or more: `seeds`, `queries`, `pairwise` (share of equal outcomes, mean
        over pairs of seeds), `unanimous` (share of queries on which all are equal), `cohen` (mean over pairs of
        seeds), `fleiss`, its bootstrap interval `low`, `high`. A kappa is NaN where chance alone would agree always.
    """
    return _agreement(rows, "policy", "queries")


def reward_seed_agreement(margins: pd.DataFrame) -> pd.DataFrame:
    """Whether the reward models of the seeds of a size prefer the same response of the same comparison.

    Args:
        margins: as of `runs.margin_rows`. Seeds whose tables list other comparisons can't be compared: a split with
            such ones has no row.

    Returns:
        As of `seed_agreement`, with `split` in the place of `policy` and `pairs` in that of `queries`.
    """
    import pandas as pd

    what = [name for name in ("batch", "confidence", "chosen_policy", "rejected_policy") if name in margins]
    same = []
    for _, part in margins.groupby(["size", "split"], sort=False):
        tables = [own[what].reset_index(drop=True) for _, own in part.groupby("seed", sort=False)]
        if all(table.equals(tables[0]) for table in tables):
            number = part.groupby("seed", sort=False).cumcount()
            same.append(part.assign(query=number, outcome=(np.sign(part["margin"]) + 1) / 2))
    return _agreement(pd.concat(same), "split", "pairs") if same else pd.DataFrame()


def _agreement(rows: pd.DataFrame, group: str, counted: str) -> pd.DataFrame:
    """As of `seed_agreement`, per size and `group`."""
    import pandas as pd

    table = []
    for key, part in rows.groupby(["size", "parameters", group], sort=False):
        outcomes = ratings(part)
        if outcomes.shape[1] < 2 or outcomes.empty:
            continue
        pairs = list(combinations(outcomes.columns, 2))
        table.append({
            **dict(zip(["size", "parameters", group], key, strict=True)),
            "seeds": outcomes.shape[1],
            counted: len(outcomes),
            "pairwise": float(np.mean([(outcomes[x] == outcomes[y]).mean() for x, y in pairs])),
            "unanimous": float((outcomes.nunique(axis=1) == 1).mean()),
            "cohen": float(np.mean([cohen_kappa(outcomes[x], outcomes[y]) for x, y in pairs])),
            **dict(zip(["fleiss", "low", "high"], fleiss_kappa(outcomes), strict=True)),
        })  # fmt: skip
    return pd.DataFrame(table)


def cohen_kappa(x: pd.Series, y: pd.Series) -> float:
    """Cohen's kappa of two raters; NaN where both always give the same one answer."""
    import pandas as pd
    from statsmodels.stats.inter_rater import cohens_kappa

    answers = sorted({*x, *y})
    if len(answers) < 2:
        return float("nan")
    counts = pd.crosstab(x, y).reindex(index=answers, columns=answers, fill_value=0)
    return float(cohens_kappa(counts.to_numpy(), return_results=False))


def fleiss_kappa(outcomes: pd.DataFrame) -> Estimate:
    """Fleiss' kappa with its bootstrap interval; queries are drawn.

    Args:
        outcomes: a row per query, a column per rater. NaN where all answers are the same.
    """
    from statsmodels.stats import inter_rater

    counts, _ = inter_rater.aggregate_raters(outcomes.to_numpy())
    if counts.shape[1] < 2:
        return Estimate(float("nan"), float("nan"), float("nan"))
    random = np.random.default_rng(1)
    drawn = []
    for _ in range(KAPPA_RESAMPLES):
        sample = counts[random.integers(len(counts), size=len(counts))]
        if (sample.sum(0) > 0).sum() > 1:
            drawn.append(inter_rater.fleiss_kappa(sample))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(inter_rater.fleiss_kappa(counts)), float(low), float(high))
