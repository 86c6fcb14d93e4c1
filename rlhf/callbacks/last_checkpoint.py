"""When the checkpoint of a run is written, so that a run that was stopped at any moment goes on to the same bits."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn

from rlhf import files
from rlhf.callbacks.checkpoint_io import (
    LAST,
    AtomicCheckpointIO,
    find_last,
    partial_path,
    publish,
    remove,
    save_together,
    sync_folder,
)
from rlhf.callbacks.epoch_results import EpochResults, collect
from rlhf.callbacks.resume import KEY, record
from rlhf.callbacks.stop_signal import StopSignal
from rlhf.errors import UserError

RESULTS = "epoch_results"


@contextmanager
def suppressed(errors: list[OSError]) -> Iterator[None]:
    """Within, errors of the operating system are kept for later."""
    try:
        yield
    except OSError as error:
        errors.append(error)


class LastCheckpoint(Callback):
    """Keeps `<run folder>/checkpoints/last.ckpt`, and saves before it stops when it is asked to (SIGTERM, SIGUSR1).

    It is written between two optimizer steps, or two PPO updates, when all curves up to there are written. A kill in
    the middle of writing leaves the one before it; when it can't be written (a full disk), training goes on with that.

    Args:
        every_n_epochs: epochs (PPO: updates) between two checkpoints.
        every_n_steps: optimizer steps between two checkpoints; not in PPO, which goes on at updates only.
    """

    def __init__(self, every_n_epochs: int = 1, every_n_steps: int = 200) -> None:
        if min(every_n_epochs, every_n_steps) < 1:
            raise UserError("every_n_epochs and every_n_steps of the callback LastCheckpoint must be at least 1.")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self._signal = StopSignal()
        self._saved = self._saved_epochs = 0
        self._within: Literal["epoch", "step"] | None = None
        self._record: dict[str, Any] = {}
        self._results: EpochResults | None = None

    @staticmethod
    def path(trainer: Trainer) -> Path:
        """Where it lies."""
        return Path(trainer.default_root_dir) / files.CHECKPOINTS / LAST

    # ----------------------------------------------------------------------------------------------------- when

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Files are written whole or not at all, those of other callbacks too."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """What all checkpoints of this run were made with."""
        self._record = record(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Listen. A run that goes on at the beginning of an epoch is not in the middle of one, whatever limits it."""
        self._saved, self._saved_epochs = trainer.global_step, trainer.current_epoch
        self._signal.listen()
        loop = trainer.fit_loop
        if loop.epoch_progress.current.ready == loop.epoch_progress.current.processed:
            loop.epoch_loop.restarting = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """After an epoch and all its curves."""
        asked = self._signal.agreed(trainer, pl_module)
        if asked or trainer.current_epoch % self.every_n_epochs == 0:
            self.save(trainer, pl_module, "epoch")
        if asked:
            unit = "update" if pl_module.schedule_interval == "epoch" else "epoch"
            self._stop(trainer, asked, f"after {unit} {trainer.current_epoch}")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step and its curves."""
        if batch_idx % trainer.accumulate_grad_batches:
            return
        asked = self._signal.agreed(trainer, pl_module)
        if pl_module.schedule_interval == "epoch":
            if asked and self._saved_epochs == trainer.current_epoch:  # else the update is finished, and saved
                self._stop(trainer, asked, f"in update {trainer.current_epoch + 1}, which will begin anew")
            return
        if batch_idx == 0:
            return
        if asked or trainer.global_step % self.every_n_steps == 0:
            self.save(trainer, pl_module, "step")
        if asked:
            self._stop(trainer, asked, f"after step {trainer.global_step}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        """The sums of an epoch go on."""
        if self._results is not None:
            self._results.merge(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The sums of an epoch are complete."""
        if self._results is not None:
            self._results.finish(trainer, pl_module)
            self._results = None

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """After the last epoch, before its export."""
        self.save(trainer, pl_module, "epoch")

    def _stop(self, trainer: Trainer, number: int, where: str) -> None:
        if trainer.is_global_zero:
            last = find_last(self.path(trainer).parent)
            found = f"Go on from {last} with --ckpt_path last." if last else "There is no checkpoint yet."
            print(f"\nStopped by {signal.Signals(number).name} {where}. {found}", flush=True)
        self._signal.leave(trainer, number)

    # ------------------------------------------------------------------------------------------------------ how

    def save(self, trainer: Trainer, module: Any, within: Literal["epoch", "step"]) -> None:
        """Write it, if there is something new. Called on all ranks, between two epochs or two steps."""
        if trainer.fast_dev_run or trainer.global_step == self._saved:  # type: ignore[attr-defined]
            return
        self._saved, self._saved_epochs, self._within = trainer.global_step, trainer.current_epoch, within
        final = self.path(trainer)
        target = partial_path(final) if isinstance(trainer.strategy, DeepSpeedStrategy) else final
        errors: list[OSError] = []
        with suppressed(errors):
            self._prepare(trainer, final, target)
        if not self._anywhere(module, errors):
            with suppressed(errors):
                save_together(trainer, target)
        if not self._anywhere(module, errors) and trainer.is_global_zero and target != final:
            with suppressed(errors):
                publish(target, final)
        self._within = None
        if self._anywhere(module, errors):
            self._warn(trainer, final, errors)

    @staticmethod
    def _prepare(trainer: Trainer, final: Path, target: Path) -> None:
        """The curves up to here are on the disk, and what an earlier process has left is not."""
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                sync_folder(getattr(logger, "log_dir", None))
            remove(partial_path(final))
            (final.parent if target == final else target).mkdir(parents=True, exist_ok=True)

    @staticmethod
    def _anywhere(module: Any, errors: list[OSError]) -> bool:
        return bool(module.reduce_max(torch.tensor(float(len(errors)), device=module.device)) > 0)

    @staticmethod
    def _warn(trainer: Trainer, final: Path, errors: list[OSError]) -> None:
        if trainer.is_global_zero:
            with suppressed([]):
                remove(partial_path(final))
            why = f": {errors[0]}" if errors else ""
            last = find_last(final.parent)
            before = f"The one before it is intact: {last}." if last else "There is none before it."
            rank_zero_warn(
                f"The checkpoint after step {trainer.global_step} could not be written{why}. {before} Training goes "
                "on; make room on the disk."
            )

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Counters as Lightning has them at the end of an epoch or a step, where it expects to be resumed."""
        checkpoint[KEY] = self._record
        if self._within is None:
            return
        loops = checkpoint["loops"]["fit_loop"]
        if self._within == "epoch":
            for counts in loops["epoch_progress"].values():
                counts["ready"] = counts["completed"]
            return
        progress = loops["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts["ready"] = counts["completed"]
            counts["completed"] -= 1
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        checkpoint[RESULTS] = collect(trainer)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take over the sums of an epoch that was begun."""
        if RESULTS in checkpoint:
            self._results = EpochResults(checkpoint[RESULTS], trainer.global_rank, trainer.world_size)
