"""One point per PPO update for every curve, under the names that TRL and the reference use."""

import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from rlhf.hardware import peak_memory_gib
from rlhf.ops.masking import masked_moments
from rlhf.ops.token_rewards import kl_estimate
from rlhf.protocols import PPOStage, ppo_stage, rollout_data, stage
from rlhf.sampling.rollout import Rollout, engine_differences, real_tokens


class PPOCurves(Callback):
    """Logs the rollout of every update; the x-axis of all curves is the number of episodes."""

    def __init__(self) -> None:
        self._start = self._validation = self._learning_rate = 0.0

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start, self._validation = time.perf_counter(), 0.0
        self._learning_rate = stage(pl_module).learning_rate

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation -= time.perf_counter()  # is no part of the update's time

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation += time.perf_counter()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, curves, phases = rollout_data(trainer), self.curves(trainer, pl_module), ppo_stage(pl_module).seconds
        update = time.perf_counter() - self._start - self._validation
        costs = {
            **{f"seconds/{phase}": seconds for phase, seconds in phases.items()},
            "seconds/training": update - sum(phases.values()),
            "seconds/update": update,
            "memory/peak_gib": peak_memory_gib(pl_module.device),
        }
        tokens = float(data.last_rollout.lengths.sum()) * trainer.world_size
        rates = {"eps": data.batch_size / update, "tokens_per_second/sampling": tokens / phases["sampling"]}
        pl_module.log_dict(curves, sync_dist=True)
        pl_module.log_dict(costs, sync_dist=True, reduce_fx="max")
        pl_module.log_dict(rates, sync_dist=True, reduce_fx="min")
        shown = {"score": curves["objective/scores"], "kl": curves["objective/kl"]}
        pl_module.log_dict(shown, sync_dist=True, prog_bar=True, logger=False)
        pl_module.log("step", float(self._episodes(trainer)))

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            pl_module.log("step", float(self._episodes(trainer)))

    @override
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A whole validation before the first update (`num_sanity_val_steps=-1`) gives the points at 0.
        if trainer.num_sanity_val_steps == float("inf") and trainer.global_step == 0:
            points = {name: float(value) for name, value in trainer.callback_metrics.items()}
            for logger in trainer.loggers:
                logger.log_metrics(points, step=0)

    @staticmethod
    def _episodes(trainer: Trainer) -> int:
        """Returns the number of episodes so far, this update included; 0 outside of training."""
        return (trainer.current_epoch + 1) * rollout_data(trainer).batch_size if trainer.state.fn == "fit" else 0

    def curves(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Computes the curves of the last rollout, over the episodes of all ranks."""
        data, module = rollout_data(trainer), ppo_stage(pl_module)
        rollout, coefficient = data.last_rollout, module.kl_control.coefficient
        real = real_tokens(rollout)
        kl = rollout.kl.sum(1)
        per_episode = {
            "objective/kl": kl,
            "objective/entropy": torch.where(real, -rollout.logprobs, 0.0).sum(1),
            "objective/non_score_reward": -coefficient * kl,
            "objective/rlhf_reward": rollout.scores - coefficient * kl,
            "objective/scores": rollout.scores,
            "rollout/eos_share": rollout.has_eos.float(),
            "rollout/response_length": rollout.lengths.float(),
        }
        if (samples := module.ppo.samples_per_prompt) > 1:
            of_prompts = rollout.scores.view(-1, samples)
            per_episode["rollout/equal_groups"] = (of_prompts == of_prompts[:, :1]).all(1).float() * samples
        sums = module.reduce_sum(torch.stack([x.sum() for x in per_episode.values()]))
        curves = dict(zip(per_episode, (sums / data.batch_size).tolist(), strict=True))
        _, variance = masked_moments(rollout.scores, torch.ones_like(rollout.has_eos), module.reduce_sum)
        if module.ppo.has_critic:
            value, _ = masked_moments(rollout.values, rollout.value_mask, module.reduce_sum)
            curves["objective/value"] = value.item()
        return curves | {
            "objective/scores_std": variance.sqrt().item(),
            "objective/kl_coefficient": coefficient,
            "val/num_eos_tokens": curves["rollout/eos_share"] * data.batch_size,
            "lr": self._learning_rate,
            "episode": float(self._episodes(trainer)),
            **_engine_curves(rollout, module),
        }


def _engine_curves(rollout: Rollout, module: PPOStage) -> dict[str, float]:
    """Computes how far an engine that sampled is from the policy: KL(engine || policy) per token, and differences."""
    if not hasattr(rollout, "engine_logprobs"):
        return {}
    real, differences = real_tokens(rollout), engine_differences(rollout)
    kl, _ = masked_moments(kl_estimate(rollout.engine_logprobs, rollout.logprobs, "k3"), real, module.reduce_sum)
    mean, _ = masked_moments(differences, real, module.reduce_sum)
    return {
        "rollout/engine_kl": kl.item(),
        "rollout/engine_difference": mean.item(),
        "rollout/engine_difference_max": module.reduce_max(differences.max()).item(),
    }
