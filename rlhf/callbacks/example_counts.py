"""Counts how often every example was seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Counts:
    """Examples seen in the current epoch and, in PPO, prompts seen since the start.

    Attributes:
        epochs: how many epochs were begun.
    """

    def __init__(self) -> None:
        self.epochs = 0
        self._rows: list[int] = []
        self._batches = 0
        self._prompts: Tensor | None = None

    def start(self) -> None:
        """An epoch begins."""
        self.epochs += 1
        self._rows, self._batches = [], 0

    def add(self, batch: Any) -> None:
        """Count the rows of a batch."""
        self._rows += batch["rows"] if isinstance(batch, dict) else batch.rows
        self._batches += 1

    def wrong(self, trainer: Any, module: Any) -> float:
        """Examples of all processes that were seen too often or, where the epoch was complete, too seldom."""
        whole = self._batches == len(trainer.train_dataloader)
        if module.schedule_interval == "step":
            total, times = len(trainer.datamodule.splits["train"]), 1
            counts = module.reduce_sum(self._histogram(self._rows, total, module))
            return float(((counts != times) if whole else (counts > times)).sum())
        total, times = len(trainer.datamodule.last_rollout), module.ppo.ppo_epochs
        counts = self._histogram(self._rows, total, module)
        wrong = ((counts != times) if whole else (counts > times)).sum()
        return float(module.reduce_sum(wrong)) + self._wrong_prompts(trainer, module)

    def _wrong_prompts(self, trainer: Any, module: Any) -> float:
        """Prompts come in shuffled passes: in a stretch of them, counts differ by 1, or by 2 where it began in one."""
        total = len(trainer.datamodule.splits["train"])
        new = module.reduce_sum(self._histogram(trainer.datamodule.last_prompts, total, module))
        self._prompts = new if self._prompts is None else self._prompts + new
        started_at_0 = self.epochs == trainer.current_epoch + 1
        return float((self._prompts > self._prompts.min() + (1 if started_at_0 else 2)).sum())

    @staticmethod
    def _histogram(rows: list[int], total: int, module: Any) -> Tensor:
        return torch.bincount(torch.tensor(rows, dtype=torch.long), minlength=total).to(module.device)
