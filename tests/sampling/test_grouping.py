"""Groups of rows, against all groups that there are."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from rlhf.sampling.grouping import as_many_everywhere, by_length, parts_needed, split


def draw(seed: int, rows: int, low: int, high: int) -> list[int]:
    """Lengths."""
    return random.Random(seed).choices(range(low, high + 1), k=rows)


SMALL = [draw(10 * rows + n, rows, 1, 12) for rows in range(1, 7) for n in range(4)]
LARGE = [draw(seed, rows, 20, 560) for seed, rows in enumerate((1, 7, 64, 129))]


def partitions(rows: Sequence[int]) -> Iterator[list[list[int]]]:
    """All ways to put rows into groups."""
    if not rows:
        yield []
        return
    first, *rest = rows
    for groups in partitions(rest):
        yield [[first], *groups]
        for n in range(len(groups)):
            yield [*groups[:n], [first, *groups[n]], *groups[n + 1 :]]


def cost(lengths: Sequence[int], group: Sequence[int]) -> int:
    """Tokens with padding."""
    return len(group) * max((lengths[row] for row in group), default=0)


def is_partition(groups: list[list[int]], rows: int) -> bool:
    return sorted(itertools.chain.from_iterable(groups)) == list(range(rows))


@pytest.mark.parametrize("lengths", SMALL, ids=str)
def test_a_split_is_the_best_there_is(lengths: list[int]) -> None:
    """No way to make as many groups has a cheaper costliest one."""
    for parts in range(1, len(lengths) + 2):
        best = min(
            max(cost(lengths, group) for group in groups)
            for groups in partitions(range(len(lengths)))
            if len(groups) <= parts
        )
        assert max(cost(lengths, group) for group in split(lengths, parts)) == best


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 64, 200])
@pytest.mark.parametrize("lengths", LARGE, ids=len)
def test_a_split_has_every_row_once_in_as_many_parts_as_asked_for(lengths: list[int], parts: int) -> None:
    groups = split(lengths, parts)
    assert is_partition(groups, len(lengths))
    assert len(groups) == parts
    sizes = [len(group) for group in groups]
    assert all(sizes[: len(lengths)])  # a group is empty only where there are not enough rows
    assert sizes[len(lengths) :] == [0] * (parts - len(lengths))
    assert all(group == sorted(group) for group in groups)


@pytest.mark.parametrize("lengths", LARGE, ids=len)
def test_groups_of_a_split_are_similar(lengths: list[int]) -> None:
    """Sorted by length, each group is a stretch."""
    groups = split(lengths, 5)
    ends = [(min(lengths[r] for r in group), max(lengths[r] for r in group)) for group in groups if group]
    assert all(shortest >= longest for (shortest, _), (_, longest) in itertools.pairwise(ends))


@pytest.mark.parametrize("micro", [1, 4, 8])
def test_rows_of_one_length_are_split_evenly(micro: int) -> None:
    assert [len(group) for group in split([30] * 8 * micro, 8)] == [micro] * 8


def test_nothing_is_split_into_empty_parts() -> None:
    assert split([], 3) == [[], [], []]
    assert parts_needed([], 10) == 0


@pytest.mark.parametrize("lengths", SMALL, ids=str)
def test_no_fewer_parts_than_needed(lengths: list[int]) -> None:
    for tokens in range(max(lengths), sum(lengths) + max(lengths)):
        fewest = min(
            len(groups)
            for groups in partitions(range(len(lengths)))
            if max(cost(lengths, group) for group in groups) <= tokens
        )
        assert parts_needed(lengths, tokens) == fewest
        assert max(cost(lengths, group) for group in split(lengths, fewest)) <= tokens


@pytest.mark.parametrize("tokens", [560, 1000, 4000, 10**6])
@pytest.mark.parametrize("shortest", [0, 0.5, 0.8, 1])
@pytest.mark.parametrize("lengths", LARGE, ids=len)
def test_groups_by_length_keep_their_budget_and_are_similar(lengths: list[int], tokens: int, shortest: float) -> None:
    groups = by_length(lengths, tokens, shortest)
    assert is_partition(groups, len(lengths))
    assert all(cost(lengths, group) <= tokens for group in groups)
    assert all(min(lengths[r] for r in group) >= shortest * max(lengths[r] for r in group) for group in groups)
    firsts = [max(lengths[r] for r in group) for group in groups]
    assert firsts == sorted(firsts, reverse=True)
    if shortest == 0:
        assert len(groups) == parts_needed(lengths, tokens)


def test_a_group_ends_only_where_it_must() -> None:
    lengths = LARGE[-1]
    groups = by_length(lengths, 3000)
    for group, following in itertools.pairwise(groups):
        longest, next_row = max(lengths[r] for r in group), max(lengths[r] for r in following)
        assert (len(group) + 1) * longest > 3000 or next_row < 0.8 * longest


def test_a_row_beyond_the_budget_is_alone() -> None:
    assert by_length([5, 90, 6, 95], 20) == [[3], [1], [0, 2]]


@pytest.mark.parametrize("tokens", [3000, 30_000])
def test_padding_is_a_tenth(tokens: int) -> None:
    lengths = draw(3, 500, 100, 560)
    padded = sum(cost(lengths, group) for group in by_length(lengths, tokens))
    assert padded < 1.15 * sum(lengths)


def test_every_process_has_as_many_groups_and_none_is_empty() -> None:
    """The first would form three groups of its own, the second has two rows only."""
    lengths = [[9, 5, 2], [8, 7]]
    most = torch.tensor([[len(by_length(own, 10)), -len(own)] for own in lengths]).amax(0)
    groups = [as_many_everywhere(own, 10, lambda _: most, torch.device("cpu")) for own in lengths]
    assert [len(own) for own in groups] == [2, 2]
    assert all(group for own in groups for group in own)
