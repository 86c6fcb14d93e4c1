"""Callbacks for test_resume.py, named on its command lines: what can happen to a process."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import signal
import threading
from typing import Any, Literal

import torch
from lightning.pytorch import Callback

from rlhf import heartbeat
from rlhf.errors import UserError

Event = Literal[
    "kill", "terminate", "terminate_pipeline", "kill_while_writing", "full_disk", "full_disk_at_last", "small_disk",
    "stop", "fail",
]  # fmt: skip


class Happens(Callback):
    """Something happens in a hook, when it is called for the n-th time.

    Args:
        event: what.
        hook: name of a hook of a Callback.
        number: of the call.
        rank: which process it happens to; by default to each.
    """

    def __init__(self, event: Event, hook: str, number: int, rank: int | None = None) -> None:
        self.event, self.left, self.rank = event, number, rank
        if hook == "__init__":  # before the processes are connected
            if os.environ.get("LOCAL_RANK", "0") == str(rank):
                getattr(self, event)()
            return
        setattr(self, hook, self._count)

    def _count(self, trainer: Any, *args: Any) -> None:
        self.left -= 1
        if self.left == 0 and self.rank in (None, trainer.global_rank):
            getattr(self, self.event)()

    @staticmethod
    def kill() -> None:
        """kill -9."""
        os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def stop() -> None:
        """kill -STOP: as a process whose driver hangs."""
        os.kill(os.getpid(), signal.SIGSTOP)

    @staticmethod
    def fail() -> None:
        """What the user can mend."""
        raise UserError("the reward function is wrong.")

    @staticmethod
    def terminate() -> None:
        """kill."""
        os.kill(os.getpid(), signal.SIGTERM)

    @staticmethod
    def terminate_pipeline() -> None:
        """kill of the process that has started this one, which hands it on."""
        came = threading.Event()
        handler = signal.getsignal(signal.SIGTERM)

        def receive(number: int, frame: Any) -> None:
            handler(number, frame)  # type: ignore[operator]
            came.set()

        signal.signal(signal.SIGTERM, receive)
        os.kill(multiprocessing.parent_process().pid, signal.SIGTERM)
        came.wait()

    def kill_while_writing(self) -> None:
        """kill -9 when half of the next file is on the disk."""
        self._replace_save(self.kill)

    def full_disk(self) -> None:
        """The next file can't be written to its end."""

        def fail() -> None:
            torch.save = whole
            raise OSError(28, "No space left on device")

        whole = torch.save
        self._replace_save(fail)

    @staticmethod
    def small_disk() -> None:
        """From now on, this process can write no large file."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))

    @staticmethod
    def full_disk_at_last() -> None:
        """The small file that DeepSpeed's first process writes after all others can't be written."""
        from deepspeed.runtime.engine import DeepSpeedEngine

        whole = DeepSpeedEngine._copy_recovery_script

        def fail(*args: Any) -> None:
            DeepSpeedEngine._copy_recovery_script = whole
            raise OSError(28, "No space left on device")

        DeepSpeedEngine._copy_recovery_script = fail

    @staticmethod
    def _replace_save(then: Any) -> None:
        whole = torch.save

        def half(state: Any, target: Any, *args: Any, **kwargs: Any) -> None:
            content = io.BytesIO()
            whole(state, content, *args, **kwargs)
            file = target if hasattr(target, "write") else open(target, "wb")  # noqa: SIM115
            file.write(content.getvalue()[: len(content.getvalue()) // 2])
            file.flush()
            then()

        torch.save = half


class ShortSilence(Callback):
    """From here on a fifteenth of --silence is enough: all processes have started, which can take long."""

    def on_train_start(self, *_: Any) -> None:
        beat: Any = heartbeat._heartbeat
        beat.minutes, beat.patience = beat.minutes / 15, beat.patience // 15
