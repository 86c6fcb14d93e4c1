"""When the checkpoint of a run is written, such that a run stopped at any moment resumes to the same bits."""

import signal
import threading
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from pydantic import PositiveInt
from typing_extensions import override

from rlhf import files
from rlhf.callbacks.checkpoint_io import LAST, AtomicCheckpointIO, failed_anywhere, find_last, save_together
from rlhf.callbacks.resume import KEY, record
from rlhf.protocols import Stage, stage


class LastCheckpoint(Callback):
    """Keeps `<run folder>/checkpoints/last.ckpt`, and saves before it stops when it is asked to (SIGTERM, SIGUSR1).

    It is written between two optimizer steps, or two PPO updates, after all curves up to there. A kill while it is
    written leaves the one before it; if it cannot be written (a full disk), training continues with that one.

    Args:
        every_n_epochs: epochs (PPO: updates) between two checkpoints.
        every_n_steps: optimizer steps between two checkpoints; not in PPO, which resumes at updates only.
    """

    def __init__(self, every_n_epochs: PositiveInt = 1, every_n_steps: PositiveInt = 200) -> None:
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self._path = self._partial = Path()
        self._signal = 0
        self._saved = self._saved_epochs = 0
        self._within: Literal["epoch", "step"] | None = None
        self._record: dict[str, Any] = {}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Checkpoints of other callbacks, too, are written whole or not at all.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._path = Path(trainer.default_root_dir) / files.CHECKPOINTS / LAST
        self._partial = trainer.strategy.broadcast(files.partial_path(self._path))
        self._record = record(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved, self._saved_epochs = trainer.global_step, trainer.current_epoch
        if threading.current_thread() is threading.main_thread():
            # Lightning's handler, which it puts back at the end, starts a collective from inside the signal, whatever
            # the processes are doing, and stops in the middle of an optimizer step.
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._remember)
        progress: Any = trainer.fit_loop.epoch_progress.current
        if progress.ready == progress.processed:  # at the beginning of an epoch, whatever limits the run
            trainer.fit_loop.epoch_loop.restarting = False

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Here, all curves of the epoch before are written.
        module = stage(pl_module)
        asked = self._agreed_signal(trainer, module)
        due = module.kind != "ppo" and trainer.global_step % self.every_n_steps == 0
        if asked or due or trainer.current_epoch % self.every_n_epochs == 0:
            self._save(trainer, module, "epoch")
        if asked:
            unit = "update" if module.kind == "ppo" else "epoch"
            self._stop(trainer, asked, f"after {unit} {trainer.current_epoch}")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Here, all curves of the optimizer step before are written.
        if batch_idx % trainer.accumulate_grad_batches:
            return
        module = stage(pl_module)
        asked = self._agreed_signal(trainer, module)
        if module.kind == "ppo":
            if asked and self._saved_epochs == trainer.current_epoch:  # else the update is finished, and saved
                self._stop(trainer, asked, f"in update {trainer.current_epoch + 1}, which will start again")
            return
        if batch_idx == 0:
            return
        if asked or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer, module, "step")
        if asked:
            self._stop(trainer, asked, f"after step {trainer.global_step}")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, stage(pl_module), "epoch")

    def _remember(self, number: int, frame: Any) -> None:
        self._signal = number

    def _agreed_signal(self, trainer: Trainer, module: Stage) -> int:
        """Returns the signal that any process received, 0 if none did. Called on all ranks."""
        one = trainer.world_size == 1
        return self._signal if one else int(module.reduce_max(torch.tensor(self._signal, device=module.device)).item())

    def _stop(self, trainer: Trainer, number: int, where: str) -> NoReturn:
        if trainer.is_global_zero:
            last = find_last(self._path.parent)
            found = f"Resume from {last} with --ckpt_path last." if last else "There is no checkpoint yet."
            print(f"\nStopped by {signal.Signals(number).name} {where}. {found}", flush=True)
        # Processes that Lightning started end with 0; otherwise it would kill the first one, which started them.
        launched = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
        raise SIGTERMException(0 if launched and trainer.local_rank > 0 else 128 + number)

    def _save(self, trainer: Trainer, module: Stage, within: Literal["epoch", "step"]) -> None:
        """Writes a checkpoint if there is something new. Called on all ranks, between two epochs or two steps."""
        if trainer.fast_dev_run or trainer.global_step == self._saved:  # type: ignore[attr-defined]
            return
        self._saved, self._saved_epochs, self._within = trainer.global_step, trainer.current_epoch, within
        in_parts = isinstance(trainer.strategy, DeepSpeedStrategy)
        target = self._partial if in_parts else self._path

        def prepare() -> None:
            if trainer.is_global_zero:
                for folder in filter(None, (getattr(logger, "log_dir", None) for logger in trainer.loggers)):
                    for path in Path(folder).glob("*"):  # the curves up to here
                        files.sync(path)
                files.remove(self._partial)
                (target if in_parts else target.parent).mkdir(parents=True, exist_ok=True)

        def publish() -> None:
            if in_parts and trainer.is_global_zero:
                files.publish(target, self._path)

        errors: list[OSError] = []
        for step in (prepare, lambda: save_together(trainer, target), publish):
            with files.suppress_os_errors(errors):
                step()
            if failed_anywhere(module, bool(errors)):
                self._warn(trainer, errors)
                break
        self._within = None

    def _warn(self, trainer: Trainer, errors: list[OSError]) -> None:
        if trainer.is_global_zero:
            with files.suppress_os_errors():
                files.remove(self._partial)
            why = f": {errors[0]}" if errors else ""
            last = find_last(self._path.parent)
            before = f"The one before it is intact: {last}." if last else "There is none before it."
            rank_zero_warn(
                f"The checkpoint after step {trainer.global_step} could not be written{why}. {before} Training "
                "continues; make room on the disk."
            )

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Counters as Lightning has them at the end of an epoch or a step, where it expects to be resumed.
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
