"""Loaders for SFT and reward model: which rows, in which order, on which rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhf.errors import UserError
from rlhf.sampling.grouping import split
from rlhf.seeding import permutation

Batch = dict[str, Any]


def accumulation(batch_size: int, micro_batch_size: int, world_size: int, parts: int = 1) -> int:
    """Micro-batches per optimizer step: `batch_size / (parts x world_size x micro_batch_size)`, exactly.

    Args:
        parts: minibatches that the global batch is cut into (PPO).
    """
    unit = parts * world_size * micro_batch_size
    for setting, value in (("data.micro_batch_size", micro_batch_size), ("model.ppo.minibatches", parts)):
        if value < 1:
            raise UserError(f"{setting} {value} must be at least 1.")
    if batch_size < 1 or batch_size % unit:
        minibatches = f" x {parts} minibatches" if parts > 1 else ""
        near = {max(batch_size, 1) // unit * unit, -(-max(batch_size, 1) // unit) * unit} - {0}
        raise UserError(
            f"data.batch_size {batch_size} does not divide into {world_size} processes x data.micro_batch_size "
            f"{micro_batch_size}{minibatches}; use a multiple of {unit}, for example "
            f"{' or '.join(str(n) for n in sorted(near))}."
        )
    return batch_size // unit


def global_batches(rows: int, batch_size: int, epoch: int) -> Iterator[list[int]]:
    """Row numbers of the global batches of an epoch, the same on every rank."""
    order = permutation(rows, epoch)
    for start in range(0, rows, batch_size):
        yield order[start : start + batch_size]


def rank_rows(rows: Sequence[int], lengths: Sequence[int], rank: int, world_size: int) -> list[int]:
    """One rank's share of a global batch, so that all ranks have about the same number of tokens."""
    return sorted(rows, key=lambda row: lengths[row])[rank::world_size]


def step_lengths(lengths: Sequence[int], batch_size: int, world_size: int, epochs: int) -> Iterator[list[int]]:
    """Tokens of the rows of every optimizer step on every rank."""
    for epoch in range(epochs):
        for rows in global_batches(len(lengths), batch_size, epoch):
            for rank in range(world_size):
                yield [lengths[row] for row in rank_rows(rows, lengths, rank, world_size)]


class TrainBatches:
    """Micro-batches of one epoch; every example exactly once over all ranks (D13).

    All ranks shuffle alike, cut into global batches, and then take their rows of each, long and short ones alike. A
    global batch always becomes `accumulate` micro-batches per rank, formed by length, the smaller last one too, so that
    no gradient is left over; a rank without rows for one of them gets a row that counts for nothing.

    Args:
        weights: per row the number of tokens (pairs: 1) that its loss is a mean over.
        lengths: per row the number of tokens that go through the model.
        collate: row numbers and whether they count -> batch.
        progress: the current epoch, and how many of its micro-batches are done already: a resumed run goes on there.
    """

    def __init__(
        self,
        weights: Sequence[int],
        lengths: Sequence[int],
        collate: Callable[[list[int], bool], Batch],
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        progress: Callable[[], tuple[int, int]],
    ) -> None:
        self.weights = weights
        self.lengths = lengths
        self.collate = collate
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.progress = progress

    def __len__(self) -> int:
        return math.ceil(len(self.weights) / self.batch_size) * self.accumulate

    def __iter__(self) -> Iterator[Batch]:
        epoch, done = self.progress()
        first = done // self.accumulate
        for step, rows in enumerate(global_batches(len(self.weights), self.batch_size, epoch)):
            if step < first:
                continue
            share = sum(self.weights[r] for r in rows) / (self.accumulate * self.world_size)
            mine = rank_rows(rows, self.lengths, self.rank, self.world_size)
            for micro, group in enumerate(split([self.lengths[r] for r in mine], self.accumulate)):
                if step * self.accumulate + micro >= done:
                    own = [mine[n] for n in group]
                    yield {**self.collate(own or rows[:1], bool(own)), "share": share, "rows": own}

    def state_dict(self) -> dict[str, int]:
        """Nothing to keep: the Trainer knows the position. It tells Lightning that this loader can resume."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing was kept."""


class EvalBatches:
    """Batches of this rank's share of a split, in order."""

    def __init__(
        self, rows: int, collate: Callable[[list[int], bool], Batch], size: int, rank: int, world: int
    ) -> None:
        if rows < world:
            raise UserError(f"a split of {rows} rows can't be shared by {world} processes; use fewer, or more rows.")
        self.total, self.world = rows, world
        self.rows = list(range(rank, rows, world))
        self.collate = collate
        self.size = size

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    @property
    def even(self) -> bool:
        """Whether all ranks have the same number of batches."""
        counts = (math.ceil(rows / self.size) for rows in (self.total // self.world, -(-self.total // self.world)))
        return len(set(counts)) == 1

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.rows), self.size):
            yield self.collate(self.rows[start : start + self.size], True)
