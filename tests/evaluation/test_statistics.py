from __future__ import annotations

import numpy as np
import pytest

from rlhf.evaluation.statistics import win_rate


def test_win_rate_counts_ties_as_half() -> None:
    rate = win_rate([1, 2, 3, 4], [0, 2, 4, 0])
    assert rate.rate == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert rate.rows == 4


def test_interval_covers_the_truth_about_95_times_in_100() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        wins = rng.random(200) < 0.7
        rate = win_rate(wins.astype(float), np.full(200, 0.5))
        hits += rate.low <= 0.7 <= rate.high
    assert 0.92 <= hits / 400 <= 0.98
