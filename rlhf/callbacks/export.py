"""Exports in Hugging Face format: what the next stage, and plain transformers, can load."""

import json
import math
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from pydantic import NonNegativeInt
from safetensors import SafetensorError
from typing_extensions import override

import rlhf
from rlhf import files
from rlhf.callbacks.checkpoint_io import check_savable, failed_anywhere, find_last
from rlhf.errors import ROOM, OtherProcessError, UserError, full_disk
from rlhf.models.loading import BASES, fingerprints_of_bases
from rlhf.models.merging import merge_exports
from rlhf.protocols import Stage, stage
from rlhf.strategies import full_precision

BEST = f"{files.EXPORT}_best"


class Export(Callback):
    """Writes `<run folder>/export` at the end of training, whole or not at all.

    Args:
        every_n_epochs: also export into `export-<epoch>` after every so many epochs (PPO: updates); 0: only at the end.
        best: a curve of the validation, such as `validation/score`: also keep the best export by it in `export_best`.
            Lower is better if its name ends in `loss`, otherwise higher. `rlhf.json` there says which epoch it is from.
    """

    def __init__(self, every_n_epochs: NonNegativeInt = 0, best: str | None = None) -> None:
        self.every_n_epochs = every_n_epochs
        self.best = best
        self._so_far = -math.inf  # the best value, times -1 where lower is better
        self._done = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best is None:
            return
        if not trainer.enable_validation:
            raise UserError(
                f"trainer.callbacks: Export keeps the best export by {self.best}, but nothing is validated."
            )
        final = Path(trainer.default_root_dir) / BEST
        for folder in filter(files.is_complete, (final, files.previous_path(final))):
            known = read_manifest(folder)
            if known.get("metric") == self.best and known["steps"] <= trainer.global_step:  # else it is made again
                self._so_far = self._sign * known["value"]
                return

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best is None or trainer.state.fn != TrainerFn.FITTING:
            return
        metrics = trainer.callback_metrics
        if self.best not in metrics:
            names = ", ".join(sorted(name for name in metrics if name.startswith("validation")))
            raise UserError(f"trainer.callbacks: Export.best is {self.best}, and the validation has only {names}.")
        value = trainer.strategy.broadcast(metrics[self.best].item())
        if trainer.sanity_checking or not self._sign * value > self._so_far:  # NaN is never better
            return
        self._so_far = self._sign * value
        epochs = trainer.current_epoch + trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        folder = self.export(trainer, pl_module, BEST, epochs, metric=self.best, value=value)
        unit = "update" if stage(pl_module).kind == "ppo" else "epoch"
        rank_zero_info(f"The best so far, {self.best} {value:.4g} in {unit} {epochs}: {folder}")

    @property
    def _sign(self) -> int:
        return -1 if str(self.best).endswith("loss") else 1

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs and epoch % self.every_n_epochs == 0:
            self.export(trainer, pl_module, f"{files.EXPORT}-{epoch}", epoch)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.export(trainer, pl_module, files.EXPORT)
            self._done = True

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._done:  # a run that was resumed with nothing left to train; Lightning has moved it to the CPU
            pl_module.to(trainer.strategy.root_device)
            self.on_train_end(trainer, pl_module)

    @staticmethod
    def export(
        trainer: Trainer, pl_module: LightningModule, name: str, epochs: int | None = None, **notes: Any
    ) -> Path:
        """Writes the export `name`, which replaces an older one when it is complete. Called on all ranks.

        Args:
            epochs: how many are finished; by default as the Trainer counts them.
            notes: what else its manifest says.

        Raises:
            UserError: the weights are not finite, or rank 0 could not write them.
        """
        module, final = stage(pl_module), Path(trainer.default_root_dir) / name
        epochs = trainer.current_epoch if epochs is None else epochs
        error: Exception | None = None
        module.prepare_export()
        check_savable(trainer, module)
        with full_precision(trainer, pl_module):
            try:
                if trainer.is_global_zero:
                    write_export(module, final, epochs=epochs, steps=trainer.global_step, **notes)
            except Exception as caught:
                error = caught
        if failed_anywhere(module, error is not None):
            if error is not None and not (isinstance(error, OSError | SafetensorError) or full_disk(error)):
                raise error
            last = find_last(Path(trainer.default_root_dir) / files.CHECKPOINTS)
            how = f"the checkpoint {last} is intact, and --ckpt_path last writes the export again" if last else "rerun"
            if error is None:
                raise OtherProcessError(f"The export {final} could not be written, see what the first process says.")
            why = str(error).splitlines()[0]
            raise UserError(f"The export {final} could not be written: {why}. {ROOM}; {how}.") from error
        return final


def write_export(module: Stage, folder: Path, **notes: Any) -> None:
    """Writes an export whole or not at all; its manifest has `notes` too, such as `epochs`."""
    manifest = {"stage": type(module).__name__, "version": rlhf.__version__, **notes}
    with files.replacing(folder) as partial:
        partial.mkdir()
        module.save_export(partial)
        if module.lora is not None:
            merge_exports(partial, module.lora.export, module.tokenizer)
            manifest[BASES] = fingerprints_of_bases(partial)
        manifest[files.CHECKSUMS] = files.checksums(partial, files.WEIGHTS)
        (partial / files.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def read_manifest(export: Path) -> dict[str, Any]:
    """Reads what a complete export says of itself."""
    return json.loads((export / files.MANIFEST).read_text())
