"""Exports in Hugging Face format: what the next stage, and plain transformers, can load."""

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from pydantic import NonNegativeInt
from safetensors import SafetensorError
from typing_extensions import override

import rlhf
from rlhf import files
from rlhf.callbacks.checkpoint_io import failed_anywhere, find_last
from rlhf.errors import UserError
from rlhf.protocols import stage
from rlhf.strategies import full_precision


class Export(Callback):
    """Writes `<run folder>/export` at the end of training, whole or not at all.

    Args:
        every_n_epochs: also export into `export-<epoch>` after every so many epochs (PPO: updates); 0: only at the end.
    """

    def __init__(self, every_n_epochs: NonNegativeInt = 0) -> None:
        self.every_n_epochs = every_n_epochs
        self._done = False

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs and epoch % self.every_n_epochs == 0:
            self.export(trainer, pl_module, f"{files.EXPORT}-{epoch}")

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
    def export(trainer: Trainer, pl_module: LightningModule, name: str) -> Path:
        """Writes the export `name`, which replaces an older one when it is complete. Called on all ranks.

        Raises:
            UserError: rank 0 could not write it.
        """
        module, final = stage(pl_module), Path(trainer.default_root_dir) / name
        manifest = {
            "stage": type(pl_module).__name__,
            "version": rlhf.__version__,
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
        }
        error: Exception | None = None
        module.prepare_export()
        with full_precision(trainer, pl_module):
            try:
                if trainer.is_global_zero:
                    with files.replacing(final) as partial:
                        partial.mkdir()
                        module.save_export(partial)
                        (partial / files.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            except Exception as caught:
                error = caught
        if failed_anywhere(module, error is not None):
            if error is not None and not (isinstance(error, (OSError, SafetensorError)) or type(error) is Exception):
                raise error  # no full disk, for which tokenizers has a plain Exception
            last = find_last(Path(trainer.default_root_dir) / files.CHECKPOINTS)
            how = f"the checkpoint {last} is intact, and --ckpt_path last writes the export again" if last else "rerun"
            why = str(error).splitlines()[0] if error is not None else "see what the first process says"
            raise UserError(f"The export {final} could not be written: {why}. Make room; {how}.") from error
        return final
