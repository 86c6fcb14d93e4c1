"""One progress bar for the whole stage, or plain lines where there is no terminal."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from typing_extensions import override

from rlhf.errors import NonNegative
from rlhf.protocols import stage

BAR_SECONDS = 0.2  # between two looks at the metrics where there is a terminal


class StageProgress(ProgressBar):
    """Counts optimizer steps, or PPO updates, and shows their loss and what was logged with `prog_bar=True`.

    Args:
        every_seconds: how often to print a line where there is no terminal.
    """

    def __init__(self, every_seconds: NonNegative = 15.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self._enabled = True
        self._bar: Progress | None = None
        self._task: Any = None
        self._last = 0.0

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        console = Console()
        self._last = time.monotonic()
        if self._enabled and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[shown]}"), console=console)
            self._task = self._bar.add_task("", shown="")
            self._bar.start()
            self._last = 0.0
            self._show(trainer, pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if stage(pl_module).kind != "ppo":
            self._show(trainer, pl_module)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The metrics of an update are there when the next one begins.
        if stage(pl_module).kind == "ppo" and trainer.current_epoch > 0:
            self._show(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if stage(pl_module).kind == "ppo":
            self._show(trainer, pl_module)
        if self._bar is not None:
            self._bar.stop()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        if stage(pl_module).kind == "ppo":
            unit, done, total = "update", trainer.current_epoch, trainer.max_epochs or 0
        else:
            unit, done, total = "step", trainer.global_step, int(trainer.estimated_stepping_batches)
        every = self.every_seconds if self._bar is None else BAR_SECONDS
        if time.monotonic() - self._last < every and done < total:  # to read the metrics is to wait for the device
            return
        self._last = time.monotonic()
        metrics = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}
        # Of losses with `prog_bar=True` Lightning would wait for the device in every micro-batch.
        metrics |= {
            k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("loss/") and k.endswith("_step")
        }
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        if self._bar is not None:
            self._bar.update(self._task, description=unit, completed=done, total=total, shown=shown)
        else:
            print(f"{unit} {done}/{total}  {shown}", flush=True)
