"""One point per PPO update for every curve, under the names that TRL and the reference use."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf.ops.masking import masked_mean


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the device, or of this process where it trains on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class PPOCurves(Callback):
    """Logs the rollout of every update; the x-axis of all curves is the number of episodes."""

    def __init__(self) -> None:
        self._start = 0.0
        self._learning_rate = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The update begins."""
        self._start = time.perf_counter()
        self._learning_rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The update is over: log its rollout."""
        curves, largest = self.curves(trainer, pl_module)
        pl_module.log_dict(curves, sync_dist=True)
        pl_module.log("reward", curves["objective/rlhf_reward"], sync_dist=True, prog_bar=True, logger=False)
        pl_module.log("kl", curves["objective/kl"], sync_dist=True, prog_bar=True, logger=False)
        pl_module.log_dict(largest, sync_dist=True, reduce_fx="max")
        pl_module.log("step", float(self.episodes(trainer)))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation curves have the same x-axis."""
        if not trainer.sanity_checking:
            pl_module.log("step", float(self.episodes(trainer)))

    @staticmethod
    def episodes(trainer: Any) -> int:
        """Episodes seen so far, this update included; 0 outside of training."""
        return (trainer.current_epoch + 1) * trainer.datamodule.batch_size if trainer.state.fn == "fit" else 0

    def curves(self, trainer: Any, pl_module: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Curves of the last rollout as means over this rank's episodes, and those that are maxima over ranks.

        All ranks have equally many episodes, so the mean over ranks is the mean over all; only per-token means need
        sums over ranks.
        """
        rollout = trainer.datamodule.last_rollout
        kl = rollout.kl.sum(1)
        penalty = -pl_module.kl_control.coefficient * kl
        entropy = torch.where(rollout.mask, -rollout.logprobs, 0.0).sum(1)
        seconds = time.perf_counter() - self._start
        tokens = float(rollout.lengths.sum())
        curves = {
            "objective/kl": kl.mean(),
            "objective/entropy": entropy.mean(),
            "objective/non_score_reward": penalty.mean(),
            "objective/rlhf_reward": (penalty + rollout.scores).mean(),
            "objective/scores": rollout.scores.mean(),
            "objective/scores_std": rollout.scores.std(correction=0),
            "objective/kl_coefficient": pl_module.kl_control.coefficient,
            "objective/value": masked_mean(rollout.values, rollout.value_mask),
            "val/num_eos_tokens": rollout.has_eos.float().sum() * trainer.world_size,
            "rollout/eos_share": rollout.has_eos.float().mean(),
            "rollout/response_length": rollout.lengths.float().mean(),
            "lr": self._learning_rate,
            "episode": float(self.episodes(trainer)),
        }
        sampling = pl_module.seconds["sampling"]
        curves["eps"] = trainer.datamodule.batch_size / seconds
        curves["tokens_per_second/sampling"] = tokens * trainer.world_size / sampling
        largest = {f"seconds/{phase}": value for phase, value in pl_module.seconds.items()}
        largest["seconds/training"] = seconds - sum(pl_module.seconds.values())
        largest["seconds/update"] = seconds
        largest["memory/peak_gib"] = peak_memory_gib(pl_module.device)
        return curves, largest
