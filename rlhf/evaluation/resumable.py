"""Tables that are made in parts: a killed run resumes with the missing parts, and several processes share them."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import torch.distributed as dist

from rlhf import heartbeat
from rlhf.errors import OtherProcessError
from rlhf.evaluation.tables import claim, owned_table, parts_of, read_table, write_table

Row = dict[str, Any]
_PATIENCE = timedelta(days=7)  # the slowest process may take so much longer than the fastest


@dataclass(frozen=True)
class Ranks:
    """The number of this process and the number of processes; one alone unless `torchrun` started several."""

    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """Waits until all processes are here."""
        try:
            if self.size > 1:
                dist.barrier()
        except RuntimeError as error:
            raise OtherProcessError(
                "another process stopped, see its message; the same command resumes from the finished parts."
            ) from error

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Lets the first process run the block while the others wait; then they run it and find what it cached."""
        if self.rank != 0:
            self.wait()
        yield
        if self.rank == 0:
            self.wait()


@contextmanager
def ranks(output: str) -> Iterator[Ranks]:
    """Connects the processes that `torchrun` started, within the block; the first of them owns the table."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        with owned_table(output):
            yield Ranks()
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    heartbeat.start(dist.get_rank(), size, lambda: "at work")
    with owned_table(output) if dist.get_rank() == 0 else nullcontext():
        yield Ranks(dist.get_rank(), size)
    heartbeat.leave()  # before the store is gone, which an error needs to reach the others
    dist.destroy_process_group()


class Parts:
    """A table that is made in parts of `size` rows, each with its own file until all are finished.

    Process p makes every part whose number is p modulo the number of processes. A part must depend on its rows alone.
    Parts of another size, from an earlier run, are ignored and deleted at the end. A finished table is kept.
    """

    def __init__(self, output: str, settings: Mapping[str, Any], rows: list[Row], size: int, processes: Ranks) -> None:
        self.output, self.rows, self.size, self.processes = Path(output), rows, size, processes
        self.finished = claim(self.output, settings, write=processes.rank == 0)
        self.numbers = range(-(-len(rows) // size))
        self.steps: list[str] = []

    def make(self, step: str, title: str, prepare: Callable[[], Callable[[list[Row]], pd.DataFrame]]) -> None:
        """Makes the columns of a step in all missing parts of this process, then waits for the other processes.

        If a part is missing, `prepare` loads what the step needs, and returns the function that makes the columns from
        the rows of a part, which have the columns of the earlier steps, too.
        """
        from rich.progress import track

        if self.finished:
            return
        own = self.numbers[self.processes.rank :: self.processes.size]
        missing = [number for number in own if not self._file(step, number).exists()]
        if missing:
            make = prepare()
            silent = self.processes.rank != 0
            for number in track(missing, title, len(own), len(own) - len(missing), transient=True, disable=silent):
                write_table(make(self._rows(number)), self._file(step, number))
        self.steps.append(step)
        self.processes.wait()

    def merge(self, finish: Callable[[pd.DataFrame], pd.DataFrame] = lambda table: table) -> pd.DataFrame:
        """Writes the table, with the last columns by `finish`, deletes the parts, and returns the table."""
        if not self.finished and self.processes.rank == 0:
            columns = [pd.concat([self._read(s, n) for n in self.numbers], ignore_index=True) for s in self.steps]
            write_table(finish(pd.concat(columns, axis=1)), self.output)
            shutil.rmtree(parts_of(self.output))
            print(f"{len(self.rows)} {self.steps[0]}: {self.output}")
        self.processes.wait()
        return read_table(self.output, "output")

    def _file(self, step: str, number: int) -> Path:
        return parts_of(self.output) / f"{step}-by-{self.size}-{number:05d}.parquet"

    def _read(self, step: str, number: int) -> pd.DataFrame:
        return read_table(self._file(step, number), "output")

    def _rows(self, number: int) -> list[Row]:
        rows = self.rows[number * self.size : (number + 1) * self.size]
        for step in self.steps:
            made = self._read(step, number).to_dict("records")
            rows = [{**row, **columns} for row, columns in zip(rows, made, strict=True)]
        return rows
