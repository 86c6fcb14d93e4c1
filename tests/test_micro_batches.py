"""Groups of similar length: nothing lost, within the budget, and no split is cheaper."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from rlhf.micro_batches import SHORTEST, by_length, parts_needed, split

LENGTHS = [random.Random(n).choices(range(1, 40), k=n) for n in range(1, 9)]


def cost(lengths: list[int], group: list[int]) -> int:
    return len(group) * max((lengths[row] for row in group), default=0)


def cheapest(lengths: list[int], parts: int) -> int:
    """By trying every split of the sorted rows into stretches; any other split costs at least as much."""
    ordered = sorted(lengths)
    n = len(ordered)
    ends = [(0, *cut, n) for cut in combinations(range(1, n), min(parts, n) - 1)]
    return min(max((b - a) * ordered[b - 1] for a, b in pairwise(end)) for end in ends)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8, 11])
def test_a_split_loses_nothing_and_none_is_cheaper(lengths: list[int], parts: int) -> None:
    groups = split(lengths, parts)
    assert len(groups) == parts
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    assert sum(bool(group) for group in groups) == min(parts, len(lengths))
    assert max(cost(lengths, group) for group in groups) == cheapest(lengths, parts)


def test_no_rows_give_empty_groups() -> None:
    assert split([], 2) == [[], []]
    assert by_length([], 10) == []
    assert parts_needed([], 10) == 0


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("tokens", [40, 64, 100, 1000])
def test_as_many_parts_as_the_budget_needs(lengths: list[int], tokens: int) -> None:
    parts = parts_needed(lengths, tokens)
    assert cheapest(lengths, parts) <= tokens
    assert parts == 1 or cheapest(lengths, parts - 1) > tokens
    assert max(cost(lengths, group) for group in split(lengths, parts)) <= tokens


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("tokens", [20, 64, 1000])
@pytest.mark.parametrize("shortest", [0.0, SHORTEST, 1.0])
def test_free_groups_are_of_similar_length_and_within_the_budget(
    lengths: list[int], tokens: int, shortest: float
) -> None:
    groups = by_length(lengths, tokens, shortest)
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[row] for row in group]
        assert len(group) == 1 or cost(lengths, group) <= tokens
        assert min(own) >= shortest * max(own)
    if shortest == 0 and max(lengths) <= tokens:
        assert len(groups) == parts_needed(lengths, tokens)


def test_eight_micro_batches_leave_little_padding() -> None:
    lengths = [40 + round(500 * (n / 63) ** 1.5) for n in range(64)]
    padded = sum(cost(lengths, group) for group in split(lengths, 8))
    assert padded < 1.15 * sum(lengths) < 0.75 * 64 * max(lengths)
