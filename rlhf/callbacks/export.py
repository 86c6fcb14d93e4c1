"""Exports in Hugging Face format: what the next stage, and plain transformers, can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

import rlhf
from rlhf.strategies import full_precision

MANIFEST = "rlhf.json"


def is_complete(folder: Path) -> bool:
    """Whether an export was finished: its manifest is written last."""
    return (folder / MANIFEST).is_file()


class Export(Callback):
    """Writes `<run folder>/export` at the end of training, all or nothing.

    Args:
        every_n_epochs: also export into `export-<epoch>` after every so many epochs (PPO: updates); 0: only at the end.
    """

    def __init__(self, every_n_epochs: int = 0) -> None:
        self.every_n_epochs = every_n_epochs
        self._done = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """An export during the run."""
        epoch = trainer.current_epoch + 1
        if self.every_n_epochs and epoch % self.every_n_epochs == 0:
            self.export(trainer, pl_module, f"export-{epoch}")

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The export at the end."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.export(trainer, pl_module, "export")
            self._done = True

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The export of a run that was resumed when it had nothing left to train; Lightning has moved it to the CPU."""
        if not self._done:
            pl_module.to(trainer.strategy.root_device)
            self.on_train_end(trainer, pl_module)

    @staticmethod
    def export(trainer: Trainer, pl_module: Any, name: str) -> Path:
        """Write an export beside its place and move it there when it is complete. Called on all ranks."""
        final = Path(trainer.default_root_dir) / name
        pl_module.prepare_export()
        with full_precision(trainer, pl_module):
            if trainer.is_global_zero:
                partial = final.with_name(f".{name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                pl_module.save_export(partial)
                manifest = {
                    "stage": type(pl_module).__name__,
                    "version": rlhf.__version__,
                    "epochs": trainer.current_epoch,
                    "steps": trainer.global_step,
                }
                (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
        trainer.strategy.barrier("export")
        return final
