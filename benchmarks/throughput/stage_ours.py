"""Runs our SFT and reward model as a user has them, with a callback that looks at the clock; an epoch is one step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch import LightningDataModule

from rlhf.data.comparisons import PreferenceDataModule
from rlhf.data.demonstrations import SFTDataModule
from rlhf.data.sources import Source
from rlhf.modules.reward import RewardModule
from rlhf.modules.settings import Optimization
from rlhf.modules.sft import SFTModule
from rlhf.modules.stage_module import StageModule
from throughput.clock import TrainingClock, quiet_trainer
from throughput.record import TRAINING, Recorder, Row, StageTask, work


class Clock(TrainingClock):
    """Records every optimizer step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """The model is there."""
        super().on_train_start(trainer, pl_module)
        model = getattr(pl_module.model, "model", pl_module.model)
        self.recorder.count(model, pad_id=pl_module.tokenizer.pad_token_id)

    def known(self, trainer: Any, pl_module: Any) -> Row:
        """Returns real tokens and loss."""
        return {"real": int(self.recorder.real), "loss": trainer.callback_metrics[f"loss/{pl_module.kind}"].item()}


def stage(task: StageTask) -> tuple[StageModule, LightningDataModule]:
    """Makes the module and its data."""
    folder = Path(task.folder)
    optimization = Optimization(learning_rate=task.learning_rate, schedule="linear")
    settings: dict[str, Any] = {"batch_size": task.batch, **(task.data or {"micro_batch_size": task.micro})}
    if task.stage == "sft":
        module = SFTModule(str(folder / "policy"), loss_on=task.loss_on, optimization=optimization)
        return module, SFTDataModule(Source(str(folder / "demonstrations.jsonl")), **settings)
    comparisons = Source(str(folder / "comparisons.jsonl"))
    return RewardModule(str(folder / "reward"), optimization=optimization), PreferenceDataModule(
        comparisons, **settings
    )


def measure(task: StageTask, begin: Callable[[], None], end: Callable[[Row], None]) -> None:
    """Runs all steps of a task."""
    L.seed_everything(1, verbose=False)
    quiet_trainer(task, Clock(Recorder(task.device, begin, end, TRAINING))).fit(*stage(task))


if __name__ == "__main__":
    work(StageTask, measure)
