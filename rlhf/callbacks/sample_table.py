"""Tables of samples, where people would rather look than read."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only


class SampleTable(Callback):
    """Shows samples of validation (query, response, reference, score) on the console and as TensorBoard text.

    Args:
        rows: how many samples.
        console: whether to print them too.
    """

    def __init__(self, rows: int = 3, console: bool = True) -> None:
        self.rows = rows
        self.console = console
        self._samples: list[dict[str, Any]] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keep the first samples of the split."""
        if batch_idx == 0:
            self._samples = outputs["samples"][: self.rows]

    @rank_zero_only
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show them."""
        if not self._samples:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", self.markdown(), trainer.global_step)
        if self.console:
            self.print()

    def markdown(self) -> str:
        """The table as Markdown."""
        cells = [[s["query"], s["response"], s["reference"], _score(s)] for s in self._samples]
        lines = ["| query | response | reference | score |", "|---|---|---|---|"]
        lines += ["| " + " | ".join(c.replace("\n", "<br>").replace("|", "\\|") for c in row) + " |" for row in cells]
        return "\n".join(lines)

    def print(self) -> None:
        """The table on the console; of a query only its end."""
        from rich.console import Console
        from rich.table import Table

        table = Table("query", "response", "reference", "score", show_lines=True)
        for s in self._samples:
            query = s["query"] if len(s["query"]) <= 240 else "… " + s["query"][-240:]
            table.add_row(query, s["response"].strip(), s["reference"].strip(), _score(s))
        Console(markup=False, emoji=False, highlight=False).print(table)


def _score(sample: dict[str, Any]) -> str:
    return f"{sample['score']:.2f}" if "score" in sample else ""
