"""Our PPO: the module, the DataModule and the Trainer as a user has them, with a callback that looks at the clock.

python -m throughput.ours TASK          # a worker of ppo_throughput.py; TASK: JSON
python -m throughput.ours TASK TRACE    # profile the last update instead
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import Callback, Trainer

from rlhf.data.prompts import RolloutDataModule
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.modules.ppo import PPOModule
from rlhf.modules.settings import Optimization, PPOSettings
from throughput.record import PHASES, Recorder, Row, Task, work


def data_settings(task: Task) -> dict[str, Any]:
    """Settings of the DataModule: as given, else as many rows at a time as TRL takes."""
    return task.data or {"micro_batch_size": task.micro, "rollout_batch_size": 64}


class Clock(Callback):
    """Records every update. The phases of the rollout are the module's own; those of the training are timed here."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._mark: Any = None

    def _lap(self, phase: str | None = None) -> None:
        """What has passed since the last mark was this phase."""
        now = self.recorder.now()
        if phase is not None:
            self.recorder.add(phase, self._mark, now)
        self._mark = now

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """All models are there."""
        self.recorder.count(pl_module.actor_critic.policy, pl_module.actor_critic.critic.model)
        with pl_module.reference.on(pl_module.device) as reference:
            self.recorder.count(reference)
        with pl_module.reward_model.on(pl_module.device) as reward_model:
            self.recorder.count(reward_model.model)
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._lap("optimizer"))

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The end of one update is the start of the next."""
        self._finish(trainer, pl_module)
        self.recorder.start()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last update is over."""
        self._finish(trainer, pl_module)

    def _finish(self, trainer: Any, pl_module: Any) -> None:
        if not self.recorder.running:
            return
        self.recorder.seconds.update({k: v for k, v in pl_module.seconds.items() if k in PHASES})
        rollout = trainer.datamodule.last_rollout
        self.recorder.stop(rollout.query_mask.sum(1).tolist(), rollout.lengths.tolist())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A micro-batch is there."""
        self._lap()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Its loss is there."""
        self._lap("forward")

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Its gradients are there."""
        self._lap("backward")

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Checks of the gradients, and the step, follow."""
        self._lap()


class Profile(Callback):
    """The PyTorch profiler over the last update.

    Args:
        updates: how many there are.
        file: of the trace, for chrome://tracing; the operators are printed.
    """

    def __init__(self, updates: int, file: Path) -> None:
        self.updates, self.file = updates, file
        self.profiler: Any = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The last update begins."""
        if trainer.current_epoch == self.updates - 1:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """It is over."""
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.file))
        sort = "self_cuda_time_total" if pl_module.device.type == "cuda" else "self_cpu_time_total"
        print(self.profiler.key_averages().table(sort_by=sort, row_limit=25, max_name_column_width=45))


def measure(task: Task, begin: Callable[[], None], end: Callable[[Row], None], *callbacks: Callback) -> None:
    """Run all updates of a task."""
    L.seed_everything(1, verbose=False)
    folder = Path(task.folder)
    ppo = PPOSettings(
        response_length=task.response_length, temperature=task.temperature, ppo_epochs=task.ppo_epochs, minibatches=1,
        **task.ppo,
    )  # fmt: skip
    module = PPOModule(
        str(folder / "policy"),
        reward_path=str(folder / "reward"),
        ppo=ppo,
        optimization=Optimization(learning_rate=task.learning_rate, schedule="linear"),
    )
    data = RolloutDataModule(
        Source(str(folder / "prompts.jsonl")),
        batch_size=task.batch,
        text=TextFormat(max_query_length=max(512, task.longest_query)),
        **data_settings(task),
    )
    trainer = Trainer(
        accelerator="gpu" if task.device == "cuda" else "cpu", devices=1, precision=task.precision,
        max_epochs=task.updates, log_every_n_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder / "run",
        callbacks=[*callbacks, Clock(Recorder(task.device, begin, end))],
    )  # fmt: skip
    trainer.fit(module, data)


def profile(task: Task, file: Path) -> None:
    """Print the operators that take most of the last update, and write its trace."""
    torch.set_num_threads(task.threads)
    measure(task, lambda: None, lambda row: None, Profile(task.updates, file))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        profile(Task(**json.loads(sys.argv[1])), Path(sys.argv[2]))
    else:
        work(measure)
