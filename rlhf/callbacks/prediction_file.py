"""The file that `predict` writes."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from rlhf import files

PREDICTIONS = "predictions"


class PredictionFile(BasePredictionWriter):
    """Writes the rows of all batches to `<run folder>/predictions-<rank>.jsonl`, whole or not at all."""

    def __init__(self) -> None:
        super().__init__("batch")

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._file = Path(trainer.default_root_dir) / f"{PREDICTIONS}-{trainer.global_rank}.jsonl"
        self._partial = files.partial_path(self._file)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._partial.write_text("")

    @override
    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *args: Any, **kwargs: Any
    ) -> None:
        with self._partial.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in prediction)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        files.publish(self._partial, self._file)
        rank_zero_info(f"Predictions: {self._file}")
