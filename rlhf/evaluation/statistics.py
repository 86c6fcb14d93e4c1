"""Statistics of judged tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class WinRate(NamedTuple):
    """Share of rows won, ties counted half, with a 95% interval, and the number of rows."""

    rate: float
    low: float
    high: float
    rows: int


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> WinRate:
    """How often a score beats the other one of its row; the interval is the normal one of the mean."""
    a, b = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    wins = (a > b) + 0.5 * (a == b)
    half = 1.96 * wins.std(ddof=1) / np.sqrt(len(wins)) if len(wins) > 1 else 0.5
    return WinRate(wins.mean(), max(0.0, wins.mean() - half), min(1.0, wins.mean() + half), len(wins))
