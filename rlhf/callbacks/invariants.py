"""Checks what must hold while a stage trains (docs/details.md), and logs it as curves."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from rlhf.callbacks.dropout import dropout_places
from rlhf.callbacks.findings import Finding, tolerance
from rlhf.errors import Positive, UserError
from rlhf.ops.masking import masked_moments
from rlhf.protocols import PPOStage, Stage, ppo_stage, rollout_data, stage, stage_data
from rlhf.sampling.rollout import engine_differences, real_tokens

Severity = Literal["off", "warn", "error"]
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprints(tensors: Iterable[Tensor]) -> Tensor:
    """Computes one number per tensor that is the same if the bits are the same; `(K,)` int64 on the CPU."""
    sums = [t.detach().contiguous().view(_BITS[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return torch.stack([s.cpu() for s in sums])


class ExampleCounter:
    """Counts the examples of the current epoch and, in PPO, the prompts since the start.

    Attributes:
        epochs: how many epochs were begun.
    """

    def __init__(self) -> None:
        self.epochs = 0
        self._rows: list[int] = []
        self._batches = 0
        self._prompts = torch.zeros(())

    def start(self) -> None:
        """Begins an epoch."""
        self.epochs += 1
        self._rows, self._batches = [], 0

    def add(self, batch: Any) -> None:
        """Counts the rows of a batch."""
        self._rows += batch["rows"] if isinstance(batch, dict) else batch.rows
        self._batches += 1

    def count_wrong(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """Counts the examples of all ranks that were seen too often or, in a complete epoch, too seldom."""
        module, rows = stage(pl_module), len(stage_data(trainer).splits["train"])
        whole = self._batches == len(trainer.train_dataloader)  # type: ignore[arg-type]

        def histogram(seen: list[int], total: int) -> Tensor:
            return torch.bincount(torch.tensor(seen, dtype=torch.long), minlength=total).to(module.device)

        def wrong(counts: Tensor, times: int) -> Tensor:
            return (counts != times if whole else counts > times).sum()

        if module.kind != "ppo":
            return float(wrong(module.reduce_sum(histogram(self._rows, rows)), 1))
        data, ppo = rollout_data(trainer), ppo_stage(pl_module).ppo
        episodes = wrong(histogram(self._rows, len(data.last_rollout)), ppo.ppo_epochs)
        # Prompts come in shuffled passes: in a stretch of them, counts differ by 1, or by 2 if it began within one.
        prompts = data.last_prompts[:: ppo.samples_per_prompt]
        self._prompts = self._prompts + module.reduce_sum(histogram(prompts, rows))
        spread = 1 if self.epochs == trainer.current_epoch + 1 else 2
        return float(module.reduce_sum(episodes) + (self._prompts > self._prompts.min() + spread).sum())


@dataclass(eq=False)
class Invariants(Callback):
    """Measures what must hold, logs it as `invariants/<name>`, and warns or stops if it does not hold.

    Each argument but the last is a severity: `off` does not measure, `warn` warns once and continues, `error` stops the
    run before its next checkpoint is written. The message says what was found, what usually causes it, and which
    setting to look at.

    Args:
        ratio: the PPO ratio is 1 before the first step of each update (D33).
        engine: an engine that samples in place of the policy has its weights, up to rounding (D25).
        first_kl: policy and reference agree before the first update (D24).
        first_value: values equal rewards before the first update, if the critic starts from the reward model (D24).
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

    ratio: Severity = "warn"
    engine: Severity = "error"
    first_kl: Severity = "warn"
    first_value: Severity = "warn"
    demonstration_reward: Severity = "warn"
    padding_side: Severity = "warn"
    kl: Severity = "warn"
    kl_ceiling: Severity = "warn"
    ranks: Severity = "error"
    dropout: Severity = "error"
    finite: Severity = "error"
    finite_rewards: Severity = "error"
    once_per_epoch: Severity = "error"
    highest_kl: Positive = 100.0

    def __post_init__(self) -> None:
        self.findings: dict[str, Finding] = {}
        self._warned: set[str] = set()
        self._largest: dict[str, float] = {}  # of this epoch
        self._bad_losses = torch.zeros(0)
        self._examples = ExampleCounter()

    def judge(self, finding: Finding) -> None:
        """Keeps a finding, which must be the same on all processes, and acts on it."""
        if getattr(self, finding.name) == "off":
            return
        known = self.findings.get(finding.name)
        if known is None or known.holds:
            self.findings[finding.name] = finding
        self._largest[finding.name] = max(finding.value, self._largest.get(finding.name, finding.value))
        self.act(finding)

    def act(self, finding: Finding) -> None:
        """Warns or stops the run if an invariant does not hold; a value that is not a number always stops it."""
        if finding.holds:
            return
        if getattr(self, finding.name) == "error" or not finding.value <= finding.fatal:
            raise UserError(f'{finding} If that is intended, set {finding.name} of Invariants to "off".')
        if finding.name not in self._warned:
            self._warned.add(finding.name)
            rank_zero_warn(f"{finding} This warning is not repeated; the curve invariants/{finding.name} continues.")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.findings, self._warned, self._examples = {}, set(), ExampleCounter()
        self._bad_losses = torch.zeros((), device=pl_module.device)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, self._largest = stage(pl_module), {}
        if not self._examples.epochs:
            frozen = [p for model in module.frozen_models for p in model.parameters()]
            self._check_ranks(trainer, module, [*module.parameters(), *frozen])
            if trainer.current_epoch == 0 and module.kind == "ppo" and (finding := self._demonstrations(module)):
                self.judge(finding)
        if self.dropout != "off":
            self.judge(Finding("dropout", float(len(list(dropout_places(pl_module)))), 0))
        self._examples.start()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:
            return
        module, limits = stage(pl_module), tolerance(trainer.precision)
        if module.kind == "ppo":  # before anything is learnt from the rollout
            for finding in self._measure_rollout(trainer, ppo_stage(pl_module)):
                self.judge(finding)
        measured = trainer.current_epoch == 0 and self.padding_side != "off"
        if measured and (difference := module.padding_side_difference(batch)) is not None:
            value = module.reduce_max(difference).item()
            self.judge(Finding("padding_side", value, limits.reward, fatal=10 * limits.reward))

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._bad_losses = self._bad_losses + ~loss.detach().isfinite()  # does not wait for the device

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_idx + 1
        if done % trainer.accumulate_grad_batches:  # DeepSpeed comes here on every micro-batch
            return
        module, values = stage(pl_module), {}
        if module.kind == "ppo" and done == trainer.accumulate_grad_batches and self.ratio != "off":
            values["ratio"] = module.reduce_max(ppo_stage(pl_module).ratio_deviation)
        if not isinstance(trainer.strategy, DeepSpeedStrategy):
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            values |= self._count_bad(trainer, module, nn.utils.get_total_norm(gradients))
        self._judge_step(trainer, values)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy) and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            engine: Any = trainer.model  # which knows the norm only after the step
            norm = torch.as_tensor(engine.get_global_grad_norm(), device=pl_module.device)
            self._judge_step(trainer, self._count_bad(trainer, stage(pl_module), norm))
        self._examples.add(batch)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = stage(pl_module)
        self._check_ranks(trainer, module, list(module.parameters()))
        if self.once_per_epoch != "off":
            self.judge(Finding("once_per_epoch", self._examples.count_wrong(trainer, pl_module), 0))
        curves = {f"invariants/{name}": value for name, value in self._largest.items()}
        module.log_dict(curves, sync_dist=True, reduce_fx="max")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"largest": self._largest}  # a stop in the middle of an epoch loses nothing of its curves

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._largest = state_dict["largest"]

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A reward model that was centred for its export gives demonstrations a mean reward of 0.
        module = stage(pl_module)
        if module.kind != "ppo" and (finding := self._demonstrations(module)):
            self.findings[finding.name] = finding
            for logger in trainer.loggers:
                logger.log_metrics({f"invariants/{finding.name}": finding.value}, trainer.global_step)
            self.act(finding)

    def _check_ranks(self, trainer: Trainer, module: Stage, tensors: list[Tensor]) -> None:
        if trainer.world_size > 1 and self.ranks != "off":
            own = fingerprints(tensors).to(module.device)
            largest, smallest = module.reduce_max(torch.stack([own, -own]))
            self.judge(Finding("ranks", float((largest != -smallest).sum()), 0))

    def _judge_step(self, trainer: Trainer, values: dict[str, Tensor]) -> None:
        """Judges what was measured in an optimizer step; this alone waits for the device."""
        found = torch.stack(list(values.values())).tolist() if values else []
        for name, value in zip(values, found, strict=True):
            self.judge(Finding(name, value, tolerance(trainer.precision).ratio if name == "ratio" else 0))

    def _count_bad(self, trainer: Trainer, module: Stage, norm: Tensor) -> dict[str, Tensor]:
        """Logs the norm of the gradients; returns how many losses of the step, and norms, are not finite."""
        stepwise = module.kind != "ppo"
        module.log("grad_norm", norm, on_step=stepwise, on_epoch=not stepwise, sync_dist=not stepwise, batch_size=1)
        bad = self._bad_losses
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # a loss scaler skips such steps by itself
            bad = bad + ~norm.isfinite()
        self._bad_losses = torch.zeros_like(self._bad_losses)
        return {"finite": module.reduce_sum(bad)} if self.finite != "off" else {}

    def _demonstrations(self, module: Stage) -> Finding | None:
        rewards = module.demonstration_rewards() if self.demonstration_reward != "off" else None
        if rewards is None:
            return None
        everyone = torch.ones_like(rewards, dtype=torch.bool)
        mean, variance = masked_moments(rewards, everyone, module.reduce_sum)
        count = module.reduce_sum(everyone.sum().float())
        limit = variance.sqrt() * (0.1 + 5 / count.clamp(min=1).sqrt()) + 1e-3
        return Finding("demonstration_reward", mean.abs().item(), limit.item())

    def _measure_rollout(self, trainer: Trainer, module: PPOStage) -> Iterator[Finding]:
        """Measures the episodes of all ranks; before the first update, also whether the networks agree."""
        rollout, limits = rollout_data(trainer).last_rollout, tolerance(trainer.precision)
        rewards, scores = ~rollout.rewards.isfinite(), ~rollout.scores.isfinite()
        bad = (rewards & rollout.value_mask).sum() + (scores & rollout.mask.any(1)).sum()
        yield Finding("finite_rewards", module.reduce_sum(bad.float()).item(), 0)
        if hasattr(rollout, "engine_logprobs"):
            difference, _ = masked_moments(engine_differences(rollout), real_tokens(rollout), module.reduce_sum)
            # Differences of logits grow with 1 / temperature.
            yield Finding("engine", difference.item(), limits.engine / min(1.0, module.ppo.temperature))
        mean, variance = masked_moments(rollout.kl.sum(1), torch.ones_like(rollout.has_eos), module.reduce_sum)
        noise = 4 * (variance / (len(rollout) * trainer.world_size)).sqrt().item()
        yield Finding("kl", max(0.0, -mean.item()), noise + limits.ratio)
        yield Finding("kl_ceiling", mean.item(), self.highest_kl)
        if trainer.current_epoch > 0:
            return
        if module.starts_at_reference:
            distance = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0).abs().max()
            yield Finding("first_kl", module.reduce_max(distance).item(), limits.ratio)
        if module.critic_starts_at_reward:  # only a finished response shorter than the rollout has a value after it
            width = rollout.values.shape[1]
            after = rollout.lengths.clamp(max=width - 1).unsqueeze(1)
            defined = rollout.has_eos & (rollout.lengths < width) & rollout.value_mask.gather(1, after)[:, 0]
            error = torch.where(defined, rollout.values.gather(1, after)[:, 0] - rollout.scores, 0.0).abs().max()
            scale = torch.where(defined, rollout.scores, 0.0).abs().max().clamp(min=1)
            if module.reduce_sum(defined.sum()) > 0:
                yield Finding("first_value", module.reduce_max(error / scale).item(), limits.reward)
