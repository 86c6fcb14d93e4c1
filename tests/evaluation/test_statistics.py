from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest

from rlhf.evaluation.statistics import (
    mean_interval,
    over_seeds,
    paired_difference,
    policy_differences,
    position_bias,
    proportion,
    proportion_difference,
    seed_means,
    win_rates,
)

POINTS = {"a": 1.0, "tie": 0.5, "b": 0.0, "invalid": float("nan")}


def judged(*answers: tuple[str, str], **keys: object) -> pd.DataFrame:
    """Rows with who won when A stood first, and when B did."""
    table = pd.DataFrame(answers, columns=["a_first", "b_first"])
    outcome = (table["a_first"].map(POINTS) + table["b_first"].map(POINTS)) / 2
    whose = {"size": "s", "parameters": 1, "seed": 1, "policy": "PPO", **keys}
    return table.assign(outcome=outcome, query=[f"q{n}" for n in range(len(table))], **whose)


def rows_of(outcomes: list[float], **keys: object) -> pd.DataFrame:
    return judged(*[("a", "a")] * len(outcomes), **keys).assign(outcome=outcomes)


@pytest.mark.parametrize(
    ("wins", "rows", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_as_printed_by_newcombe(wins: int, rows: int, low: float, high: float) -> None:
    """Newcombe 1998, Two-sided confidence intervals for the single proportion, table I, method 3."""
    found = proportion(wins / rows, rows)
    assert found.value == wins / rows
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_solves_its_equation() -> None:
    """Its ends are the p at which |mean - p| is 1.96 standard errors of p."""
    found = proportion(0.3, 57)
    for p in (found.low, found.high):
        assert abs(0.3 - p) / np.sqrt(p * (1 - p) / 57) == pytest.approx(1.959964, abs=1e-5)


def test_wilson_ends_at_0_and_1_exactly() -> None:
    for n in range(1, 400):
        assert (proportion(0.0, n).low, proportion(1.0, n).high) == (0, 1)


def test_difference_as_printed_by_newcombe() -> None:
    """Newcombe 1998, Interval estimation for the difference between proportions, table II (a), method 10."""
    found = proportion_difference(56 / 70, 70, 48 / 80, 80)
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert np.isnan(proportion_difference(0.5, 0, 0.5, 10)).all()


def test_interval_covers_the_truth_about_95_times_in_100_also_with_ties() -> None:
    rng = np.random.default_rng(1)
    for ties in (0.0, 0.4):
        hits = 0
        for _ in range(400):
            outcomes = np.where(rng.random(200) < ties, 0.5, rng.random(200) < 0.7)
            found = proportion(outcomes.mean(), 200)
            hits += found.low <= 0.7 * (1 - ties) + 0.5 * ties <= found.high
        assert hits / 400 >= 0.92
        assert ties > 0 or hits / 400 <= 0.98  # with ties it is too wide


def test_bootstrap_equals_all_resamples_written_out() -> None:
    values = [0.0, 0.1, 0.5, 0.9, 1.0]
    means = np.array([np.mean(draw) for draw in product(values, repeat=5)])
    low, high = np.quantile(means, [0.025, 0.975])
    assert mean_interval(values) == pytest.approx((0.5, low, high), abs=0.021)  # means lie 0.02 apart


def test_bootstrap_is_that_of_the_normal_distribution_for_many_rows() -> None:
    values = np.random.default_rng(2).random(900)
    half = 1.96 * values.std(ddof=1) / 30
    assert mean_interval(values) == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), abs=1e-3)
    assert mean_interval([*values, float("nan")]) == mean_interval(values)
    assert np.isnan(mean_interval([])).all()


def test_pairs_are_of_the_same_query() -> None:
    x = pd.Series(np.random.default_rng(3).random(50), index=[f"q{n}" for n in range(50)])
    y = (x - 0.25).sample(frac=1, random_state=1)  # another order, and the same difference on every query
    y["q7"] = float("nan")
    y["elsewhere"] = 0.0
    found, queries = paired_difference(x, y)
    assert found == pytest.approx((0.25, 0.25, 0.25))
    assert queries == 49


def test_invalid_rows_are_neither_a_coin_flip_nor_a_loss() -> None:
    answers = [("a", "a"), ("a", "tie"), ("a", "b"), ("b", "b"), ("tie", "tie"), ("invalid", "a"), ("b", "invalid")]
    found = win_rates(judged(*answers)).iloc[0]
    assert found[["rows", "invalid", "wins", "ties", "losses"]].tolist() == [7, 2, 2, 2, 1]
    assert found["win_rate"] == pytest.approx((1 + 0.75 + 0.5 + 0 + 0.5) / 5)
    assert (found["low"], found["high"]) == tuple(proportion(found["win_rate"], 5))[1:]


def test_no_valid_row_has_no_win_rate() -> None:
    found = win_rates(judged(("invalid", "a"))).iloc[0]
    assert np.isnan(found[["win_rate", "low", "high"]].astype(float)).all()


def test_position_bias() -> None:
    first = judged(*[("a", "b")] * 10)
    assert win_rates(first).iloc[0][["win_rate", "position_bias"]].tolist() == [0.5, 1.0]
    assert position_bias(judged(*[("b", "a")] * 3)) == -1
    assert position_bias(judged(("a", "a"), ("b", "b"), ("a", "a"), ("tie", "tie"))) == 0
    assert position_bias(judged(("a", "b"), ("a", "a"))) == 0.5
    assert position_bias(judged(("a", "invalid"), ("b", "b"))) == pytest.approx(1 / 3)
    assert position_bias(judged(("a", "tie"), ("tie", "tie"))) == 1  # ties tell nothing
    assert np.isnan(position_bias(judged(("tie", "invalid"))))
    by_rule = judged(("a", "b"), ("a", "a"), ("b", "b")).assign(asked=[True, False, float("nan")])
    assert position_bias(by_rule) == 0.5


def test_deviation_over_seeds_needs_two() -> None:
    table = pd.DataFrame({"size": ["s", "s", "t"], "seed": [1, 2, 1], "x": [0.2, 0.6, 0.4]})
    found = over_seeds(table, ["x"], ["size"])
    assert found["seeds"].tolist() == [2, 1]
    assert found["x"].tolist() == pytest.approx([0.4, 0.4])
    assert found["x_std"].tolist() == [pytest.approx(0.2 * 2**0.5), pytest.approx(float("nan"), nan_ok=True)]


def test_differences_of_every_pair_of_policies_per_seed_and_over_seeds() -> None:
    outcomes = {
        ("SFT", 1): [0, 0, 1, 0.5], ("PPO", 1): [1, 0.5, 1, float("nan")],
        ("SFT", 2): [0, 1, 0, 0], ("PPO", 2): [1, 1, 1, 1], ("other", 2): [0, 0, 0, 0],
    }  # fmt: skip
    rows = pd.concat([rows_of(values, policy=policy, seed=seed) for (policy, seed), values in outcomes.items()])
    found = policy_differences(rows).set_index(["seed", "policy", "baseline"])
    assert found.loc[(1, "PPO", "SFT"), ["queries", "difference"]].tolist() == [3, pytest.approx(1.5 / 3)]
    assert found.loc[(2, "PPO", "SFT"), ["queries", "difference"]].tolist() == [4, pytest.approx(3 / 4)]
    assert found.loc[(2, "other", "PPO"), ["difference", "low", "high"]].tolist() == [-1, -1, -1]
    both = (1 - 0) + (0.75 - 0.5) + (1 - 0.5)  # queries 0 to 2, each the mean over the seeds
    assert found.loc[("all", "PPO", "SFT"), ["queries", "difference"]].tolist() == [3, pytest.approx(both / 3)]
    assert (found["low"] <= found["difference"]).all()
    assert (found["difference"] <= found["high"]).all()


def test_a_query_that_a_seed_lacks_has_no_mean() -> None:
    rows = pd.concat([rows_of([1.0, 0.0], seed=1), rows_of([0.5, float("nan")], seed=2)])
    assert seed_means(rows).tolist() == [0.75, pytest.approx(float("nan"), nan_ok=True)]
