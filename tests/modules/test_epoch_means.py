"""Means over an epoch that was stopped in its middle, and went on with another number of processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf.modules.epoch_means import EpochMeans

BEFORE, AFTER = [[1.0, 2.0], [3.0], [4.0, 5.0]], [[10.0], [20.0, 30.0], [40.0]]  # entries of each process


def add(means: EpochMeans, entries: list[float]) -> None:
    values = torch.tensor([*entries, 99.0])  # the last one is padding
    means.add("x", values, torch.arange(len(values)) < len(entries))


@pytest.mark.parametrize("before", [1, 2, 3])
@pytest.mark.parametrize("after", [1, 2, 3])
def test_every_entry_counts_once_whatever_the_number_of_processes(before: int, after: int) -> None:
    stopped, resumed = ([EpochMeans() for _ in range(count)] for count in (before, after))
    for means, entries in zip(stopped, BEFORE, strict=False):
        add(means, entries)
    saved = [means.state()[0] for means in stopped]
    for rank, (means, entries) in enumerate(zip(resumed, AFTER, strict=False)):
        means.load(saved, rank, after)
        add(means, entries)
    sums = [torch.stack(list(means._sums.values())) for means in resumed]
    every = [x for part in (*BEFORE[:before], *AFTER[:after]) for x in part]

    def reduce_sum(_: Tensor) -> Tensor:
        return torch.stack(sums).sum(0)

    assert resumed[0].pop(reduce_sum)["x"] == pytest.approx(sum(every) / len(every))
    assert resumed[0].pop(reduce_sum) == {}


def test_a_stop_rounds_nothing() -> None:
    whole, stopped, resumed = EpochMeans(), EpochMeans(), EpochMeans()
    for entries in ([1e8, 0.1], [0.3]):
        add(whole, entries)
    add(stopped, [1e8, 0.1])
    resumed.load(stopped.state(), 0, 1)
    add(resumed, [0.3])
    assert resumed.pop(lambda x: x) == whole.pop(lambda x: x)
