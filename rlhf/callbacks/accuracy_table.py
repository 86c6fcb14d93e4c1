"""Accuracy of the reward model per split, batch and confidence, with counts and intervals (D22)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

if TYPE_CHECKING:
    import pandas as pd


def accuracy_table(pairs: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Accuracy of every split as a whole, per batch, and per confidence.

    Args:
        pairs: with `split`, `batch`, `confidence` (may be None) and `margin`, the reward of the chosen response minus
            that of the rejected one.

    Returns:
        Columns `split`, `group`, `value`, `pairs`, `accuracy`, and the 95% Wilson interval `low`, `high`.
    """
    import pandas as pd
    from scipy.stats import binomtest

    frame = pd.DataFrame(list(pairs))
    frame["correct"] = frame["margin"] > 0
    rows = []
    for split, part in frame.groupby("split"):
        groups = [("all", "", part)]
        for column in ("batch", "confidence"):
            groups += [(column, value, group) for value, group in part[part[column].notna()].groupby(column)]
        for kind, value, group in groups:
            right, n = int(group["correct"].sum()), len(group)
            interval = binomtest(right, n).proportion_ci(method="wilson")
            rows.append((split, kind, value, n, right / n, interval.low, interval.high))
    return pd.DataFrame(rows, columns=["split", "group", "value", "pairs", "accuracy", "low", "high"])


class AccuracyTable(Callback):
    """Collects the pairs of all validation splits and shows the table at the end."""

    def __init__(self) -> None:
        self._pairs: list[dict[str, Any]] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the pairs of an earlier split."""
        self._pairs = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Collects the pairs of a batch."""
        self._pairs += outputs["pairs"]

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather over ranks, print, and hand to TensorBoard."""
        pairs = self._gather()
        if trainer.sanity_checking or not trainer.is_global_zero or not pairs:
            return
        table = accuracy_table(pairs)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                text = "    " + table.to_string(index=False).replace("\n", "\n    ")
                logger.experiment.add_text("accuracy", text, trainer.global_step)
        self._print(table)

    on_test_end = on_validation_end

    def _gather(self) -> list[dict[str, Any]]:
        if not (dist.is_available() and dist.is_initialized()):
            return self._pairs
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._pairs)
        return [pair for part in gathered for pair in part]

    @staticmethod
    def _print(table: pd.DataFrame) -> None:
        from rich.console import Console
        from rich.table import Table

        shown = Table("split", "group", "pairs", "accuracy", "95% interval", title="Reward model")
        for row in table.itertuples():
            group = f"{row.group} {row.value}".strip()
            interval = f"{row.low:.3f} to {row.high:.3f}"
            shown.add_row(row.split, group, str(row.pairs), f"{row.accuracy:.3f}", interval)
        Console(markup=False, emoji=False, highlight=False).print(shown)
