"""One point per PPO update for every curve, under the names that TRL and the reference use."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.hardware import peak_resident_gib
from rlhf.ops.masking import masked_moments
from rlhf.ops.sequences import length_mask


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the device, or of this process where it trains on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_gib()


class PPOCurves(Callback):
    """Logs the rollout of every update; the x-axis of all curves is the number of episodes."""

    def __init__(self) -> None:
        self._start = self._validation = self._learning_rate = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Starts the clock of an update."""
        self._start, self._validation = time.perf_counter(), 0.0
        self._learning_rate = pl_module.learning_rate

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is no part of the update's time."""
        self._validation -= time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is over."""
        self._validation += time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """The update is over: log its rollout."""
        curves = self.curves(trainer, pl_module)
        pl_module.log_dict(curves, sync_dist=True)
        costs = self.costs(trainer, pl_module)
        pl_module.log_dict(costs, sync_dist=True, reduce_fx="max")
        tokens = float(trainer.datamodule.last_rollout.lengths.sum()) * trainer.world_size
        rates = {
            "eps": trainer.datamodule.batch_size / costs["seconds/update"],
            "tokens_per_second/sampling": tokens / costs["seconds/sampling"],
        }
        pl_module.log_dict(rates, sync_dist=True, reduce_fx="min")
        for name, curve in (("reward", "objective/rlhf_reward"), ("kl", "objective/kl")):
            pl_module.log(name, curves[curve], sync_dist=True, prog_bar=True, logger=False)
        pl_module.log("step", float(self.episodes(trainer)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation curves have the same x-axis."""
        if not trainer.sanity_checking:
            pl_module.log("step", float(self.episodes(trainer)))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the whole validation before the first update (`num_sanity_val_steps=-1`) as the points at 0."""
        if trainer.num_sanity_val_steps == float("inf") and trainer.global_step == 0:
            points = {name: float(value) for name, value in trainer.callback_metrics.items()}
            for logger in trainer.loggers:
                logger.log_metrics(points, step=0)

    @staticmethod
    def episodes(trainer: Any) -> int:
        """Episodes seen so far, this update included; 0 outside of training."""
        return (trainer.current_epoch + 1) * trainer.datamodule.batch_size if trainer.state.fn == "fit" else 0

    def curves(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        """Curves of the last rollout, over the episodes of all ranks."""
        rollout = trainer.datamodule.last_rollout
        real = length_mask(rollout.lengths, rollout.responses.shape[1])
        kl = rollout.kl.sum(1)
        per_episode = {
            "objective/kl": kl,
            "objective/entropy": torch.where(real, -rollout.logprobs, 0.0).sum(1),
            "objective/non_score_reward": -pl_module.kl_control.coefficient * kl,
            "objective/rlhf_reward": rollout.scores - pl_module.kl_control.coefficient * kl,
            "objective/scores": rollout.scores,
            "rollout/eos_share": rollout.has_eos.float(),
            "rollout/response_length": rollout.lengths.float(),
        }
        everyone = torch.ones_like(rollout.has_eos)
        means = (
            pl_module.reduce_sum(torch.stack([x.sum() for x in per_episode.values()])) / trainer.datamodule.batch_size
        )
        curves = dict(zip(per_episode, means.tolist(), strict=True))
        _, variance = masked_moments(rollout.scores, everyone, pl_module.reduce_sum)
        value, _ = masked_moments(rollout.values, rollout.value_mask, pl_module.reduce_sum)
        return curves | {
            "objective/scores_std": variance.sqrt().item(),
            "objective/value": value.item(),
            "objective/kl_coefficient": pl_module.kl_control.coefficient,
            "val/num_eos_tokens": curves["rollout/eos_share"] * trainer.datamodule.batch_size,
            "lr": self._learning_rate,
            "episode": float(self.episodes(trainer)),
        }

    def costs(self, trainer: Any, pl_module: Any) -> dict[str, float]:
        """Seconds per phase, and memory."""
        seconds = time.perf_counter() - self._start - self._validation
        phases = pl_module.seconds
        return {
            **{f"seconds/{phase}": value for phase, value in phases.items()},
            "seconds/training": seconds - sum(phases.values()),
            "seconds/update": seconds,
            "memory/peak_gib": peak_memory_gib(pl_module.device),
        }
