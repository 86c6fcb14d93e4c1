"""What `predict` returns, as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info


class PredictionFile(BasePredictionWriter):
    """Writes the rows of every batch to `<run folder>/predictions-<rank>.jsonl`."""

    def __init__(self) -> None:
        super().__init__("batch")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a new file."""
        self._file = Path(trainer.default_root_dir) / f"predictions-{trainer.global_rank}.jsonl"
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_text("")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append."""
        with self._file.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where it is."""
        rank_zero_info(f"Predictions: {self._file}")
