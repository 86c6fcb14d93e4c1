"""SIGTERM, which clusters and clouds send before they take a machine away: the loop stops when it can."""

from __future__ import annotations

import signal
import threading
from typing import Any, NoReturn

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """Remembers a signal.

    Lightning's own handler starts a collective from inside the signal, whatever the processes are doing; and it stops
    in the middle of an optimizer step.
    """

    def __init__(self) -> None:
        self._number = 0

    def listen(self) -> None:
        """In the place of Lightning's handler, which is put back when the Trainer is done."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        self._number = number

    def agreed(self, trainer: Any, module: Any) -> int:
        """The signal that any of the processes was sent, 0 where none was. Called on all ranks."""
        if trainer.world_size == 1:
            return self._number
        return int(module.reduce_max(torch.tensor(self._number, device=module.device)).item())

    @staticmethod
    def leave(trainer: Any, number: int) -> NoReturn:
        """End this process with the status of a signal.

        Processes that Lightning has started end with 0, or it would kill the first one, which started them.
        """
        launched = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
        raise SIGTERMException(0 if launched and trainer.local_rank > 0 else 128 + number)
