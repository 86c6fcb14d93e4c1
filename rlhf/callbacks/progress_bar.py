"""One progress bar for the whole stage, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class StageProgress(ProgressBar):
    """Counts optimizer steps, or PPO updates, and shows what was logged with `prog_bar=True`.

    Args:
        every_seconds: how often to print a line where there is no terminal.
    """

    def __init__(self, every_seconds: float = 15.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self._enabled = True
        self._bar: Progress | None = None
        self._task: Any = None
        self._last = 0.0

    def disable(self) -> None:
        """Show nothing (Lightning calls this on all ranks but one)."""
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the bar."""
        if not self._enabled:
            return
        console = Console()
        self._last = time.monotonic()
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[shown]}"), console=console)
            done, total = self._position(trainer, pl_module)
            self._task = self._bar.add_task(self._unit(pl_module), total=total, completed=done, shown="")
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Move on after every optimizer step."""
        if self._unit(pl_module) == "step":
            self._show(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move on after every PPO update: its metrics are there when the next one begins."""
        if self._unit(pl_module) == "update" and trainer.current_epoch > 0:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        if self._unit(pl_module) == "update":
            self._show(trainer, pl_module)
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @staticmethod
    def _unit(pl_module: Any) -> str:
        return "update" if getattr(pl_module, "schedule_interval", "step") == "epoch" else "step"

    def _position(self, trainer: Any, pl_module: LightningModule) -> tuple[int, int]:
        if self._unit(pl_module) == "update":
            return trainer.current_epoch, trainer.max_epochs or 0
        return trainer.global_step, int(trainer.estimated_stepping_batches)

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        done, total = self._position(trainer, pl_module)
        metrics = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if k != "v_num"}
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=done, shown=shown)
        elif time.monotonic() - self._last >= self.every_seconds or done == total:
            self._last = time.monotonic()
            print(f"{self._unit(pl_module)} {done}/{total}  {shown}", flush=True)
