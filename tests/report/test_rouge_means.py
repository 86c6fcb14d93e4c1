from __future__ import annotations

import pandas as pd
import pytest
from torchmetrics.functional.text import rouge_score

from rlhf.report.rouge_means import rouge_rows, rouge_table


def test_rouge_of_rows_has_the_mean_of_the_split() -> None:
    a, b = ["the cat sat", "a dog", "", "the mat"], ["the cat ran", "a big dog", "nothing", "the mat"]
    rows = pd.DataFrame({"a": a, "b": b, "query": list("wxyz")}).assign(size="s", parameters=1, seed=1, policy="PPO")
    scores = rouge_rows(rows)
    assert list(scores) == ["size", "parameters", "seed", "policy", "query", "rouge1", "rouge2", "rougeL"]
    assert scores["rouge1"].tolist() == pytest.approx([2 / 3, 0.8, 0, 1])  # F of 2/3 and 2/3; of 1 and 2/3
    assert scores["rouge2"].tolist() == pytest.approx([0.5, 0, 0, 1])
    found = rouge_table(scores).iloc[0]
    whole = rouge_score(a, b, rouge_keys=("rouge1", "rouge2", "rougeL"))
    for name in ("rouge1", "rouge2", "rougeL"):
        assert found[name] == pytest.approx(float(whole[f"{name}_fmeasure"]))
    assert found["rouge1_low"] < found["rouge1"] < found["rouge1_high"]
    assert found["rows"] == 4
