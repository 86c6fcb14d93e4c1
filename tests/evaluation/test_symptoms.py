"""Each rule counts what it should, and nothing while there is too little to tell."""

from __future__ import annotations

import pytest

from rlhf.evaluation.symptoms import (
    SYMPTOMS,
    at_chance,
    hardly_any_eos,
    same_responses,
    sentences,
    unmoved_loss,
    unusual_learning_rate,
)


@pytest.mark.parametrize(("ends", "responses", "counts"), [
    (0, 34, False), (0, 35, True), (3, 200, True), (19, 200, False), (100, 200, False), (0, 0, False),
])  # fmt: skip
def test_eos(ends: int, responses: int, counts: bool) -> None:
    assert (hardly_any_eos(ends, responses, "SFT") is not None) == counts


@pytest.mark.parametrize(("right", "pairs", "counts"), [
    (8, 16, False), (25, 50, True), (10, 50, True), (54, 100, True), (60, 100, False), (535, 1000, False),
    (500, 1000, True), (0, 0, False),
])  # fmt: skip
def test_chance(right: int, pairs: int, counts: bool) -> None:
    assert (at_chance(right, pairs) is not None) == counts


BEFORE = [2.0, 1.0, 3.0, 2.0] * 4


@pytest.mark.parametrize(("after", "steps", "said"), [
    (BEFORE, 100, "did not fall"),
    (BEFORE, 9, None),  # too short to tell
    ([x - 0.02 for x in BEFORE], 100, None),  # it fell by 1%
    ([x + (-1) ** n * 0.05 for n, x in enumerate(BEFORE)], 100, None),  # a model that knew it all goes up and down
    ([x + 0.3 for x in BEFORE], 100, "rose"),
    ([*BEFORE[:-1], BEFORE[-1] + 6], 100, None),  # one row is no evidence
])  # fmt: skip
def test_loss(after: list[float], steps: int, said: str | None) -> None:
    found = unmoved_loss(BEFORE, after, steps) or ""
    assert found.split(":")[0] == (f"The loss {said}" if said else "")


@pytest.mark.parametrize(("same", "queries", "counts"), [(34, 34, False), (35, 35, True), (180, 200, False)])
def test_same_responses(same: int, queries: int, counts: bool) -> None:
    assert (same_responses(same, queries) is not None) == counts


def test_what_is_said() -> None:
    text = unusual_learning_rate(3e-6, 260_000)
    assert text is not None
    assert text.startswith("The learning rate 3.0e-06 is low for a model of 260,000 parameters; try 5.0e-04. Usual ")
    assert text.endswith("Change model.optimization.learning_rate.")
    assert "is high" in str(unusual_learning_rate(1e-2, 10**9))
    assert unusual_learning_rate(3e-6, 10**9) is None
    assert all(sentences(name, "x").startswith("x Usual cause: ") for name in SYMPTOMS)
