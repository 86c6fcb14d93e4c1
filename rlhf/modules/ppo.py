"""PPO: one Trainer epoch is one update; `rollout` makes the experience, `training_step` is the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.callbacks.ppo_curves import PPOCurves
from rlhf.callbacks.sample_table import SampleTable
from rlhf.errors import UserError
from rlhf.models.actor_critic import Evaluation
from rlhf.models.loading import save_pretrained
from rlhf.modules.experience import ExperienceModule
from rlhf.ops.kl_control import AdaptiveKL
from rlhf.ops.losses import masked_total, policy_losses, value_losses
from rlhf.ops.masking import masked_sum
from rlhf.sampling.rollout import Rollout


class PPOModule(ExperienceModule):
    """Trains a policy and a critic with PPO.

    To change what it does, subclass it and override one of: `sample_responses`, `score_responses`, `keep_episodes`,
    `token_rewards`, `loss`.

    Args:
        model_path: the SFT model that the policy starts from (D24).
        reward_path: the reward model, which the critic starts from too. Null: the reward is `reward_function` alone,
            and the critic starts from the policy's backbone with a new head.
        reward_function: a function `(queries, responses, records) -> rewards`, one number per episode, by its import
            path (`my_package.my_reward`). With `reward_path` it is added to the model's reward.
        evaluation_function: a score for validation only, of the same form; never trained on.
        reference_path: the reference policy, by default `model_path`.
        reference_placement: `device`; `cpu` to keep the reference in CPU memory between its uses; `zero3` to share it
            out among the processes, in CPU memory, as the paper does (D38; needs trainer.strategy zero2).
        reward_placement: the same for the reward model.
        ppo: the details of PPO.
        optimization: learning rate, schedule (stepping once per update), loss reduction.
        pad_token: token to pad with; by default the tokenizer's own.
        activation_checkpointing: of policy and critic: compute activations again in the backward pass instead of
            keeping them.
    """

    # ---------------------------------------------------------------------------------------------------- training

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Lists the policy's parameters, then all others, so that the policy can wait for the critic."""
        trained = [p for p in self.parameters() if p.requires_grad]
        policy = set(self.actor_critic.policy.parameters())
        return [[p for p in trained if p in policy], [p for p in trained if p not in policy]]

    def loss(self, now: Evaluation, batch: Rollout) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The loss of a micro-batch, and its statistics per token: `(B, R)` values and the mask of those that count.

        The variance of the ratio is taken around 1, its expectation under the sampling policy.

        Args:
            now: what the networks say of the responses, each `(B, R)`.
            batch: a slice of the rollout.
        """
        p, mask, value_mask = self.ppo, batch.mask, batch.value_mask
        policy, policy_clipped = policy_losses(now.logprobs, batch.logprobs, batch.advantages, p.clip)
        value, value_clipped = value_losses(now.values, batch.values, batch.returns, p.value_clip)
        tokens = self.normaliser(mask.sum(), batch.policy_share)
        actor = masked_total(policy, mask, tokens)
        if p.entropy_coefficient:
            actor = actor - p.entropy_coefficient * masked_total(now.entropy, mask, tokens)
        critic = masked_total(value, value_mask, self.normaliser(value_mask.sum(), batch.value_share))
        warm = self.trainer.current_epoch >= p.critic_warmup
        loss = (actor if warm else 0.0 * actor) + p.value_coefficient * critic
        log_ratio = (now.logprobs - batch.logprobs).detach()
        ratio = log_ratio.exp()
        statistics = {
            "policy/approxkl_avg": (0.5 * log_ratio**2, mask),
            "policy/clipfrac_avg": (policy_clipped.float(), mask),
            "policy/entropy_avg": (now.entropy.detach(), mask),
            "loss/policy_avg": (policy.detach(), mask),
            "val/ratio": (ratio, mask),
            "val/ratio_var": ((ratio - 1) ** 2, mask),
            "loss/value_avg": (value.detach(), value_mask),
            "val/clipfrac_avg": (value_clipped.float(), value_mask),
        }
        return loss, statistics

    def on_train_epoch_start(self) -> None:
        """Begins an update: no statistics yet, and the policy waits or starts."""
        self._sums: dict[str, Tensor] = {}
        self.ratio_deviation = torch.zeros((), device=self.device)
        self._hold_policy()

    def _hold_policy(self) -> None:
        """Holds the policy while the critic learns alone; then makes AdamW forget the steps that it was held in.

        Without a learning rate, neither weight decay nor rounding moves a weight. The schedule sets the rate anew after
        every update. The states belong to parameters, or under ZeRO to this process's part of all of them.
        """
        if not self.ppo.critic_warmup:
            return
        optimizer = self.trainer.optimizers[0]
        if len(optimizer.param_groups) < 2:
            raise UserError(
                "model.ppo.critic_warmup needs an optimizer whose first group of parameters is the policy; give yours "
                "the groups of parameter_groups()."
            )
        policy, update = optimizer.param_groups[0], self.trainer.current_epoch
        if update < self.ppo.critic_warmup:
            policy["lr"] = 0.0
        elif update == self.ppo.critic_warmup:
            for parameter in policy["params"]:
                for state in optimizer.state.get(parameter, {}).values():
                    state.zero_()  # moments, and the count of steps that corrects their bias

    def training_step(self, batch: Rollout, batch_idx: int) -> Tensor:
        """The loss of one micro-batch of the current rollout."""
        now = self._networks(batch)
        loss, statistics = self.loss(now, batch)
        for name, (values, mask) in statistics.items():
            sums = torch.stack([masked_sum(values, mask), mask.sum().to(values.dtype)])
            self._sums[name] = self._sums.get(name, 0) + sums
        if batch_idx < self.trainer.accumulate_grad_batches:
            deviation = torch.where(batch.mask, (now.logprobs - batch.logprobs).detach().expm1().abs(), 0.0).max()
            self.ratio_deviation = torch.maximum(self.ratio_deviation, deviation)
        return loss

    def on_train_epoch_end(self) -> None:
        """The update is over: log its statistics over all ranks, and adapt the KL coefficient to its KL."""
        self.trainer.optimizers[0].zero_grad()  # the next rollout can use their memory
        sums = self.reduce_sum(torch.stack(list(self._sums.values())))
        means = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
        self.log_dict(dict(zip(self._sums, means, strict=True)), sync_dist=True)
        self.log("val/ratio_max_deviation", self.ratio_deviation, sync_dist=True, reduce_fx="max")
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        kl = self.reduce_sum(data.last_rollout.kl.sum(1).mean()) / self.trainer.world_size
        self.kl_control.update(kl.item(), data.batch_size)

    def configure_callbacks(self) -> list[Any]:
        """With the curves of PPO and tables of samples."""
        return super().configure_callbacks() + self.unless_given(PPOCurves(), SampleTable())

    # -------------------------------------------------------------------------------------------------- evaluation
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Responses to the whole validation subset: score, share with EOS, length (D37)."""
        return self._validate(batch, batch_idx, "validation")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """As validation, on the test split."""
        return self._validate(batch, batch_idx, "test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """A response for every query, with its score."""
        episodes = self.respond(batch, batch_idx)
        rows = zip(episodes.texts, episodes.scores.tolist(), episodes.has_eos.tolist(), strict=True)
        columns = ("query", "response", "reference")
        return [{**{c: t[c] for c in columns}, "score": s, "has_eos": e} for t, s, e in rows]

    def _validate(self, batch: dict[str, Any], batch_idx: int, split: str) -> dict[str, Any]:
        episodes = self.respond(batch, batch_idx)
        values = {"score": episodes.scores, "eos": episodes.has_eos.float(), "length": episodes.lengths.float()}
        if self.evaluation_function is not None:
            values[self.evaluation_function.__name__] = self._call(self.evaluation_function, episodes.texts)
        for name, value in values.items():
            self.log(f"{split}/{name}", value.mean(), batch_size=len(episodes), sync_dist=True)
        scores = episodes.scores.tolist()
        return {"samples": [{**text, "score": score} for text, score in zip(episodes.texts, scores, strict=True)]}

    # --------------------------------------------------------------------------------------- checkpoints and export

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The KL coefficient, where it adapts."""
        checkpoint["kl_coefficient"] = self.kl_control.coefficient

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """An adapted KL coefficient goes on from where it was."""
        if isinstance(self.kl_control, AdaptiveKL):
            self.kl_control.coefficient = checkpoint["kl_coefficient"]

    def save_export(self, folder: Path) -> None:
        """The policy, and the critic in a folder `critic` beside it."""
        save_pretrained(self.actor_critic.policy, self.tokenizer, folder)
        self.actor_critic.critic.save(folder / "critic", self.tokenizer)
