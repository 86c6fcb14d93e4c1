"""The gold score of the embedded data: how a perfect reader of the hidden facts would rate a summary."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.synthetic.domains import ALL_SLOTS

FREE_WORDS = 30
PER_WORD = 0.1


class GoldScore(NamedTuple):
    """The facts covered, the facts invented, the number of words, and the score made of them."""

    covered: int
    invented: int
    words: int
    score: float


def _mentions(text: str, value: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, flags=re.IGNORECASE) is not None


def gold_score(summary: str, facts: Mapping[str, str], slots: Mapping[str, Sequence[str]]) -> GoldScore:
    """Computes `score = covered - invented - 0.1 x (words beyond 30)`.

    A fact is covered if the summary has its value, and invented if it has another value of the same fact.

    Args:
        facts: the true value of each fact.
        slots: all values that each fact could have had (`Domain.slots`).
    """
    covered = sum(_mentions(summary, value) for value in facts.values())
    invented = sum(
        any(_mentions(summary, other) for other in slots[slot] if other != value) for slot, value in facts.items()
    )
    words = len(summary.split())
    return GoldScore(covered, invented, words, covered - invented - PER_WORD * max(0, words - FREE_WORDS))


def gold_scores(queries: list[str], responses: list[str], records: Sequence[Mapping[str, Any]]) -> list[float]:
    """Computes gold scores as a reward function, for `model.evaluation_function` on the embedded data."""
    facts = [{slot: value for slot, value in record["facts"].items() if value is not None} for record in records]
    return [gold_score(text, known, ALL_SLOTS).score for text, known in zip(responses, facts, strict=True)]
