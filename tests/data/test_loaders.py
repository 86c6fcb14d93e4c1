"""Batch sizes, and the rows of every rank (D13, D14)."""

from __future__ import annotations

import math
import re
from itertools import pairwise, product
from typing import Any

import pytest
from lightning.fabric.utilities.types import _Stateful

from rlhf.data.loaders import EvalBatches, TrainBatches, accumulation
from rlhf.errors import UserError


@pytest.mark.parametrize(
    ("batch", "micro", "world", "parts", "expected"),
    [(512, 16, 8, 1, 4), (512, 1, 8, 1, 64), (128, 16, 1, 1, 8), (64, 8, 8, 1, 1), (512, 16, 2, 4, 4), (6, 1, 3, 2, 1)],
)
def test_accumulation_divides_exactly(batch: int, micro: int, world: int, parts: int, expected: int) -> None:
    assert accumulation(batch, micro, world, parts) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "world", "parts"),
    [(100, 16, 1, 1), (10, 3, 2, 1), (3, 4, 1, 1), (8, 2, 1, 3), (0, 4, 2, 1), (-3, 2, 1, 1), (7, 2, 3, 1)],
)
def test_an_inexact_division_names_numbers_that_work(batch: int, micro: int, world: int, parts: int) -> None:
    with pytest.raises(UserError, match=rf"data\.batch_size {batch} .*data\.micro_batch_size {micro}") as error:
        accumulation(batch, micro, world, parts)
    named = re.search(r"use a multiple of (\d+)(.*)", str(error.value))
    assert named
    for number in [named[1], *re.findall(r"-?\d+", named[2])]:
        assert accumulation(int(number), micro, world, parts) >= 1


@pytest.mark.parametrize("micro", [0, -2])
def test_a_micro_batch_without_rows_is_refused(micro: int) -> None:
    with pytest.raises(UserError, match=r"micro_batch_size") as error:
        accumulation(8, micro, 1)
    assert "multiple of" not in str(error.value)


LENGTHS = [7, 90, 30, 31, 5, 64, 30, 12, 88, 41, 3]


def collate(rows: list[int], real: bool) -> dict[str, Any]:
    return {"taken": rows, "real": real}


def loader(
    rows: int, batch: int, accumulate: int, rank: int = 0, world: int = 1, epoch: int = 0, done: int = 0
) -> TrainBatches:
    weights, lengths = [10 + r for r in range(rows)], [LENGTHS[r % len(LENGTHS)] for r in range(rows)]
    return TrainBatches(weights, lengths, collate, batch, accumulate, rank, world, lambda: (epoch, done))


GRID = list(product((1, 2, 5, 12, 13, 23, 24, 25), (1, 2, 3), (1, 2), (1, 2)))


@pytest.mark.parametrize(("rows", "world", "micro", "accumulate"), GRID)
def test_every_row_once_per_epoch_over_all_ranks(rows: int, world: int, micro: int, accumulate: int) -> None:
    size = world * micro * accumulate
    loaders = [loader(rows, size, accumulate, rank, world) for rank in range(world)]
    ranks = [list(each) for each in loaders]
    count = math.ceil(rows / size) * accumulate
    assert [len(batches) for batches in ranks] == [len(each) for each in loaders] == [count] * world
    batches = [batch for rank in ranks for batch in rank]
    assert sorted(row for batch in batches if batch["real"] for row in batch["taken"]) == list(range(rows))
    assert sorted(row for batch in batches for row in batch["rows"]) == list(range(rows))
    assert all(len(batch["taken"]) > 0 and (batch["real"] or len(batch["taken"]) == 1) for batch in batches)
    for step in range(0, count, accumulate):
        part = [batch for rank in ranks for batch in rank[step : step + accumulate]]
        own = [row for batch in part if batch["real"] for row in batch["taken"]]
        assert len(own) == size or step == count - accumulate
        if len(own) == size:
            assert all(batch["real"] for batch in part)
        costs = [
            sum(LENGTHS[r % 11] for r in rank[i]["rows"]) for rank in ranks for i in range(step, step + accumulate)
        ]
        assert max(costs) <= micro * max(LENGTHS)
        assert [batch["share"] for batch in part] == [sum(10 + r for r in own) / (accumulate * world)] * len(part)


@pytest.mark.parametrize("world", [2, 3])
def test_global_batches_depend_neither_on_ranks_nor_on_accumulation(world: int) -> None:
    def steps(world: int, accumulate: int) -> list[set[int]]:
        ranks = [list(loader(23, 6, accumulate, rank, world)) for rank in range(world)]
        return [
            {r for rank in ranks for b in rank[i : i + accumulate] if b["real"] for r in b["taken"]}
            for i in range(0, len(ranks[0]), accumulate)
        ]

    assert steps(world, 1) == steps(1, 1) == steps(1, 3)


def order(batches: Any) -> list[int]:
    return [row for batch in batches for row in batch["taken"]]


def test_each_epoch_has_an_order_of_its_own() -> None:
    orders = [order(loader(50, 10, 1, epoch=epoch)) for epoch in (0, 1, 2)]
    assert all(a != b for a, b in pairwise([list(range(50)), *orders]))
    assert orders[0] == order(loader(50, 10, 1))


@pytest.mark.parametrize("done", [0, 1, 4, 7, 12])
def test_a_resumed_epoch_goes_on_after_what_is_done(done: int) -> None:
    whole = list(loader(23, 4, 2, epoch=3))
    assert len(whole) == 12
    assert list(loader(23, 4, 2, epoch=3, done=done)) == whole[done:]


def test_lightning_takes_it_for_a_loader_that_can_resume() -> None:
    assert isinstance(loader(4, 2, 1), _Stateful)


def test_iter_alone_changes_nothing() -> None:
    each = loader(12, 4, 2)
    iter(each)
    assert list(iter(each)) == list(loader(12, 4, 2))


def test_a_split_with_fewer_rows_than_processes_is_refused() -> None:
    with pytest.raises(UserError, match="2 rows can't be shared by 3 processes"):
        EvalBatches(2, collate, 1, 0, 3)


@pytest.mark.parametrize(("rows", "size", "world"), list(product((3, 4, 7, 12), (1, 3, 20), (1, 2, 3))))
def test_evaluation_covers_every_row_once(rows: int, size: int, world: int) -> None:
    loaders = [EvalBatches(rows, collate, size, rank, world) for rank in range(world)]
    assert [len(list(each)) for each in loaders] == [len(each) for each in loaders]
    assert sorted(row for each in loaders for row in order(each)) == list(range(rows))
    assert all(batch["real"] and len(batch["taken"]) <= size for each in loaders for batch in each)
    assert all(order(each) == sorted(order(each)) for each in loaders)
