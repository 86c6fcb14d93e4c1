"""Win rate at equal length: bins of the length ratio, and a logistic fit on the rows."""

import warnings
from typing import Any, Literal

import numpy as np
import pandas as pd

from rlhf.evaluation.statistics import KEYS, NOTHING, Estimate, proportion, proportion_difference
from rlhf.report.runs import per_group

Unit = Literal["tokens", "characters"]
WIDTH = 0.25
ENOUGH = 20
GROUP = ["size", "parameters", "policy"]


def with_lengths(rows: pd.DataFrame, unit: Unit) -> pd.DataFrame:
    """Adds `length`, `reference_length` and `log_ratio` = log(length / reference length) to judged rows.

    `log_ratio` is NaN where a text is empty. Characters are counted without blanks at the ends.
    """
    counts = (rows[f"{side}_tokens"] if unit == "tokens" else rows[side].str.strip().str.len() for side in "ab")
    length, reference = (count.astype(float) for count in counts)
    ratio = (length / reference).where((length > 0) & (reference > 0))
    return rows.assign(length=length, reference_length=reference, log_ratio=np.log(ratio))


def mean_lengths(rows: pd.DataFrame) -> pd.DataFrame:
    """Averages `length`, `reference_length` and `win_rate` over the valid rows of each size, seed and policy."""
    valid = rows.dropna(subset=["outcome"]).rename(columns={"outcome": "win_rate"})
    return valid.groupby(KEYS, sort=False)[["length", "reference_length", "win_rate"]].mean().reset_index()


def length_bins(rows: pd.DataFrame) -> pd.DataFrame:
    """Computes the win rate per bin of `log_ratio`, over the seeds together.

    Bins are 0.25 wide and centred on multiples of 0.25, so that the one at 0 holds responses about as long as their
    reference. Invalid rows and those without `log_ratio` are left out. The seeds of a size answer the same queries, so
    Wilson's intervals count different queries instead of rows: never too narrow.

    Returns:
        A row per size, policy and bin that has rows: `bin` (its centre), `rows`, `queries`, `win_rate`, `low`, `high`.
    """

    def compute(part: pd.DataFrame) -> dict[str, Any]:
        queries = part["query"].nunique()
        return {"rows": len(part), "queries": queries, **proportion(part["outcome"].mean(), queries)._asdict()}

    known = rows.dropna(subset=["log_ratio", "outcome"])
    known = known.assign(bin=np.floor(known["log_ratio"] / WIDTH + 0.5) * WIDTH)
    order = np.lexsort((known["bin"], known.groupby(GROUP, sort=False).ngroup()))
    return per_group(known.iloc[order], [*GROUP, "bin"], compute).rename(columns={"value": "win_rate"})


def bin_differences(bins: pd.DataFrame, policy: str, baseline: str) -> pd.DataFrame:
    """Subtracts the win rate of a baseline from that of a policy in every bin in which both have at least 20 queries.

    The two have different queries of a bin, so the interval `low`, `high` is Newcombe's of independent proportions.
    """
    keys = ["size", "parameters", "bin"]
    if bins.empty:
        return pd.DataFrame(columns=[*keys, "difference", "low", "high"])
    own, other = (bins[(bins["queries"] >= ENOUGH) & (bins["policy"] == name)] for name in (policy, baseline))
    both = own.merge(other, on=keys, suffixes=("", "_other"))
    pairs = both[["win_rate", "queries", "win_rate_other", "queries_other"]].itertuples(index=False)
    found = pd.DataFrame([proportion_difference(*pair) for pair in pairs], columns=["difference", "low", "high"])
    return pd.concat([both[keys], found], axis=1)


def length_fits(rows: pd.DataFrame) -> pd.DataFrame:
    """Fits the outcome on `log_ratio` per size and policy, for every seed and for all together ("all").

    Returns:
        `size`, `parameters`, `seed`, `policy`, `rows`, `raw` (the win rate of these rows), `adjusted` (that of the fit
        at ratio 1), its `low` and `high`, `slope` (log-odds per unit of `log_ratio`), `slope_low`, `slope_high`. NaN
        where no fit exists, see `fit`.
    """
    known = rows.dropna(subset=["log_ratio", "outcome"])
    table = []
    for (size, parameters, policy), part in known.groupby(GROUP, sort=False):
        seeds = dict(list(part.groupby("seed", sort=False)))
        for seed, own in {**seeds, "all": part}.items() if len(seeds) > 1 else seeds.items():
            adjusted, slope = fit(own)
            table.append((size, parameters, seed, policy, len(own), own["outcome"].mean(), *adjusted, *slope))
    names = ["rows", "raw", "adjusted", "low", "high", "slope", "slope_low", "slope_high"]
    return pd.DataFrame(table, columns=[*KEYS, *names])


def fit(rows: pd.DataFrame) -> tuple[Estimate, Estimate]:
    """Fits P(win) = sigmoid(intercept + slope · log_ratio); returns the win rate at ratio 1, and the slope.

    Quasi-maximum likelihood for fractional outcomes (Papke and Wooldridge 1996), with a covariance that is robust to
    rows of the same query. The interval of the win rate is the sigmoid of that of the intercept. Both are NaN where no
    fit exists: one length ratio only, or outcomes that a ratio separates without an exception.
    """
    import statsmodels.api as sm
    from statsmodels.tools.sm_exceptions import ConvergenceWarning, PerfectSeparationError, PerfectSeparationWarning

    x = rows["log_ratio"].to_numpy()
    queries = rows["query"].factorize()[0]
    if len(np.unique(x)) < 2 or len(np.unique(queries)) < 3 or rows["outcome"].nunique() < 2:
        return NOTHING, NOTHING
    model = sm.GLM(rows["outcome"].to_numpy(), sm.add_constant(x), family=sm.families.Binomial())
    try:
        with warnings.catch_warnings():
            for kind in (ConvergenceWarning, PerfectSeparationWarning):
                warnings.simplefilter("error", kind)
            result = model.fit(cov_type="cluster", cov_kwds={"groups": queries})
    except (ConvergenceWarning, PerfectSeparationError, PerfectSeparationWarning, np.linalg.LinAlgError):
        return NOTHING, NOTHING
    at_one = result.get_prediction(np.array([[1.0, 0.0]])).summary_frame(alpha=0.05).iloc[0]
    adjusted = at_one[["mean", "mean_ci_lower", "mean_ci_upper"]]
    slope = result.params[1], *result.conf_int(alpha=0.05)[1]
    return Estimate(*map(float, adjusted)), Estimate(*map(float, slope))


def fitted_curve(fitted: pd.Series, log_ratio: np.ndarray) -> np.ndarray:
    """Computes the win rate at each `log_ratio` by a fit, a row of `length_fits`."""
    from scipy.special import expit, logit

    return expit(logit(fitted["adjusted"]) + fitted["slope"] * log_ratio)
