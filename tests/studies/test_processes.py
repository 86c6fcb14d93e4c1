"""Stages as processes: how they end, what reaches them, and several at a time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf.studies.processes import Ended, StageProcesses

LONG = ["synthesize", "--sizes.pretraining=1000000"]


def long_stage(processes: StageProcesses, pool: ThreadPoolExecutor, folder: Path) -> Future[Ended]:
    """A stage that has just been started, and would run for minutes."""
    future = pool.submit(processes.run, [*LONG, f"--output={folder}"])
    while not processes.running and not future.done():
        time.sleep(0.01)
    return future


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_status_of_a_stage_tells_what_ended_it(number: signal.Signals, tmp_path: Path) -> None:
    """A signal that comes while a stage is just starting is not lost."""
    processes = StageProcesses()
    with processes.forwarded_signals(), ThreadPoolExecutor() as pool:
        future = long_stage(processes, pool, tmp_path)
        child = next(iter(processes.running))
        os.kill(os.getpid() if number == signal.SIGTERM else child.pid or 0, number)
        assert future.result(timeout=60).status == -number
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as stop:
            processes.run(["--help"])  # nothing starts any more
        assert stop.value.code == 128 + number


def test_several_threads_can_run_stages(tmp_path: Path) -> None:
    processes = StageProcesses()
    run: Callable[[int], Ended] = lambda n: processes.run(["--help"], tmp_path / f"{n % 3}.log")  # noqa: E731
    with ThreadPoolExecutor(3) as pool:
        ended = list(pool.map(run, range(24)))
    assert [e.status for e in ended] == [0] * 24
    assert all(0 < e.peak_gib < 4 and e.seconds > 0 for e in ended)
    assert (tmp_path / "0.log").read_text().count("usage: python train.py COMMAND") == 8
    assert processes.run(["nonsense"], tmp_path / "wrong.log").status == 2
    assert "unknown command 'nonsense'" in (tmp_path / "wrong.log").read_text()
