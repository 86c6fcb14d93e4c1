"""Processes of stages: each runs one command of train.py, and is sent the signals that this process gets."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, cast

from rlhf.hardware import peak_resident_gib

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


class Ended(NamedTuple):
    """What is known of a process that has ended.

    Attributes:
        status: its exit status; minus the number of the signal that ended it.
        seconds: how long it ran.
        peak_gib: the most memory that it held, without that of processes that it started; 0 where it was killed.
    """

    status: int
    seconds: float
    peak_gib: float


class StageProcesses:
    """Starts stages, and hands signals on to those that run, which save and stop."""

    def __init__(self) -> None:
        self.running: set[BaseProcess] = set()
        self.received = 0
        self._lock = threading.Lock()  # multiprocessing reads the end of every child whenever one starts or is joined

    def run(self, words: list[str], log: Path | None = None) -> Ended:
        """Runs a command of train.py in a process of its own, unless this one was sent a signal.

        Args:
            words: of the command line.
            log: what it prints is appended to this file.
        """
        self.check()
        context = start_method()
        peak = context.Value("d", lock=False)
        child: Any = context.Process(target=_main, args=(words, log, peak))
        start = time.monotonic()
        with self._lock:
            child.start()
        self.running.add(child)
        try:
            if self.received:
                os.kill(child.pid, self.received)
            wait([child.sentinel])
        except BaseException:
            child.kill()
            raise
        finally:
            self.running.discard(child)
        with self._lock:
            child.join()
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
            with suppress(ProcessLookupError):
                os.kill(cast(int, child.pid), number)


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
    context.set_forkserver_preload(["rlhf.studies.preload"])
    return context


def _main(words: list[str], log: Path | None, peak: Any) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)  # which the process that has imported everything blocks
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if "datasets" in sys.modules:  # which looked for a terminal when it was imported
            sys.modules["datasets"].disable_progress_bars()
    sys.argv[1:] = words  # with which Lightning starts further processes
    try:
        runpy.run_module("rlhf", run_name="__main__", alter_sys=True)
    finally:
        peak.value = peak_resident_gib()
        atexit._run_exitfuncs()  # which multiprocessing leaves out; they delete temporary folders of libraries
