from __future__ import annotations

from rlhf.rouge import rouge


def test_rouge_of_equal_and_of_disjoint_texts() -> None:
    assert rouge([" a b c", "x y"], ["a b c", "p q"]) == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}
