"""Loaders for SFT and reward model: which rows, in which order, on which rank."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler
from typing_extensions import override

from rlhf.errors import UserError
from rlhf.ops.sequences import pad_sequences
from rlhf.sampling.grouping import split
from rlhf.seeding import permutation

if TYPE_CHECKING:
    import datasets

Batch = dict[str, Any]
Collate = Callable[[list[dict[str, Any]], bool], Batch]  # rows and whether they count -> batch; it can be pickled

HOST_MASKS = "host_masks"  # their key in a batch that is on its device
WORKERS = {"cuda": 2}  # per loader, by type of device: a CPU that trains has none to spare


def accumulation(batch_size: int, micro_batch_size: int, world_size: int, parts: int = 1) -> int:
    """Computes the micro-batches per optimizer step, `batch_size / (parts x world_size x micro_batch_size)`, exactly.

    PPO cuts the global batch into several minibatches, `parts`.
    """
    unit = parts * world_size * micro_batch_size
    if batch_size % unit:
        minibatches = f" x {parts} minibatches" if parts > 1 else ""
        near = sorted({batch_size // unit * unit, -(-batch_size // unit) * unit} - {0})
        raise UserError(
            f"data.batch_size {batch_size} does not divide into {world_size} processes x data.micro_batch_size "
            f"{micro_batch_size}{minibatches}; use a multiple of {unit}, for example {' or '.join(map(str, near))}."
        )
    return batch_size // unit


def global_batches(rows: int, batch_size: int, epoch: int) -> Iterator[list[int]]:
    """Yields the row numbers of the global batches of an epoch, the same on every rank."""
    order = permutation(rows, epoch)
    for start in range(0, rows, batch_size):
        yield order[start : start + batch_size]


def rank_rows(rows: Sequence[int], lengths: Sequence[int], rank: int, world_size: int) -> list[int]:
    """Returns one rank's share of a global batch, which has about as many tokens as any other's."""
    return sorted(rows, key=lambda row: lengths[row])[rank::world_size]


class Plan(NamedTuple):
    """Says what a micro-batch is made of."""

    rows: list[int]
    real: bool = True  # False: its only row keeps a rank in step with the others and counts for nothing
    share: float | None = None  # in training: tokens (pairs) that count, on average over its global batch


@dataclass(eq=False)
class Plans(DistributedSampler[Plan], SequentialSampler):
    """Yields the plans of one epoch.

    Lightning replaces any sampler but a `DistributedSampler` where there are several processes, and any but a
    `SequentialSampler` under `trainer.overfit_batches`.
    """

    count: int
    make: Callable[[], Iterable[Plan]]

    @override
    def __len__(self) -> int:
        return self.count

    @override
    def __iter__(self) -> Iterator[Plan]:  # type: ignore[override]
        return iter(self.make())


def train_plans(
    weights: list[int], lengths: list[int], batch_size: int, accumulate: int, rank: int, world_size: int, epoch: int
) -> Iterator[Plan]:
    """Plans the micro-batches of an epoch; every example exactly once over all ranks (D13).

    All ranks shuffle alike, cut into global batches, and take long and short rows of each. A global batch always
    becomes `accumulate` micro-batches per rank, formed by length. So does the smaller last one, so that no gradient is
    left over; a rank without rows for a micro-batch gets a row that counts for nothing. `weights` and `lengths` are
    those of `StageDataModule.train_sizes`.
    """
    for rows in global_batches(len(weights), batch_size, epoch):
        share = sum(weights[r] for r in rows) / (accumulate * world_size)
        mine = rank_rows(rows, lengths, rank, world_size)
        for group in split([lengths[r] for r in mine], accumulate):
            yield Plan([mine[n] for n in group] or rows[:1], bool(group), share)


@dataclass
class PlannedBatches(Dataset[Batch]):
    """Loads the micro-batch of a plan, in the process that trains or in a worker."""

    rows: datasets.Dataset
    collate: Collate

    @override
    def __getitem__(self, plan: Plan) -> Batch:
        batch = self.collate(self.rows.select(plan.rows).to_list(), plan.real) | {"indices": plan.rows}
        return batch if plan.share is None else {**batch, "share": plan.share, "rows": plan.rows if plan.real else []}


class Loader(DataLoader[Batch]):
    """Starts its workers when the first batch is asked for, since Lightning calls `iter()` before a run is restored."""

    @override
    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        yield from super().__iter__()

    def state_dict(self) -> dict[str, int]:
        """Returns nothing, as the Trainer knows the position, but tells Lightning that this loader can resume."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Ignores the state, which is empty."""


def host_masks(batch: Batch) -> dict[str, Tensor]:
    """Returns the masks of a batch on the CPU, where our DataModules keep them, else where they are.

    What is made of a mask on the CPU does not wait for a GPU.
    """
    return batch.get(HOST_MASKS, batch)


def loader(rows: datasets.Dataset, plans: Plans, collate: Collate, trainer: Trainer) -> Loader:
    """Creates the loader of a split, with workers and pinned memory if the Trainer's device is a GPU."""
    device = trainer.strategy.root_device.type
    return Loader(
        PlannedBatches(rows, collate),
        sampler=plans,
        batch_size=None,
        generator=torch.Generator(),  # else iter() would draw from the random state of the run
        num_workers=WORKERS.get(device, 0),
        worker_init_fn=_leave_signals_to_the_trainer,
        pin_memory=device == "cuda",
    )


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Makes a worker outlive Ctrl-C and a cluster's signals: the step that the Trainer finishes needs its batches.

    Only its parent ends it with SIGTERM, when the interpreter exits.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})

    def end() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()


def pad_queries(rows: list[dict[str, Any]], pad_id: int) -> Batch:
    """Pads queries on the left to the longest of them (D03): `queries (B, P)`, `query_mask (B, P)`."""
    ids, mask = pad_sequences([row["query_ids"] for row in rows], pad_id, "left")
    return {"queries": ids, "query_mask": mask}


def collate_joint(rows: list[dict[str, Any]], real: bool, pad_id: int) -> Batch:
    """Pads joint sequences on the right (D07): `input_ids (B, T)`, `attention_mask (B, T)`."""
    ids, mask = pad_sequences([row["input_ids"] for row in rows], pad_id)
    return {"input_ids": ids, "attention_mask": mask}
