from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from rlhf.evaluation.statistics import proportion, proportion_difference
from rlhf.report.lengths import (
    bin_differences,
    fit,
    fitted_curve,
    length_bins,
    length_fits,
    mean_lengths,
    with_lengths,
)

NAN = float("nan")


def simulated(count: int, at_one: float, slope: float, seed: int = 1, **columns: object) -> pd.DataFrame:
    """Rows of a policy with this win rate at ratio 1 and this slope, with some ties."""
    random = np.random.default_rng(seed)
    x = random.normal(0.3, 0.5, count)
    chance = 1 / (1 + np.exp(-(np.log(at_one / (1 - at_one)) + slope * x)))
    outcome = np.mean([random.random(count) < chance, random.random(count) < chance], axis=0)
    table = pd.DataFrame({"query": [f"q{n}" for n in range(count)], "log_ratio": x, "outcome": outcome})
    return table.assign(**{"size": "s", "parameters": 1, "seed": seed, "policy": "PPO", **columns})


def newton(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients of the logistic fit by Newton's method, and their covariance robust to groups, written out."""
    design, beta = np.column_stack([np.ones_like(x), x]), np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ beta))
        bread = np.linalg.inv(design.T @ (design * (p * (1 - p))[:, None]))
        beta = beta + bread @ design.T @ (y - p)
    scores = design * (y - p)[:, None]
    sums = np.array([scores[groups == group].sum(0) for group in np.unique(groups)])
    n, g = len(y), len(sums)
    return beta, g / (g - 1) * (n - 1) / (n - 2) * bread @ sums.T @ sums @ bread


def test_the_fit_is_newtons_with_a_covariance_robust_to_queries() -> None:
    rows = pd.concat([simulated(150, 0.6, 1.5, seed) for seed in (1, 2, 3)])
    beta, covariance = newton(*rows[["log_ratio", "outcome"]].to_numpy().T, rows["query"].to_numpy())
    half = 1.959964 * np.sqrt(np.diag(covariance))
    adjusted, slope = fit(rows)
    ends = [beta[0], beta[0] - half[0], beta[0] + half[0]]
    assert adjusted == pytest.approx([1 / (1 + np.exp(-end)) for end in ends], abs=1e-6)
    assert slope == pytest.approx((beta[1], beta[1] - half[1], beta[1] + half[1]), abs=1e-5)


def test_the_adjusted_win_rate_is_free_of_length() -> None:
    rows = simulated(6000, 0.4, 2.0)
    found = length_fits(rows).iloc[0]
    assert found["raw"] > 0.5  # its responses are longer than the references
    assert found["low"] < 0.4 < found["high"]
    assert found["high"] - found["low"] < 0.04
    assert found["slope_low"] < 2 < found["slope_high"]
    assert fitted_curve(found, np.array([0.0]))[0] == pytest.approx(found["adjusted"])
    assert fitted_curve(found, np.array([0.5]))[0] == pytest.approx(
        1 / (1 + np.exp(-(np.log(0.4 / 0.6) + 1))), abs=0.03
    )


def test_intervals_of_fits_cover_the_truth() -> None:
    hits = 0
    for seed in range(200):
        adjusted, _ = fit(simulated(120, 0.6, 1.0, seed))
        hits += adjusted.low <= 0.6 <= adjusted.high
    assert 0.9 <= hits / 200 <= 0.99


@pytest.mark.parametrize(
    ("ratios", "outcomes"),
    [
        ([0.1, 0.1, 0.1, 0.1], [0, 1, 0, 1]),  # one ratio
        ([-1, -0.5, 0.5, 1], [1, 1, 1, 1]),  # one outcome
        ([-1, -0.5, 0.5, 1], [0, 0, 1, 1]),  # separated
        ([0.3, 0.4], [0, 1]),
    ],
)
def test_no_fit_is_no_number(ratios: list[float], outcomes: list[float]) -> None:
    rows = pd.DataFrame({"log_ratio": ratios, "outcome": outcomes, "query": range(len(ratios))})
    assert np.isnan(fit(rows)).all()


def test_fits_per_seed_and_of_all_seeds() -> None:
    rows = pd.concat([simulated(100, 0.6, 1.0, seed) for seed in (1, 2)])
    found = length_fits(rows)
    assert found["seed"].tolist() == [1, 2, "all"]
    assert found["rows"].tolist() == [100, 100, 200]
    assert found["adjusted"].iloc[1] == fit(rows[rows["seed"] == 2])[0].value


def test_lengths_in_tokens_and_characters() -> None:
    rows = pd.DataFrame(
        {"a": [" abcd ", "", "abc"], "b": ["ab", "ab", "abc\n"], "a_tokens": [3, 1, NAN], "b_tokens": [6, 1, 5]}
    )
    characters = with_lengths(rows, "characters")
    assert characters["length"].tolist() == [4, 0, 3]
    assert characters["log_ratio"].tolist() == pytest.approx([np.log(2), NAN, 0], nan_ok=True)  # an empty text has none
    assert with_lengths(rows, "tokens")["log_ratio"].tolist() == pytest.approx([np.log(0.5), 0, NAN], nan_ok=True)


def test_bins_are_centred_and_count_queries_once() -> None:
    rows = simulated(4, 0.5, 1).assign(log_ratio=[-0.12, 0.12, 0.13, NAN], outcome=[1, 0, 1, 1])
    rows = pd.concat([rows, rows.assign(seed=2, outcome=[1, 1, NAN, 1])])
    found = length_bins(rows)
    assert found["bin"].tolist() == [0, 0.25]
    assert found["rows"].tolist() == [4, 1]
    assert found["queries"].tolist() == [2, 1]
    assert found["win_rate"].tolist() == [0.75, 1]
    assert found[["low", "high"]].iloc[0].tolist() == pytest.approx(list(proportion(0.75, 2))[1:])


def test_differences_only_in_bins_with_enough_queries_of_both() -> None:
    parts = []
    for policy, chances in (("SFT", (0.25, 0.5)), ("PPO", (0.75, 0.25))):
        for centre, count, chance in ((0.0, 20, chances[0]), (0.5, 40, chances[1]), (1.0, 19, 0.5)):
            outcome = (np.arange(count) < chance * count).astype(float)
            rows = simulated(count, 0.5, 1, policy=policy).assign(log_ratio=centre, outcome=outcome)
            parts.append(rows.assign(query=[f"{centre}-{n}" for n in range(count)]))
    found = bin_differences(length_bins(pd.concat(parts)), "PPO", "SFT")
    assert found["bin"].tolist() == [0, 0.5]
    assert found["difference"].tolist() == [0.5, -0.25]
    assert found[["difference", "low", "high"]].iloc[0].tolist() == list(proportion_difference(0.75, 20, 0.25, 20))


def test_mean_lengths_are_of_the_rows_that_count() -> None:
    rows = simulated(3, 0.5, 1).assign(outcome=[1, 0, NAN], length=[10, 20, 90], reference_length=[4, 6, 90])
    assert mean_lengths(rows).iloc[0][["length", "reference_length", "win_rate"]].tolist() == [15, 5, 0.5]


def test_nothing_in_nothing_out() -> None:
    rows = simulated(3, 0.5, 1).assign(log_ratio=NAN)
    assert length_bins(rows).empty
    assert length_fits(rows).empty
    assert bin_differences(length_bins(rows), "PPO", "SFT").empty
