"""Long work in parts: each in a file of its own, shared among processes, so that a killed run goes on from there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import UserError
from rlhf.evaluation.tables import parts_of, read_table, write_table

if TYPE_CHECKING:
    import pandas as pd

_PATIENCE = timedelta(days=7)  # the slowest process may take so much longer than the fastest


@dataclass(frozen=True)
class Ranks:
    """Which of several processes this is; one alone where `torchrun` started none.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """Until all processes are here."""
        import torch.distributed as dist

        if self.size == 1:
            return
        try:
            dist.barrier()
        except RuntimeError as error:
            raise UserError(
                "another of the processes stopped, see what it says; the same command goes on from there."
            ) from error

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Within, the first process works while the others wait; then these do the same and find what it cached."""
        if self.rank != 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes that `torchrun` started, which can wait for each other within."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


class Parts:
    """The parts of an unfinished table, so many rows each; the last one may have fewer.

    Part n is made by process n modulo their number. What a part holds must depend on its rows alone. Parts of another
    size, of an earlier run, are not used; they are deleted at the end.

    Args:
        output: file of the table.
        rows: of the whole table.
        size: rows of a part.
        processes: among which they are shared.
    """

    def __init__(self, output: Path, rows: int, size: int, processes: Ranks) -> None:
        self.output, self.size, self.processes = output, size, processes
        self.count = count_of(rows, size)

    def file(self, step: str, number: int) -> Path:
        """Where a part lies."""
        return parts_of(self.output) / f"{step}-by-{self.size}-{number:05d}.parquet"

    def make(self, step: str, title: str, prepare: Callable[[], Callable[[int], pd.DataFrame]]) -> None:
        """Make the parts of this process that are missing, then wait for the other processes.

        Args:
            step: name of the files.
            title: of the progress bar.
            prepare: loads what is needed, and returns what makes a part; not called where nothing is missing.
        """
        from rich.progress import track

        own = range(self.processes.rank, self.count, self.processes.size)
        missing = [number for number in own if not self.file(step, number).exists()]
        if missing:
            make = prepare()
            silent = self.processes.rank != 0
            for number in track(missing, title, len(own), len(own) - len(missing), transient=True, disable=silent):
                write_table(make(number), self.file(step, number))
        self.processes.wait()

    def read(self, step: str, number: int) -> pd.DataFrame:
        """A part that is made."""
        return read_table(self.file(step, number), "output")

    def merge(self, *steps: str, finish: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table) -> pd.DataFrame:
        """The finished table: the parts one below the other, the steps side by side. The parts are deleted.

        Args:
            steps: whose columns it has.
            finish: makes the last columns.
        """
        import pandas as pd

        if self.processes.rank == 0:
            stacked = [pd.concat([self.read(s, n) for n in range(self.count)], ignore_index=True) for s in steps]
            write_table(finish(pd.concat(stacked, axis=1)), self.output)
            shutil.rmtree(parts_of(self.output))
        self.processes.wait()
        return read_table(self.output, "output")


def count_of(rows: int, size: int) -> int:
    """How many parts so many rows have."""
    return -(-rows // size)


def slice_of(rows: list[Any], number: int, size: int) -> list[Any]:
    """The rows of a part."""
    return rows[number * size : (number + 1) * size]
