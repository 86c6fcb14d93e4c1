from __future__ import annotations

import pytest

from rlhf.evaluation.rouge import rouge


def test_rouge_of_equal_and_of_disjoint_texts() -> None:
    assert rouge([" a b c", "x y"], ["a b c", "p q"]) == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}


def test_a_long_response_pays_for_what_it_adds() -> None:
    """Recall is 1; precision is 3/6 in words and 2/5 in pairs of words."""
    scores = rouge(["a b c x y z"], ["a b c"])
    assert scores == pytest.approx({"rouge1": 2 / 3, "rouge2": 4 / 7, "rougeL": 2 / 3})
