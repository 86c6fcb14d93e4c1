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


def rouge(responses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (F-measure) over all rows."""
    from torchmetrics.functional.text import rouge_score

    texts = [text.strip() for text in responses], [text.strip() for text in references]
    scores = rouge_score(*texts, rouge_keys=("rouge1", "rouge2", "rougeL"))
    return {name: float(scores[f"{name}_fmeasure"]) for name in ("rouge1", "rouge2", "rougeL")}
