"""Runs our PPO: module, DataModule and Trainer as a user has them, with a callback that looks at the clock.

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
from lightning.pytorch import Callback

from rlhf.data.prompts import RolloutDataModule
from rlhf.data.sources import Source
from rlhf.data.texts import TextFormat
from rlhf.models.adapters import LoRA
from rlhf.modules.ppo import PPOModule
from rlhf.modules.settings import Optimization, PPOSettings
from throughput.clock import TrainingClock, quiet_trainer
from throughput.record import PHASES, PPOTask, Recorder, Row, work


class Clock(TrainingClock):
    """Records every update. The phases of the rollout are the module's own."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """All models are there."""
        super().on_train_start(trainer, pl_module)
        self.recorder.count(pl_module.actor_critic.policy, pl_module.actor_critic.critic.model)
        with pl_module.reference.on(pl_module.device) as reference:
            self.recorder.count(reference)
        with pl_module.reward_model.on(pl_module.device) as reward_model:
            self.recorder.count(reward_model.model)

    def known(self, trainer: Any, pl_module: Any) -> Row:
        """Lengths of the episodes."""
        self.recorder.seconds.update({k: v for k, v in pl_module.seconds.items() if k in PHASES})
        rollout = trainer.datamodule.last_rollout
        return {"queries": rollout.query_mask.sum(1).tolist(), "responses": rollout.lengths.tolist()}


class Profile(Callback):
    """Runs the PyTorch profiler over the last update.

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


def measure(task: PPOTask, begin: Callable[[], None], end: Callable[[Row], None], *callbacks: Callback) -> None:
    """Runs all updates of a task."""
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
        lora=None if task.lora is None else LoRA(**task.lora),
        quantization=task.quantization,
    )
    data = RolloutDataModule(
        Source(str(folder / "prompts.jsonl")),
        batch_size=task.batch,
        text=TextFormat(max_query_length=max(512, task.longest_query)),
        **(task.data or {"micro_batch_size": task.micro, "rollout_batch_size": 64}),  # as many rows as TRL takes
    )
    quiet_trainer(task, *callbacks, Clock(Recorder(task.device, begin, end))).fit(module, data)


def profile(task: PPOTask, file: Path) -> None:
    """Prints the operators that take most of the last update, and writes its trace."""
    torch.set_num_threads(task.threads)
    measure(task, lambda: None, lambda row: None, Profile(task.updates, file))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        profile(PPOTask(**json.loads(sys.argv[1])), Path(sys.argv[2]))
    else:
        work(PPOTask, measure)
