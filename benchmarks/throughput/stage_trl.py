"""Runs TRL's SFTTrainer and RewardTrainer, unmodified: a callback and two wrapped functions look at the clock.

Their settings are their defaults but for what both sides share, and for what would cost them time: no checkpoints, no
report, no recomputation of activations.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from throughput.record import TRAINING, Recorder, Row, StageTask, work

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


def timed(recorder: Recorder, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the same function, whose time is a phase's."""

    @wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with recorder.phase(phase):
            return function(*args, **kwargs)

    return inner


def config(task: StageTask) -> dict[str, Any]:
    """Settings of both trainers: those that our side has, too, and no more work than training."""
    bf16 = task.precision == "bf16-mixed"
    return {
        "output_dir": f"{task.folder}/trl", "per_device_train_batch_size": task.micro, "max_steps": task.updates,
        "gradient_accumulation_steps": task.batch // task.micro, "learning_rate": task.learning_rate, "bf16": bf16,
        "lr_scheduler_type": "linear", "weight_decay": 0.01, "adam_epsilon": 1e-5, "max_grad_norm": 0.0, "seed": 1,
        "gradient_checkpointing": False, "save_strategy": "no", "report_to": "none", "logging_steps": 1,
        "disable_tqdm": True, "use_cpu": task.device == "cpu", **task.trl,
    }  # fmt: skip


def trainer(task: StageTask, callback: Any) -> Any:
    """Makes the trainer of a stage, as its documentation has it."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    sft = task.stage == "sft"
    folder = Path(task.folder) / ("policy" if sft else "reward")
    lines = (Path(task.folder) / ("demonstrations.jsonl" if sft else "comparisons.jsonl")).read_text().splitlines()
    given: dict[str, Any] = {
        "train_dataset": Dataset.from_list([json.loads(line) for line in lines]),
        "processing_class": AutoTokenizer.from_pretrained(folder),
        "callbacks": [callback],
    }
    if sft:
        args: Any = SFTConfig(**{"completion_only_loss": task.loss_on == "response", **config(task)})
        return SFTTrainer(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), args, **given)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    return RewardTrainer(model, RewardConfig(**config(task)), **given)


def measure(task: StageTask, begin: Callable[[], None], end: Callable[[Row], None]) -> None:
    """Runs all steps of a task."""
    from transformers import TrainerCallback

    recorder = Recorder(task.device, begin, end, TRAINING)

    class Turns(TrainerCallback):
        """Takes one optimizer step after the other; a step is over when its loss is logged."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """The first begins."""
            recorder.start()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            """The gradients are there."""
            self.gradients = recorder.now()

        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            """The weights are new."""
            recorder.add("optimizer", self.gradients, recorder.now())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            """A step is over; the next begins."""
            if "loss" not in logs:  # the summary of the training
                return
            recorder.stop(real=int(recorder.real), loss=float(logs["loss"]))
            if state.global_step < task.updates:
                recorder.start()

    trained = trainer(task, Turns())
    recorder.count(trained.model, pad_id=trained.processing_class.pad_token_id)
    trained.compute_loss = timed(recorder, "forward", trained.compute_loss)
    trained.accelerator.backward = timed(recorder, "backward", trained.accelerator.backward)
    trained.train()


if __name__ == "__main__":
    work(StageTask, measure)
