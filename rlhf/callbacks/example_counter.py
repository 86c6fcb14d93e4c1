"""Counts how often every example is seen."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from rlhf.protocols import PPOStage, Stage, ppo_stage, rollout_data, stage, stage_data


class ExampleCounter:
    """Counts the examples of the current epoch and, in PPO, the prompts since the start.

    Attributes:
        epochs: how many epochs were begun.
    """

    def __init__(self) -> None:
        self.epochs = 0
        self._rows: list[int] = []
        self._batches = 0
        self._prompts = torch.zeros(())

    def start(self) -> None:
        """Begins an epoch."""
        self.epochs += 1
        self._rows, self._batches = [], 0

    def add(self, batch: Any) -> None:
        """Counts the rows of a batch."""
        self._rows += batch["rows"] if isinstance(batch, dict) else batch.rows
        self._batches += 1

    def count_wrong(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Counts the examples of all ranks that were seen too often or, in a complete epoch, too seldom."""
        if stage(pl_module).kind == "ppo":
            return self._count_episodes(trainer, ppo_stage(pl_module))
        module = stage(pl_module)
        counts = module.reduce_sum(_histogram(self._rows, len(stage_data(trainer).splits["train"]), module))
        return float(self._wrong(counts, 1, trainer).sum())

    def _count_episodes(self, trainer: Trainer, module: PPOStage) -> float:
        """Counts the episodes of each rank's own rollout, and prompts, which come in shuffled passes over all.

        In a stretch of such passes, counts differ by 1, or by 2 if it began in the middle of one.
        """
        data = rollout_data(trainer)
        counts = _histogram(self._rows, len(data.last_rollout), module)
        wrong = module.reduce_sum(self._wrong(counts, module.ppo.ppo_epochs, trainer).sum())
        self._prompts = self._prompts + module.reduce_sum(
            _histogram(data.last_prompts, len(data.splits["train"]), module)
        )
        started_at_0 = self.epochs == trainer.current_epoch + 1
        return float(wrong + (self._prompts > self._prompts.min() + (1 if started_at_0 else 2)).sum())

    def _wrong(self, counts: Tensor, times: int, trainer: Trainer) -> Tensor:
        whole = self._batches == len(trainer.train_dataloader)  # type: ignore[arg-type]
        return counts != times if whole else counts > times


def _histogram(rows: list[int], total: int, module: Stage) -> Tensor:
    return torch.bincount(torch.tensor(rows, dtype=torch.long), minlength=total).to(module.device)
