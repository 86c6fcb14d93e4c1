"""Runs commands of train.py in processes of their own, and forwards signals to them."""

import atexit
import multiprocessing
import os
import runpy
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rlhf import files

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)


class Ended(NamedTuple):
    """How a process ended."""

    status: int  # its exit status, or minus the number of the signal that ended it
    seconds: float
    peak_gib: float  # the most memory that it held, without processes that it started; 0 if it was killed


class StageProcesses:
    """Starts stages, and forwards signals to the running ones, which then save and stop."""

    def __init__(self) -> None:
        self.running: set[Any] = set()
        self.received = 0
        self._lock = threading.Lock()  # multiprocessing reads the end of every child whenever one starts or is joined

    def warm_up(self) -> None:
        """Starts the process that stages are forked from, which imports while this one goes on."""
        if _context().get_start_method() == "forkserver":
            from multiprocessing import forkserver

            with _without_main():
                forkserver.ensure_running()

    def run(self, words: list[str], log: Path | None = None) -> Ended:
        """Runs a command line of train.py in a process of its own, and appends its output to a log.

        Raises:
            SystemExit: this process has received a signal.
        """
        self.check()
        context = _context()
        peak = context.Value("d", lock=False)
        child = context.Process(target=_main, args=(words, log, peak))
        start = time.monotonic()
        with self._lock, _without_main():
            child.start()
        self.running.add(child)
        try:
            if self.received:
                os.kill(child.pid, self.received)
            wait([child.sentinel])
        except BaseException:  # Ctrl-C: the stage saves and stops, unless it is asked again
            child.terminate()
            child.join()
            raise
        finally:
            self.running.discard(child)
        with self._lock:
            child.join()
        return Ended(int(child.exitcode), time.monotonic() - start, peak.value)

    def check(self) -> None:
        """Exits if this process has received a signal."""
        if self.received:
            print(f"Stopped by {signal.Signals(self.received).name}; the same command resumes.", flush=True)
            raise SystemExit(128 + self.received)

    @contextmanager
    def forwarded_signals(self) -> Iterator[None]:
        """Forwards SIGTERM and SIGUSR1 to the running stages, within the context. For the main thread only."""
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
                os.kill(child.pid, number)


stage_processes = StageProcesses()


@contextmanager
def _without_main() -> Iterator[None]:
    """Keeps a new process from running the script of the user again, which multiprocessing would do."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _context() -> Any:
    """Returns the multiprocessing context of stages.

    On Linux without a GPU, a stage is a fork of a process that has imported everything once, which saves every stage
    several seconds. CUDA and the system libraries of macOS do not survive a fork: there, a stage is a new interpreter.
    """
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlhf.studies.preload"])
    return context


def _main(words: list[str], log: Path | None, peak: Any) -> None:
    from rlhf.hardware import peak_resident_gib  # imports torch, which preload.py must not do before it blocks signals

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the pipeline, which stops this process by SIGTERM
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)  # the process that was forked blocks them
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if "datasets" in sys.modules:  # it looked for a terminal when it was imported
            sys.modules["datasets"].disable_progress_bars()
    os.environ[files.TYPED] = shlex.join(sys.argv[1:])  # multiprocessing hands on those of the pipeline
    sys.argv[1:] = words  # Lightning starts further processes with them
    try:
        runpy.run_module("rlhf", run_name="__main__", alter_sys=True)
    finally:
        peak.value = peak_resident_gib()
        atexit._run_exitfuncs()  # multiprocessing leaves them out; they delete temporary folders of libraries


def _stop_with_parent() -> None:
    """Sends this stage SIGTERM, on which it saves and stops, when the process that started it is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def end_with_parent(every: float = 1.0) -> None:
    """Ends this process, one of several that train together, when the one that started it is gone.

    Without it, a process waits for the missing one, for half an hour or for ever.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
