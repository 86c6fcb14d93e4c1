"""What a run keeps of its own curves, whatever logger shows them, and tables for every logger."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from rlhf import files
from rlhf.protocols import stage, stage_data


class CurveLogger(Logger):
    """Appends what is logged to a file, a line of JSON each time.

    Not Lightning's `CSVLogger`: it holds rows back, and deletes those of an earlier process when a run is resumed.

    Args:
        folder: that of the run; the file is `curves.jsonl`.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / files.CURVES

    @property
    @override
    def name(self) -> str:
        return ""

    version = name

    @property
    @override
    def save_dir(self) -> str:
        return str(self.file.parent)

    log_dir = save_dir  # what lies there is on the disk before a checkpoint is written

    @override
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    @override
    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


class Curves(Callback):
    """Writes all curves of a training to `<run folder>/curves.jsonl`, beside what the Trainer's loggers do.

    A checkpoint knows how long the file was, so that a resumed run neither loses nor repeats a line.
    """

    def __init__(self) -> None:
        self._file = Path()
        self._size: int | None = None  # when the checkpoint was written
        self._total = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not any(isinstance(logger, (CurveLogger, DummyLogger)) for logger in trainer.loggers):
            logger = CurveLogger(trainer.default_root_dir)
            self._file, trainer.loggers = logger.file, [*trainer.loggers, logger]

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"size": self._file.stat().st_size if self._file.is_file() else 0, "total": self._total}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._size, self._total = state_dict["size"], state_dict.get("total", 0)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not where nothing is left to train: nobody would write again what came after the last checkpoint
        if self._size is not None and trainer.is_global_zero and self._file.is_file():
            os.truncate(self._file, min(self._size, self._file.stat().st_size))
        module = stage(pl_module)
        total = module.total_schedule_steps() * (stage_data(trainer).batch_size if module.kind == "ppo" else 1)
        if total != self._total:
            self._total = total
            for logger in (logger for logger in trainer.loggers if isinstance(logger, CurveLogger)):
                logger.log_metrics({f"{files.TOTAL}{module.kind}": total}, 0)


def log_table(trainer: Trainer, name: str, table: pd.DataFrame) -> None:
    """Hands a table to every logger of a Trainer that can show one. Called on rank 0."""
    step, columns = trainer.global_step, [str(column) for column in table]
    rows = table.astype(object).to_numpy().tolist()
    with_step = table.assign(step=step)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, _markdown([columns, ["---"] * len(columns), *rows]), step)
        elif isinstance(logger, WandbLogger):
            logger.log_table(name, columns=columns, data=rows, step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_table(logger.run_id, data=with_step, artifact_file=f"{name}.json")
        elif isinstance(logger, CSVLogger):
            file = Path(logger.log_dir) / f"{name}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            with_step.to_csv(file, mode="a", header=not file.exists(), index=False)


def _markdown(rows: Sequence[Sequence[object]]) -> str:
    cells = [[str(cell).replace("\n", "<br>").replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
