"""The command `together` of driver.py, for test_heartbeat.py: something happens to one of several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rlhf import heartbeat
from rlhf.callbacks.checkpoint_io import verify
from rlhf.errors import UserError
from rlhf.sampling.vllm_engine import Engine

PIDS: list[Any] = [None, None, None]


def stop() -> None:
    """A process that does nothing any more, and cannot be ended by SIGTERM."""
    os.kill(os.getpid(), signal.SIGSTOP)


def kill() -> None:
    """A process that the system has ended."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """A driver that never returns, while threads go on."""
    time.sleep(1000)


def fail() -> None:
    """What the user can mend."""
    raise UserError("the reward function is wrong.")


def bug() -> None:
    """What nobody has thought of."""
    raise ValueError("unthought of")


def work() -> None:
    """A pause of all processes; then long work of one, first in small steps, then of its engine, then on a disk."""
    pids = " ".join(map(str, PIDS))
    subprocess.Popen(["sh", "-c", f"kill -STOP {pids}; sleep 10; kill -CONT {pids}"])
    for _ in range(50):
        time.sleep(0.2)
    engine: Any = object.__new__(Engine)
    engine._connection, other = multiprocessing.Pipe()
    threading.Timer(10, other.send, [(None, "sampled")]).start()
    assert engine.answer() == "sampled"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "last.ckpt"
        torch.save({"weight": torch.zeros(3)}, file)
        whole = zipfile.ZipFile.testzip

        def slowly(archive: zipfile.ZipFile) -> str | None:
            time.sleep(10)
            return whole(archive)

        zipfile.ZipFile.testzip = slowly  # type: ignore[method-assign]
        verify(file)
    print("worked", flush=True)


def together(event: str, rank: int) -> None:
    """Something happens to a process while the others wait for it."""
    own, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dist.init_process_group("gloo", rank=own, world_size=size)
    heartbeat.start(own, size, lambda: "the work of the test", minutes=0.13 if event == "work" else 0.08)
    dist.all_gather_object(PIDS, os.getpid())
    if own == rank:
        globals()[event]()
    dist.barrier()
