"""A table of samples, to look at what a model writes."""

from typing import Any

import pandas as pd
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from pydantic import NonNegativeInt
from typing_extensions import override

from rlhf.callbacks.curves import log_table

COLUMNS = ("query", "response", "reference", "score")


class SampleTable(Callback):
    """Shows samples of validation (query, response, reference, score) on the console and in the loggers.

    Args:
        rows: how many samples.
        console: whether to print them too.
    """

    def __init__(self, rows: NonNegativeInt = 3, console: bool = True) -> None:
        self.rows = rows
        self.console = console
        self._samples: list[tuple[str, str, str, str]] = []

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if batch_idx == 0:
            self._samples = [
                (s["query"], s["response"], s["reference"], f"{s['score']:.2f}" if "score" in s else "")
                for s in outputs["samples"][: self.rows]
            ]

    @override
    @rank_zero_only
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._samples:
            return
        from rich.console import Console
        from rich.table import Table

        log_table(trainer, "samples", pd.DataFrame(self._samples, columns=[*COLUMNS]))
        if self.console:
            table = Table(*COLUMNS, show_lines=True)
            for query, response, reference, score in self._samples:
                end = query if len(query) <= 240 else "… " + query[-240:]
                table.add_row(end, response.strip(), reference.strip(), score)
            Console(markup=False, emoji=False, highlight=False).print(table)
