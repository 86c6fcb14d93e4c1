"""PPO, RLOO and GRPO: one Trainer epoch is one update; `rollout` collects experience, `training_step` is the loss."""

import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from typing_extensions import override

from rlhf.callbacks.critic_warmup import CriticWarmup
from rlhf.callbacks.ppo_curves import PPOCurves
from rlhf.callbacks.sample_table import SampleTable
from rlhf.errors import UserError
from rlhf.evaluation.reward_functions import RewardFunction, call_reward_function, check_reward_functions, name_of
from rlhf.hardware import timed
from rlhf.models.actor_critic import Evaluation, join, response_logprobs
from rlhf.models.adapters import LoRA
from rlhf.models.finite import check_finite
from rlhf.models.frozen import FrozenModel, Placement
from rlhf.models.quantization import Quantization
from rlhf.models.saving import save_pretrained
from rlhf.models.scalar_model import ScalarModel
from rlhf.models.tokenizers import eos_ids
from rlhf.models.translated import TranslatedModel
from rlhf.modules.ppo_advantages import set_advantages
from rlhf.modules.ppo_models import (
    check_models,
    check_run,
    load_actor_critic,
    load_reference,
    load_reward_model,
    load_sampler,
)
from rlhf.modules.settings import Optimization, PPOSettings
from rlhf.modules.stage_module import StageModule
from rlhf.ops.kl_control import KLControl
from rlhf.ops.losses import masked_total, policy_losses, value_losses
from rlhf.ops.token_rewards import kl_estimate, penalise_missing_eos, score_index, token_rewards
from rlhf.protocols import rollout_data
from rlhf.sampling.engines import SamplerName
from rlhf.sampling.grouping import groups
from rlhf.sampling.responses import Drawn, respond
from rlhf.sampling.rollout import Rollout, as_scores, in_groups
from rlhf.sampling.sampler import Decoding, uniforms
from rlhf.seeding import generator


class PPOModule(StageModule):
    """Trains a policy with PPO and a critic, or without one by RLOO or GRPO (`ppo.advantage`).

    To change what it does, subclass it and override one of: `sample_responses`, `score_responses`, `keep_episodes`,
    `token_rewards`, `loss`.

    Args:
        model_path: the SFT model that the policy starts from (D24).
        reward_path: the reward model, from which the critic starts too. If it has another tokenizer than the policy, it
            reads texts that are tokenised anew, and the critic starts from the policy's backbone with a new head. Null:
            the reward is `reward_function` alone, and the critic starts likewise.
        reward_function: a function `(queries, responses, records) -> rewards`, one number per episode, by its import
            path (`my_package.my_reward`). With `reward_path` it is added to the model's reward. It is called once per
            rollout and process, with all episodes.
        evaluation_function: a score for validation only, of the same form; never trained on.
        reference_path: the reference policy, by default `model_path`.
        reference_placement: `device`; `cpu` to keep the reference in CPU memory between its uses; `zero3` to shard it
            over the processes, in CPU memory, as the paper does (D38; needs trainer.strategy zero2).
        reward_placement: the same for the reward model.
        ppo: the details of PPO.
        optimization: learning rate, schedule (stepping once per update), loss reduction.
        pad_token: token to pad with; by default the tokenizer's own.
        eos_tokens: tokens that end a response, the first one behind demonstrations; by default the tokenizer's own and
            those of the model's `generation_config.json`.
        activation_checkpointing: of policy and critic: compute activations again in the backward pass; keep none.
        lora: train adapters only, and leave all other weights as they are (`rlhf.models.adapters.LoRA`).
        quantization: with `lora`, store the matrices of the base in 4 bits (`nf4`) or 8 (`int8`), by bitsandbytes.
        sampler: `builtin`, or `vllm` (docs/vllm.md).
    """

    kind = "ppo"
    schedule_interval = "epoch"

    def __init__(
        self,
        model_path: str,
        reward_path: str | None = None,
        reward_function: RewardFunction | None = None,
        evaluation_function: RewardFunction | None = None,
        reference_path: str | None = None,
        reference_placement: Placement = "device",
        reward_placement: Placement = "device",
        ppo: PPOSettings = PPOSettings(),
        optimization: Optimization = Optimization(schedule="linear"),
        pad_token: str | None = None,
        eos_tokens: list[str] | None = None,
        activation_checkpointing: bool = False,
        lora: LoRA | None = None,
        quantization: Quantization | None = None,
        sampler: SamplerName = "builtin",
    ) -> None:
        super().__init__(model_path, optimization, pad_token, activation_checkpointing, eos_tokens, lora, quantization)
        check_reward_functions(reward_function=reward_function, evaluation_function=evaluation_function)
        self.reward_path, self.reference_path = reward_path, reference_path or model_path
        self.reward_function, self.evaluation_function = reward_function, evaluation_function
        self.reference_placement, self.reward_placement = reference_placement, reward_placement
        self.ppo, self.sampler = ppo, sampler
        self.draw = load_sampler(sampler, ppo, own=is_overridden("sample_responses", self, PPOModule))
        paths = model_path, self.reference_path, reward_path
        self.reward_tokenizer = check_models(*paths, self.tokenizer, ppo.has_critic)
        if reward_path is None and reward_function is None and not self._scores_its_own_way:
            raise UserError("PPO has no reward: set model.reward_path, model.reward_function, or both.")
        self.actor_critic: Any = None
        self.reference: Any = None
        self.reward_model: FrozenModel[ScalarModel | TranslatedModel] | None = None
        self.kl_control = KLControl(ppo.kl_coefficient, ppo.kl_target, ppo.kl_horizon)
        self.seconds: dict[str, float] = {}

    @property
    @override
    def response_room(self) -> int:
        return self.ppo.response_length

    @property
    def placements(self) -> tuple[Placement, Placement]:
        """Where reference and reward model are kept."""
        return self.reference_placement, self.reward_placement

    @property
    def _scores_its_own_way(self) -> bool:
        return is_overridden("score_responses", self, PPOModule)

    @override
    def configure_model(self) -> None:
        if self.actor_critic is None:
            recompute, critic_path = self.activation_checkpointing, None if self.reward_tokenizer else self.reward_path
            paths = self.model_path, critic_path
            self.actor_critic = load_actor_critic(self.networks, *paths, recompute, self.ppo.has_critic)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        check_run(self.trainer, self.ppo, self.placements, self.reward_tokenizer, self.lora)

    @override
    def on_fit_start(self) -> None:
        networks, half = self.networks, self.half_precision  # in the policy's precision, so that the first KL is 0
        if self.reference is None and self.trainer.training:
            self.reference = load_reference(networks, self.reference_path, self.reference_placement, half)
        if self.reward_model is None and self.reward_path is not None:
            tokenizers = self.tokenizer, self.reward_tokenizer
            self.reward_model = load_reward_model(networks, self.reward_path, self.reward_placement, half, *tokenizers)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    @property
    @override
    def frozen_models(self) -> list[FrozenModel[Any]]:
        return [model for model in (self.reference, self.reward_model) if model is not None]

    @override
    def parameter_groups(self) -> list[list[nn.Parameter]]:
        trained = [p for p in self.parameters() if p.requires_grad]
        policy = set(self.actor_critic.policy.parameters())
        groups = [p for p in trained if p in policy], [p for p in trained if p not in policy]
        return [group for group in groups if group]  # the policy first: CriticWarmup holds it

    @property
    def starts_at_reference(self) -> bool:
        """Whether policy and reference are the same model before the first update (D24)."""
        return self.reference_path == self.model_path

    @property
    def critic_starts_at_reward(self) -> bool:
        """Whether values equal rewards before the first update (D24)."""
        alone = self.reward_function is None and not self._scores_its_own_way
        return self.ppo.has_critic and self.reward_path is not None and self.reward_tokenizer is None and alone

    @override
    def padding_side_difference(self, batch: Rollout) -> Tensor | None:
        if self.reward_model is None:
            return None
        with self.reward_model.on(self.device) as model, self.autocast():
            return model.padding_side_difference(*join(*batch.inputs))

    @override
    def demonstration_rewards(self) -> Tensor | None:
        batches = rollout_data(self.trainer).demonstration_dataloader()
        if self.reward_model is None or batches is None:
            return None
        with self.reward_model.on(self.device) as model:
            return self.score_batches(model, batches)

    @torch.no_grad()
    def rollout(self, batch: dict[str, Any], update: int) -> Rollout:
        """Collects one batch of experience, from prompts to advantages.

        Args:
            batch: `queries (N, P)` padded on the left, `query_mask (N, P)`, `texts`: per row `query`, `reference`,
                `record`; `chunk`: how many of the longest rows go through a model at a time, and more of shorter ones.
            update: the number of this update; it seeds the sampling.
        """
        tokens = batch["chunk"] * (batch["queries"].shape[1] + self.ppo.response_length)
        with self.autocast():
            # 1. Sample responses; everything after the first EOS is PAD.
            with self._timed("sampling"):
                episodes = self._respond(batch, self.ppo.temperature, tokens, update)
            # 2. Log-probabilities and values of the networks that will be trained, then of the reference.
            with self._timed("values"):
                episodes.logprobs, _, values = in_groups(episodes, episodes.groups, self._networks)
                episodes.values = torch.where(episodes.value_mask, values, 0.0)
        with self._timed("reference"), self.reference.on(self.device) as reference, self.autocast():
            episodes.ref_logprobs, _ = in_groups(
                episodes, episodes.groups, lambda part: response_logprobs(reference, *part.inputs, self.ppo.temperature)
            )
        # 3. One score per response; the EOS trick.
        with self._timed("reward"):
            episodes.scores = as_scores(self.score_responses(episodes), episodes)
            if (penalty := self.ppo.missing_eos_score) is not None:
                episodes.scores = penalise_missing_eos(episodes.scores, episodes.has_eos, penalty, self.ppo.missing_eos)
        with self._timed("advantages"):
            # 4. The KL, and the episodes that are not to be learned from.
            kl = kl_estimate(episodes.logprobs, episodes.ref_logprobs, self.ppo.kl_estimator)
            episodes.kl = torch.where(episodes.mask, kl, 0.0)
            episodes.keep(self.keep_episodes(episodes).to(self.device))
            # 5. Rewards per token: the KL penalty, and the score.
            episodes.rewards = self.token_rewards(episodes)
            # 6. Advantages, with their importance weights, and returns.
            set_advantages(episodes, self.ppo, self.reduce_sum)
        return episodes

    def sample_responses(self, queries: Tensor, query_mask: Tensor, temperature: float, uniforms: Tensor) -> Drawn:
        """Samples token ids `(n, r)` for left-padded queries `(n, P)`. Override this to sample with another engine.

        It may also return the engine's log-probabilities of them, `(n, r)`, which are compared with the policy's.
        `uniforms (n, response_length)` are the random numbers of each row, from which an engine can take a seed.
        """
        decoding = Decoding(temperature, eos_ids(self.tokenizer), self.tokenizer.pad_token_id)
        return self.draw(self.actor_critic.policy, queries, query_mask, uniforms, decoding)

    def score_responses(self, episodes: Rollout) -> Tensor:
        """Computes the reward of every episode, `(N,)`: by model, function, or both. Override it for your own.

        Args:
            episodes: all that were sampled together, with `queries`, `responses`, their masks, `lengths`, `has_eos`,
                `texts`, and `groups`, those that fit through a model together (see `in_groups`).
        """
        scores = torch.zeros(len(episodes), device=self.device)
        if self.reward_model is not None:
            with self.reward_model.on(self.device) as model, self.autocast():
                (scores,) = in_groups(episodes, episodes.groups, lambda part: (model.score(*join(*part.inputs)),))
            check_finite(scores, f"rewards by model.reward_path {self.reward_path}")
        if self.reward_function is not None:
            texts, setting = episodes.texts, "model.reward_function"
            scores = scores + call_reward_function(self.reward_function, texts, self.device, setting)
        return scores

    def keep_episodes(self, episodes: Rollout) -> Tensor:
        """Chooses the episodes to learn from, bool `(N,)`; by default all.

        The others count in no loss and no whitening. The curves of the rollout show all episodes.
        """
        return torch.ones(len(episodes), dtype=torch.bool, device=self.device)

    def token_rewards(self, episodes: Rollout) -> Tensor:
        """Computes rewards per token `(N, R)` from `kl (N, R)` and `scores (N,)` (D28, D29)."""
        index = score_index(episodes.lengths, episodes.responses.shape[1], self.ppo.score_position)
        coefficient = self.kl_control.coefficient if self.ppo.kl_in == "reward" else 0.0
        return token_rewards(episodes.kl, episodes.scores, index, episodes.mask, coefficient)

    def respond(self, batch: dict[str, Any], seed: int) -> Rollout:
        """Samples responses at the evaluation temperature and scores them, without the EOS trick."""
        tokens = len(batch["queries"]) * (batch["queries"].shape[1] + self.ppo.response_length)
        episodes = self._respond(batch, self.ppo.evaluation_temperature, tokens, 0, seed)
        episodes.scores = as_scores(self.score_responses(episodes), episodes)
        return episodes

    def _respond(self, batch: dict[str, Any], temperature: float, tokens: int, *seed: int) -> Rollout:
        """Samples responses in groups of at most `tokens` tokens with padding."""

        def draw(queries: Tensor, query_mask: Tensor, numbers: Tensor) -> Drawn:
            with self.autocast():
                return self.sample_responses(queries, query_mask, temperature, numbers)

        random = generator(self.device, *seed, self.global_rank)
        numbers = uniforms(len(batch["queries"]), self.ppo.response_length, random)
        together = sys.maxsize if self.draw.takes_all else tokens
        episodes = respond(draw, batch, numbers, together, self.tokenizer, self.ppo.score_position)
        everywhere = self.reduce_max if "zero3" in self.placements else None
        episodes.groups = groups(episodes.total_lengths(), tokens, everywhere, self.device)
        return episodes

    def _timed(self, phase: str) -> AbstractContextManager[None]:
        return timed(self.seconds, phase, self.device)

    def _networks(self, part: Rollout) -> Evaluation:
        return self.actor_critic(*part.inputs, self.ppo.temperature)

    def loss(self, now: Evaluation, batch: Rollout) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Computes the loss of a micro-batch, and statistics: `(B, R)` values per token and a mask of those that count.

        The variance of the ratio is taken around 1, its expectation under the sampling policy.

        Args:
            now: what the networks say of the responses.
            batch: a slice of the rollout.
        """
        p, mask, value_mask = self.ppo, batch.mask, batch.value_mask
        policy, policy_clipped = policy_losses(now.logprobs, batch.logprobs, batch.advantages, p.clip)
        tokens = self.normaliser(mask.sum(), batch.policy_share)
        actor = masked_total(policy, mask, tokens)
        if p.entropy_coefficient:
            actor = actor - p.entropy_coefficient * masked_total(now.entropy, mask, tokens)
        log_ratio = (now.logprobs - batch.logprobs).detach()
        ratio = log_ratio.exp()
        statistics = {
            "policy/approxkl_avg": (0.5 * log_ratio**2, mask),
            "policy/clipfrac_avg": (policy_clipped.float(), mask),
            "policy/entropy_avg": (now.entropy, mask),
            "loss/policy_avg": (policy, mask),
            "val/ratio": (ratio, mask),
            "val/ratio_var": ((ratio - 1) ** 2, mask),
        }
        if p.kl_in == "loss":
            kl = kl_estimate(now.logprobs, batch.ref_logprobs, p.kl_estimator)
            actor = actor + p.kl_coefficient * masked_total(kl, mask, tokens)
            statistics["loss/kl_avg"] = kl, mask
        if not p.has_critic:
            return actor, statistics
        value, value_clipped = value_losses(now.values, batch.values, batch.returns, p.value_clip)
        statistics |= {"loss/value_avg": (value, value_mask), "val/clipfrac_avg": (value_clipped.float(), value_mask)}
        critic = masked_total(value, value_mask, self.normaliser(value_mask.sum(), batch.value_share))
        warm = self.trainer.current_epoch >= p.critic_warmup
        return (actor if warm else 0.0 * actor) + p.value_coefficient * critic, statistics

    @override
    def on_train_epoch_start(self) -> None:
        self.ratio_deviation = torch.zeros((), device=self.device)

    @override
    def training_step(self, batch: Rollout, batch_idx: int) -> Tensor:
        now = self._networks(batch)
        loss, statistics = self.loss(now, batch)
        for name, (values, mask) in statistics.items():
            self.epoch_means.add(name, values, mask)
        if batch_idx < self.trainer.accumulate_grad_batches:
            deviation = torch.where(batch.mask, (now.logprobs - batch.logprobs).detach().expm1().abs(), 0.0).max()
            self.ratio_deviation = torch.maximum(self.ratio_deviation, deviation)
        return loss

    @override
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self.trainer.optimizers[0].zero_grad()  # the next rollout can use their memory
        self.log("val/ratio_max_deviation", self.ratio_deviation, sync_dist=True, reduce_fx="max")
        data = rollout_data(self.trainer)
        kl = self.reduce_sum(data.last_rollout.kl.sum(1).mean()) / self.trainer.world_size
        self.kl_control.update(kl.item(), data.batch_size)

    @override
    def default_callbacks(self) -> list[Callback]:
        warmup = [CriticWarmup(self.ppo.critic_warmup)] if self.ppo.critic_warmup else []
        return [*super().default_callbacks(), PPOCurves(), SampleTable(), *warmup]

    @override
    def evaluate(self, batch: dict[str, Any], batch_idx: int, split: str) -> dict[str, list[dict[str, Any]]]:
        episodes = self.respond(batch, batch_idx)
        values = {"score": episodes.scores, "eos": episodes.has_eos.float(), "length": episodes.lengths.float()}
        if self.evaluation_function is not None:
            function, setting = self.evaluation_function, "model.evaluation_function"
            values[name_of(function)] = call_reward_function(function, episodes.texts, self.device, setting)
        means = {f"{split}/{name}": value.mean() for name, value in values.items()}
        self.log_dict(means, batch_size=len(episodes), sync_dist=True)
        return {"samples": episodes.samples()}

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        columns = ("query", "response", "reference", "score", "has_eos")
        return [{name: sample[name] for name in columns} for sample in self.respond(batch, batch_idx).samples()]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_coefficient"] = self.kl_control.coefficient

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.kl_control.target is not None:
            self.kl_control.coefficient = checkpoint["kl_coefficient"]

    @override
    def save_export(self, folder: Path) -> None:
        # The policy, and the critic, if there is one, in the folder `critic` beside it.
        save_pretrained(self.actor_critic.policy, self.tokenizer, folder)
        if self.ppo.has_critic:
            self.actor_critic.critic.save(folder / "critic", self.tokenizer)
