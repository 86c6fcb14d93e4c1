"""Checks what must hold while a stage trains (docs/details.md), and logs it as curves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from rlhf.callbacks.dropout import active_dropout
from rlhf.callbacks.example_counts import Counts
from rlhf.callbacks.findings import Finding, tolerance
from rlhf.callbacks.rollout_checks import measure_rollout
from rlhf.errors import UserError
from rlhf.ops.masking import masked_moments

Severity = Literal["off", "warn", "error"]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprints(tensors: Iterable[Tensor]) -> Tensor:
    """One number per tensor, the same where the bits are the same; `(K,)` int64 on the CPU."""
    sums = [t.detach().contiguous().view(_BITS[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return torch.stack([s.cpu() for s in sums])


def _is_deepspeed(trainer: Any) -> bool:
    """Whether an engine holds the gradients, in pieces."""
    return hasattr(trainer.model, "get_global_grad_norm")


class Invariants(Callback):
    """Measures what must hold, logs it as `invariants/<name>`, and warns or stops where it does not hold.

    Each argument but the last is a severity: `off` does not measure, `warn` says it once and goes on, `error` stops the
    run before its next checkpoint is written. The message says what was found, what usually causes it, and which
    setting to look at.

    Args:
        ratio: the PPO ratio is 1 before the first step of each update (D33).
        first_kl: policy and reference agree before the first update (D24).
        first_value: values equal rewards before the first update, where the critic starts from the reward model (D24).
        demonstration_reward: demonstrations have mean reward 0 (D21).
        padding_side: the reward does not depend on the side of the padding (D20); ten times its tolerance is an error
            under `warn` too.
        kl: the KL estimate is not negative beyond its noise (D28).
        kl_ceiling: the KL stays below `highest_kl` (D28).
        ranks: all processes have the same weights (D12).
        dropout: it is off (D10).
        finite: losses and gradients are finite (D35).
        finite_rewards: rewards are finite, before anything is learnt from them (D31).
        once_per_epoch: each example is seen once per epoch over all processes (D13).
        highest_kl: nats per response.
    """

    def __init__(
        self,
        ratio: Severity = "warn",
        first_kl: Severity = "warn",
        first_value: Severity = "warn",
        demonstration_reward: Severity = "warn",
        padding_side: Severity = "warn",
        kl: Severity = "warn",
        kl_ceiling: Severity = "warn",
        ranks: Severity = "error",
        dropout: Severity = "error",
        finite: Severity = "error",
        finite_rewards: Severity = "error",
        once_per_epoch: Severity = "error",
        highest_kl: float = 100.0,
    ) -> None:
        self.severity: dict[str, Severity] = {
            "ratio": ratio, "first_kl": first_kl, "first_value": first_value, "kl": kl, "kl_ceiling": kl_ceiling,
            "demonstration_reward": demonstration_reward, "padding_side": padding_side, "ranks": ranks,
            "dropout": dropout, "finite": finite, "finite_rewards": finite_rewards, "once_per_epoch": once_per_epoch,
        }  # fmt: skip
        self.highest_kl = highest_kl
        self.findings: dict[str, Finding] = {}
        self._said: set[str] = set()
        self._bad_losses = torch.zeros(0)
        self._counts = Counts()

    # --------------------------------------------------------------------------------------------------- judgement

    def on(self, name: str) -> bool:
        """Whether this is to be measured."""
        return self.severity[name] != "off"

    def judge(self, module: Any, finding: Finding) -> None:
        """Log a finding, which is the same on all processes, and act on it."""
        if not self.on(finding.name):
            return
        known = self.findings.get(finding.name)
        if known is None or known.holds:
            self.findings[finding.name] = finding
        name = f"invariants/{finding.name}"
        module.log(name, finding.value, on_step=False, on_epoch=True, reduce_fx="max", sync_dist=True, batch_size=1)
        self.act(finding)

    def act(self, finding: Finding) -> None:
        """Warn, or stop the run, where an invariant does not hold; a value that is no number always stops it."""
        if finding.holds:
            return
        if self.severity[finding.name] == "error" or not finding.value <= finding.fatal:
            raise UserError(f'{finding} Where that is intended, set {finding.name} of Invariants to "off".')
        if finding.name not in self._said:
            self._said.add(finding.name)
            rank_zero_warn(f"{finding} This is said once; the curve invariants/{finding.name} goes on.")

    # --------------------------------------------------------------------------------------------------- the hooks

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Nothing is known yet."""
        self.findings, self._said, self._counts = {}, set(), Counts()
        self._bad_losses = torch.zeros((), device=pl_module.device)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """At the start of the run, what all processes must have in common; at every epoch, that dropout is off."""
        if not self._counts.epochs:
            frozen = [p for model in pl_module.frozen_models for p in model.parameters()]
            self._check_ranks(trainer, pl_module, [*pl_module.parameters(), *frozen])
            if trainer.current_epoch == 0:
                self._check_demonstrations(pl_module)
        if self.on("dropout"):
            self.judge(pl_module, Finding("dropout", float(active_dropout(pl_module)), 0))
        self._counts.start()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """The first batch of an epoch; for PPO, the rollout before anything is learnt from it."""
        if batch_idx > 0:
            return
        limits = tolerance(trainer.precision)
        if pl_module.schedule_interval == "epoch":
            rollout = trainer.datamodule.last_rollout
            for finding in measure_rollout(rollout, pl_module, trainer.current_epoch, limits, self.highest_kl):
                self.judge(pl_module, finding)
        if trainer.current_epoch == 0 and self.on("padding_side"):
            difference = pl_module.padding_side_difference(batch)
            if difference is not None:
                value = pl_module.reduce_max(difference).item()
                self.judge(pl_module, Finding("padding_side", value, limits.reward, fatal=10 * limits.reward))

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        """Count losses that are not finite, without waiting for the device."""
        self._bad_losses = self._bad_losses + ~loss.detach().isfinite()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Losses and gradients are finite; in PPO, the ratio was 1. DeepSpeed comes here on every micro-batch."""
        done = trainer.fit_loop.epoch_loop.batch_idx + 1
        if done % trainer.accumulate_grad_batches:
            return
        deviation = getattr(pl_module, "ratio_deviation", None)
        if deviation is not None and done == trainer.accumulate_grad_batches and self.on("ratio"):
            value = pl_module.reduce_max(deviation).item()
            self.judge(pl_module, Finding("ratio", value, tolerance(trainer.precision).ratio))
        if not _is_deepspeed(trainer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self._check_finite(trainer, pl_module, nn.utils.get_total_norm(gradients))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the examples. DeepSpeed knows the norm of the gradients only now."""
        if _is_deepspeed(trainer) and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            norm = trainer.model.get_global_grad_norm()
            self._check_finite(trainer, pl_module, torch.as_tensor(norm, device=pl_module.device))
        self._counts.add(batch)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """All processes have the same weights, and every example was seen once."""
        self._check_ranks(trainer, pl_module, list(pl_module.parameters()))
        if self.on("once_per_epoch"):
            self.judge(pl_module, Finding("once_per_epoch", self._counts.wrong(trainer, pl_module), 0))

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """A reward model that was centred for its export gives demonstrations a mean reward of 0."""
        if pl_module.schedule_interval == "step" and (finding := self._demonstrations(pl_module)):
            self.findings[finding.name] = finding
            for logger in trainer.loggers:
                logger.log_metrics({f"invariants/{finding.name}": finding.value}, trainer.global_step)
            self.act(finding)

    # ------------------------------------------------------------------------------------------------ measurements

    def _check_ranks(self, trainer: Trainer, module: Any, tensors: list[Tensor]) -> None:
        if trainer.world_size > 1 and self.on("ranks"):
            own = fingerprints(tensors).to(module.device)
            largest, smallest = module.reduce_max(torch.stack([own, -own]))
            self.judge(module, Finding("ranks", float((largest != -smallest).sum()), 0))

    def _check_finite(self, trainer: Any, module: Any, norm: Tensor) -> None:
        every_step = module.schedule_interval == "step"
        module.log(
            "grad_norm", norm, on_step=every_step, on_epoch=not every_step, sync_dist=not every_step, batch_size=1
        )
        bad = self._bad_losses
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # a loss scaler skips such steps by itself
            bad = bad + ~norm.isfinite()
        self._bad_losses = torch.zeros_like(self._bad_losses)
        if self.on("finite"):
            self.judge(module, Finding("finite", module.reduce_sum(bad).item(), 0))

    def _check_demonstrations(self, module: Any) -> None:
        if module.schedule_interval == "epoch" and (finding := self._demonstrations(module)):
            self.judge(module, finding)

    def _demonstrations(self, module: Any) -> Finding | None:
        rewards = module.demonstration_rewards() if self.on("demonstration_reward") else None
        if rewards is None:
            return None
        everyone = torch.ones_like(rewards, dtype=torch.bool)
        mean, variance = masked_moments(rewards, everyone, module.reduce_sum)
        count = module.reduce_sum(everyone.sum().float())
        limit = variance.sqrt() * (0.1 + 5 / count.clamp(min=1).sqrt()) + 1e-3
        return Finding("demonstration_reward", mean.abs().item(), limit.item())
