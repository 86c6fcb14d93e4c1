"""Accuracy of the reward model per split, batch and confidence, with counts and intervals (D22)."""

from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rlhf.callbacks.curves import log_table
from rlhf.evaluation.statistics import proportion


def accuracy_table(pairs: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Computes the accuracy of every split as a whole, per batch, and per confidence.

    Args:
        pairs: with `split`, `batch`, `confidence` (may be None) and `margin`, the reward of the chosen response minus
            that of the rejected one.

    Returns:
        Columns `split`, `group`, `value`, `pairs`, `accuracy`, and the 95% Wilson interval `low`, `high`.
    """
    frame = pd.DataFrame(list(pairs))
    frame["correct"] = frame["margin"] > 0
    rows = []
    for split, part in frame.groupby("split"):
        groups = [("all", "", part)]
        for column in ("batch", "confidence"):
            groups += [(column, value, group) for value, group in part.groupby(column) if value != ""]
        rows += [(split, kind, value, len(g), *proportion(g["correct"].mean(), len(g))) for kind, value, g in groups]
    return pd.DataFrame(rows, columns=["split", "group", "value", "pairs", "accuracy", "low", "high"])


class AccuracyTable(Callback):
    """Collects the pairs of all validation splits and shows the table at the end."""

    def __init__(self) -> None:
        self._pairs: list[dict[str, Any]] = []

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pairs = []

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._pairs += outputs["pairs"]

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parts: list[Any] = [self._pairs]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            dist.all_gather_object(parts, self._pairs)
        pairs = [pair for part in parts for pair in part]
        if trainer.sanity_checking or not trainer.is_global_zero or not pairs:
            return
        from rich.console import Console
        from rich.table import Table

        table = accuracy_table(pairs)
        log_table(trainer, "accuracy", table)
        shown = Table("split", "group", "pairs", "accuracy", "95% interval", title="Accuracy")
        for row in table.itertuples():
            group, interval = f"{row.group} {row.value}".strip(), f"{row.low:.3f} to {row.high:.3f}"
            shown.add_row(row.split, group, str(row.pairs), f"{row.accuracy:.3f}", interval)
        Console(markup=False, emoji=False, highlight=False).print(shown)

    on_test_start = on_validation_start
    on_test_batch_end = on_validation_batch_end
    on_test_end = on_validation_end
