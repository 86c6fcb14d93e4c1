"""Provides what our sides share: a Trainer that only trains, and a callback that looks at the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from throughput.record import Recorder, Row, Task


class TrainingClock(Callback):
    """Records every epoch, and the training in it by phases."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._mark: Any = None

    def known(self, trainer: Any, pl_module: Any) -> Row:
        """Returns what the row has beside times and memory."""
        raise NotImplementedError

    def _lap(self, phase: str | None = None) -> None:
        """Counts what has passed since the last mark as this phase."""
        now = self.recorder.now()
        if phase is not None:
            self.recorder.add(phase, self._mark, now)
        self._mark = now

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The optimizer is there."""
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._lap("optimizer"))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The end of one epoch is the start of the next."""
        self._finish(trainer, pl_module)
        self.recorder.start()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last epoch is over."""
        self._finish(trainer, pl_module)

    def _finish(self, trainer: Any, pl_module: Any) -> None:
        if self.recorder.running:
            self.recorder.stop(**self.known(trainer, pl_module))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A micro-batch is there."""
        self._lap()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Its loss is there."""
        self._lap("forward")

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Its gradients are there."""
        self._lap("backward")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Checks of the gradients, and the step, follow."""
        self._lap()


def quiet_trainer(task: Task, *callbacks: Callback) -> Trainer:
    """Makes a Trainer as a user has it, without what costs time beside training."""
    return Trainer(
        accelerator="gpu" if task.device == "cuda" else "cpu", devices=1, precision=task.precision,
        max_epochs=task.updates, log_every_n_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        default_root_dir=Path(task.folder) / "run", callbacks=list(callbacks),
    )  # fmt: skip
