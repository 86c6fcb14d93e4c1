"""Runs TRL's PPOTrainer, unmodified: the functions that it calls are wrapped in a clock.

Its settings are its defaults (among them `local_rollout_forward_batch_size=64`) but for what both sides share, for the
EOS trick, and for what would cost it time: no samples, no checkpoints, no report, no recomputation of activations.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from throughput.record import PPOTask, Recorder, Row, work

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
MISSING_EOS_PENALTY = 1.0


class Clock:
    """Records the updates of a PPOTrainer.

    `sampling` is `batch_generation`; `values` are those of the value model and the log-probabilities of the sampled
    tokens; `reference` has those of the reference; `forward` ends where `backward` begins.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.trainer: Any = None
        self._phase = ""
        self._forward_start: Any = None
        self._queries: list[int] = []
        self._responses: list[int] = []

    def attach(self, trainer: Any) -> None:
        """Counts the tokens of a trainer's models, and times its optimizer and its backward passes."""
        self.trainer = trainer
        self.recorder.count(trainer.policy_model, trainer.value_model, trainer.ref_model, trainer.reward_model)
        trainer.optimizer.step = self._timed(trainer.optimizer.step, lambda *_: "optimizer")
        timed = self._timed(trainer.accelerator.backward, lambda *_: "backward")

        def backward(*args: Any, **kwargs: Any) -> Any:
            self.recorder.add("forward", self._forward_start, self.recorder.now())
            return timed(*args, **kwargs)

        trainer.accelerator.backward = backward

    def wrapped(self, ppo: Any) -> ExitStack:
        """Returns a context in which the functions that a PPOTrainer calls by these names are timed.

        Args:
            ppo: the module `trl.experimental.ppo.ppo_trainer`.
        """
        stack = ExitStack()
        for name in ("batch_generation", "forward", "get_reward", "selective_log_softmax", "truncate_response"):
            stack.enter_context(patch.object(ppo, name, getattr(self, f"_{name}")(getattr(ppo, name))))
        return stack

    def start(self) -> None:
        """Begins an update."""
        self._queries, self._responses = [], []
        self.recorder.start()

    def stop(self) -> None:
        """Ends an update."""
        self.recorder.stop(queries=self._queries, responses=self._responses)

    def _timed(self, function: Callable[..., Any], phase_of: Callable[..., str]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._phase = phase_of(*args)
            with self.recorder.phase(self._phase):
                return function(*args, **kwargs)

        return timed

    def _batch_generation(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def phase_of(model: Any, queries: Any, chunk: int, pad_id: int, config: Any) -> str:
            self._queries = (queries != pad_id).sum(1).tolist()
            return "sampling"

        return self._timed(function, phase_of)

    def _forward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        reference = self._timed(function, lambda *_: "reference")

        def forward(model: Any, *args: Any) -> Any:
            if model is self.trainer.ref_model:
                return reference(model, *args)
            self._forward_start = self.recorder.now()
            return function(model, *args)

        return forward

    def _get_reward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._timed(function, lambda model, *_: "reward" if model is self.trainer.reward_model else "values")

    def _selective_log_softmax(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Counts it, in the rollout, to the reference after the reference's forward, else to the sampled tokens."""
        rollout = self._timed(function, lambda *_: "reference" if self._phase == "reference" else "values")

        def selective_log_softmax(logits: Any, index: Any) -> Any:
            return (function if logits.requires_grad else rollout)(logits, index)

        return selective_log_softmax

    def _truncate_response(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def truncate_response(stop_id: int, pad_id: int, responses: Any) -> Any:
            truncated = function(stop_id, pad_id, responses)
            self._responses += (truncated != pad_id).sum(1).tolist()
            return truncated

        return truncate_response


def models(task: PPOTask) -> dict[str, Any]:
    """Makes what a PPOTrainer is given."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    policy, reward = Path(task.folder) / "policy", Path(task.folder) / "reward"
    tokenizer = AutoTokenizer.from_pretrained(policy, padding_side="left")
    lines = (Path(task.folder) / "prompts.jsonl").read_text().splitlines()
    prompts = Dataset.from_list([{"input_ids": tokenizer(json.loads(line)["prompt"])["input_ids"]} for line in lines])
    return {
        "processing_class": tokenizer,
        "model": AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        "ref_model": AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32),
        "value_model": AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32),
        "reward_model": AutoModelForSequenceClassification.from_pretrained(reward, dtype=torch.float32),
        "train_dataset": prompts,
        "eval_dataset": prompts,
    }


def measure(task: PPOTask, begin: Callable[[], None], end: Callable[[Row], None]) -> None:
    """Runs all updates of a task."""
    bf16 = task.precision == "bf16-mixed"
    # PPOTrainer makes its Accelerator without a precision, so `bf16` alone does nothing: it is read from here.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if bf16 else "no"
    import trl.experimental.ppo.ppo_trainer as ppo
    from transformers import TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    clock = Clock(Recorder(task.device, begin, end))

    class Turns(TrainerCallback):
        """Makes one update after the other."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            """The first begins."""
            clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """One is over; the next begins."""
            clock.stop()
            if state.global_step < task.updates:
                clock.start()

    with clock.wrapped(ppo):
        config = PPOConfig(
            output_dir=f"{task.folder}/trl", per_device_train_batch_size=task.micro, num_mini_batches=1, seed=1,
            gradient_accumulation_steps=task.batch // task.micro, total_episodes=task.batch * task.updates,
            num_ppo_epochs=task.ppo_epochs, response_length=task.response_length, temperature=task.temperature,
            learning_rate=task.learning_rate, stop_token="eos", missing_eos_penalty=MISSING_EOS_PENALTY, bf16=bf16,
            gradient_checkpointing=False, num_sample_generations=0, save_strategy="no", report_to="none",
            logging_steps=1, disable_tqdm=True, use_cpu=task.device == "cpu",
        )  # fmt: skip
        trainer = PPOTrainer(args=config, callbacks=[Turns()], **models(task))
        clock.attach(trainer)
        trainer.train()


if __name__ == "__main__":
    work(PPOTask, measure)
