"""Groups of rows that go through a model together: of similar length, since a group costs its rows x its longest."""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SHORTEST = 0.8  # so padding is less than a fifth of a group, and about a tenth overall


def by_length(lengths: Sequence[int], tokens: int, shortest: float = SHORTEST) -> list[list[int]]:
    """Groups rows by length, the longest first, so that no group has more than `tokens` with padding.

    A row that is longer than that has a group of its own.

    Args:
        shortest: how long the shortest row of a group must be, as a share of its longest; 0: as few groups as fit.
    """
    groups: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):
        fits = groups and (len(groups[-1]) + 1) * longest <= tokens
        if not fits or lengths[row] < shortest * longest:
            groups.append([])
            longest = lengths[row]
        groups[-1].append(row)
    return [sorted(group) for group in groups]


def split(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Splits rows into groups by length, so that the most expensive one (rows x longest) is as cheap as possible.

    If there are fewer rows than parts, the last groups are empty.
    """
    rows = sorted(range(len(lengths)), key=lambda r: -lengths[r])
    ordered = [lengths[r] for r in rows]
    longest = max(ordered, default=0)
    most = range(longest * len(rows))  # the smallest limit under which `parts` groups suffice is in here
    limit = bisect_left(most, True, longest, key=lambda tokens: parts_needed(ordered, tokens) <= parts)
    sizes = [len(group) for group in by_length(ordered, limit, shortest=0)]
    while len(sizes) < min(parts, len(rows)):  # more groups than the limit asks for: halve the largest
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        half = sizes[largest] // 2
        sizes[largest : largest + 1] = [half, sizes[largest] - half]
    ends = list(itertools.accumulate(sizes, initial=0))
    groups = [sorted(rows[start:end]) for start, end in itertools.pairwise(ends)]
    return groups + [[] for _ in range(parts - len(groups))]


def groups(
    lengths: Sequence[int], tokens: int, reduce_max: Callable[[Tensor], Tensor] | None, device: torch.device
) -> list[list[int]]:
    """Groups rows by length; with `reduce_max`, into the same number of groups on every rank."""
    return by_length(lengths, tokens) if reduce_max is None else as_many_everywhere(lengths, tokens, reduce_max, device)


def as_many_everywhere(
    lengths: Sequence[int], tokens: int, reduce_max: Callable[[Tensor], Tensor], device: torch.device
) -> list[list[int]]:
    """Groups rows as `by_length` does, but into the same number of groups on every rank."""
    own = torch.tensor([len(by_length(lengths, tokens)), -len(lengths)], device=device)
    most, fewest_rows = reduce_max(own).tolist()
    return split(lengths, min(most, -fewest_rows))


def parts_needed(lengths: Sequence[int], tokens: int) -> int:
    """Returns the smallest number of groups of at most `tokens` each, with padding. No length may exceed `tokens`."""
    return len(by_length(lengths, tokens, shortest=0))
