"""Callbacks that watch or stop a run of PPO, for several files of tests."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from rlhf.sampling.rollout import Rollout


class Spy(Callback):
    """Keeps the rollout and the logged metrics of every update."""

    def __init__(self) -> None:
        self.rollouts: list[Rollout] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.rollouts.append(trainer.datamodule.last_rollout)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if "objective/kl" in trainer.callback_metrics:
            self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Stop(Exception):  # noqa: N818
    """What `StopAt` raises."""


class StopAt(Callback):
    """Stops a run before an epoch, which is an update of PPO."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            raise Stop


def fit_with_spy(
    trainer: Any, module: Any, data: Any, max_epochs: int = 2, callbacks: Any = (), fit: Any = None, **settings: Any
) -> Spy:
    """Trains a module without validation; returns what the spy saw.

    Args:
        trainer: makes a Trainer of `settings`.
        fit: further arguments of `Trainer.fit`.
    """
    spy, checkpointing = Spy(), any(isinstance(c, ModelCheckpoint) for c in callbacks)
    t = trainer(
        max_epochs=max_epochs, limit_val_batches=0, callbacks=[spy, *callbacks], enable_checkpointing=checkpointing,
        **settings,
    )  # fmt: skip
    t.fit(module, data, **(fit or {}))
    return spy
