"""Processes of stages: each runs one command of train.py, and is sent the signals that this process gets."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from rlhf.heap import peak_resident_gib

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


class Ended(NamedTuple):
    """What is known of a process that has ended.

    Attributes:
        status: its exit status; minus the number of the signal that ended it.
        seconds: how long it ran.
        peak_gib: the most memory that it held, without processes that it started; 0 where it was killed.
    """

    status: int
    seconds: float
    peak_gib: float


class StageProcesses:
    """Starts stages, and hands signals on to those that run, which save and stop."""

    def __init__(self) -> None:
        self.running: set[BaseProcess] = set()
        self.received = 0

    def run(self, words: list[str], log: Path | None = None) -> Ended:
        """Runs a command of train.py in a process of its own.

        Args:
            words: of the command line.
            log: what it prints is appended to this file.
        """
        context = start_method()
        peak = context.Value("d")
        child: Any = context.Process(target=_main, args=(words, log, peak))
        start = time.monotonic()
        child.start()
        self.running.add(child)
        try:
            if self.received:
                os.kill(child.pid, self.received)
            child.join()
        except BaseException:
            child.kill()
            raise
        finally:
            self.running.discard(child)
        return Ended(int(child.exitcode), time.monotonic() - start, peak.value)

    def check(self) -> None:
        """Ends this process, if it was sent a signal."""
        if self.received:
            print(f"Stopped by {signal.Signals(self.received).name}; the same command goes on from there.", flush=True)
            raise SystemExit(128 + self.received)

    @contextmanager
    def forwarded_signals(self) -> Iterator[None]:
        """Hands SIGTERM and SIGUSR1 on to the stages that run, within the context. In the main thread only."""
        self.received = 0
        before = {number: signal.signal(number, self._receive) for number in FORWARDED}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        self.received = number
        for child in list(self.running):
            if child.pid is not None and child.is_alive():
                os.kill(child.pid, number)


stage_processes = StageProcesses()


def start_method() -> Any:
    """Returns the multiprocessing context that starts the processes of stages.

    On Linux without a GPU, a stage is a fork of a process that has imported everything once, which saves every stage
    several seconds. CUDA and the system libraries of macOS don't survive a fork: there, a stage is a new interpreter.
    """
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlhf.preload"])
    return context


def _main(words: list[str], log: Path | None, peak: Any) -> None:
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)  # which the process that has imported everything ignores
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    sys.argv[1:] = words  # with which Lightning starts further processes
    try:
        runpy.run_module("rlhf", run_name="__main__")
    finally:
        peak.value = peak_resident_gib()
        atexit._run_exitfuncs()  # which multiprocessing leaves out; they delete temporary folders of libraries
