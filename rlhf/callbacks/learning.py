"""Looks whether a stage learns anything, and says so if not (rlhf/evaluation/symptoms.py)."""

import json
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from rlhf import files
from rlhf.data.loaders import HOST_MASKS
from rlhf.evaluation import symptoms
from rlhf.protocols import Stage, ppo_stage, rollout_data, stage

ROWS = 32  # of the first step, whose loss is measured again


class Learning(Callback):
    """Warns once of each sign that a stage learns nothing; those that are true are in `<run folder>/findings.json`.

    Attributes:
        found: name of a symptom -> what to say of it.
        parameters: of the model, or of the policy; 0 with an optimizer that is unlike AdamW.
        learning_rate: its highest one.

    Args:
        quiet: only find, neither warn nor write; equal scores count in one update.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._reset()

    def _reset(self) -> None:
        self.found: dict[str, str] = {}
        self.parameters, self.learning_rate, self.adapters = 0, 0.0, False
        self._first: list[dict[str, Any]] = []  # micro-batches of the first step, of rank 0
        self._losses: list[float] = []  # of their rows, before it
        self._counts = [0.0, 0.0]  # validation: successes, out of
        self._ends: deque[list[float]] = deque(maxlen=4)  # per rollout: responses with EOS, out of
        self._kl: deque[float] = deque(maxlen=5)  # per rollout
        self._trained = 0.0  # updates of the policy, in those at the full learning rate
        self._equal = 0  # episodes in a row whose scores are equal within their update

    def judge(self, name: str, text: str | None) -> None:
        """Keeps what was found under a name, or that it is true no longer; warns of what is new."""
        if text is None:
            self.found.pop(name, None)
        elif name in self.found:
            self.found[name] = text
        else:
            self.found[name] = text
            if not self.quiet:
                rank_zero_warn(text)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # before a checkpoint is loaded
        self._reset()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        groups = trainer.optimizers[0].param_groups
        if all("betas" in group for group in groups):  # AdamW, or one of its family
            self.adapters = stage(pl_module).lora is not None
            trained = stage(pl_module).parameter_groups()[0]
            whole = pl_module.parameters() if self.adapters else trained
            self.parameters = sum(p.numel() for p in whole)
            self.learning_rate = max(group.get("initial_lr", group["lr"]) for group in groups)
            self.judge(
                "learning_rate", symptoms.unusual_learning_rate(self.learning_rate, self.parameters, self.adapters)
            )
            self._write(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        module = stage(pl_module)
        if module.kind == "ppo":
            if batch_idx == 0:
                self._look_at_rollout(trainer)
        elif trainer.is_global_zero and trainer.global_step == 0 and len(self._losses) < ROWS:
            losses = module.row_losses(batch)
            if losses is not None:
                kept = {name: value for name, value in batch.items() if name != HOST_MASKS}
                self._first.append(move_data_to_device(kept, "cpu"))
                self._losses += losses.tolist()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and self._first and trainer.global_step == stage(pl_module).total_schedule_steps() // 2:
            self._judge_loss(trainer, stage(pl_module))

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counts = [0.0, 0.0]

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        kind = stage(pl_module).kind
        if kind == "sft":
            seen = [sample["has_eos"] for sample in outputs["samples"] if "has_eos" in sample]
        elif kind in ("reward", "dpo"):
            seen = [pair["margin"] > 0 for pair in outputs["pairs"] if pair["split"] == "validation"]
        else:
            return
        self._counts = [self._counts[0] + sum(seen), self._counts[1] + len(seen)]

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = stage(pl_module)
        if module.kind == "ppo" or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if 2 * trainer.global_step < module.total_schedule_steps():
            return
        good, number = module.reduce_sum(torch.tensor(self._counts, device=module.device)).tolist()
        if module.kind == "sft":
            self.judge("no_eos", symptoms.hardly_any_eos(good, number, "SFT"))
        else:
            self.judge("chance", symptoms.at_chance(good, number))
        self._write(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._first:
            self._judge_loss(trainer, stage(pl_module))
        self._write(trainer)

    def _judge_loss(self, trainer: Trainer, module: Stage) -> None:
        if trainer.global_step < symptoms.STEPS:
            return
        losses: list[float] = []
        for batch in self._first:
            found = module.row_losses(move_data_to_device(batch, module.device))
            losses += [] if found is None else found.tolist()
        self.judge("loss", symptoms.unmoved_loss(self._losses, losses, trainer.global_step))
        self._write(trainer)

    def _look_at_rollout(self, trainer: Trainer) -> None:
        """Judges the episodes of all ranks, before anything is learnt from them."""
        module, rollout = ppo_stage(trainer), rollout_data(trainer).last_rollout
        difference = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0)
        number = torch.tensor(float(len(rollout)), device=module.device)
        sums = torch.stack([rollout.has_eos.sum().float(), number, 0.5 * (difference**2).sum()])
        ends, episodes, kl = module.reduce_sum(sums).tolist()
        largest, negative = module.reduce_max(torch.stack([rollout.scores.max(), -rollout.scores.min()])).tolist()
        self._ends.append([ends, episodes])
        self._kl.append(kl / episodes)
        self._equal = self._equal + int(episodes) if largest + negative <= 1e-6 * max(1.0, abs(largest)) else 0
        if module.ppo.missing_eos_score is not None:
            ended, sampled = (sum(column) for column in zip(*self._ends, strict=True))
            self.judge("no_eos", symptoms.hardly_any_eos(ended, sampled, "the rollouts"))
        equal = None
        if self._equal >= (2 if self.quiet else symptoms.EPISODES):
            found = f"The scores of the last {self._equal} episodes are all equal ({largest:.3f} in update "
            equal = symptoms.sentences("equal_scores", f"{found}{trainer.current_epoch + 1}).")
        self.judge("equal_scores", equal)
        no_kl = None
        if module.starts_at_reference and self._trained >= 5 and max(self._kl) < symptoms.NO_KL:
            found = f"The KL of the policy stays at {self._kl[-1]:.1e} nats per response, after "
            no_kl = symptoms.sentences("no_kl", f"{found}{trainer.current_epoch} updates.")
        self.judge("no_kl", no_kl)
        policy = trainer.optimizers[0].param_groups[0]  # at 0 while the critic learns alone
        self._trained += policy["lr"] / policy.get("initial_lr", policy["lr"] or 1.0)
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if self.quiet or trainer.fast_dev_run or not trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        file = Path(trainer.default_root_dir) / files.FINDINGS
        if self.found:
            text = json.dumps(self.found, indent=2) + "\n"
            if not file.is_file() or file.read_text() != text:
                files.write_text(file, text)
        else:
            file.unlink(missing_ok=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "found": self.found, "first": self._first, "losses": self._losses, "ends": list(self._ends),
            "kl": list(self._kl), "trained": self._trained, "equal": self._equal,
        }  # fmt: skip

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.found, self._first, self._losses = (state_dict[name] for name in ("found", "first", "losses"))
        self._ends.extend(state_dict["ends"])
        self._kl.extend(state_dict["kl"])
        self._trained, self._equal = state_dict["trained"], state_dict["equal"]
