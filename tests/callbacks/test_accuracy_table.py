from __future__ import annotations

import pytest

from rlhf.callbacks.accuracy_table import accuracy_table


def test_accuracy_per_split_batch_and_confidence() -> None:
    rows = [("validation", "a", 9, 1.0), ("validation", "a", 1, -1.0), ("validation", "b", 9, 2.0)]
    rows += [("validation_cnndm", "cnndm0", None, 0.0)]
    names = ("split", "batch", "confidence", "margin")
    table = accuracy_table([dict(zip(names, row, strict=True)) for row in rows])
    found = {(r.split, r.group, r.value): (r.pairs, r.accuracy) for r in table.itertuples()}
    assert found["validation", "all", ""] == (3, pytest.approx(2 / 3))
    assert found["validation", "batch", "a"] == (2, 0.5)
    assert found["validation", "confidence", 9] == (2, 1.0)
    assert found["validation_cnndm", "all", ""] == (1, 0.0)  # a tie is not right
    assert not any(split == "validation_cnndm" and group == "confidence" for split, group, _ in found)


def test_wilson_interval() -> None:
    pairs = [{"split": "v", "batch": None, "confidence": None, "margin": 1.0 if n < 8 else -1.0} for n in range(10)]
    row = accuracy_table(pairs).iloc[0]
    z, p, n = 1.959964, 0.8, 10
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    assert (row.low, row.high) == (pytest.approx(centre - half, abs=1e-5), pytest.approx(centre + half, abs=1e-5))
