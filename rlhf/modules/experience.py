"""What PPO learns from: the models, and the rollout that turns prompts into episodes with advantages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.actor_critic import ActorCritic, Evaluation, join, response_logprobs
from rlhf.models.frozen import FrozenModel, Placement
from rlhf.models.loading import (
    check_language_model,
    check_pad_in_embedding,
    check_reward_model,
    checkpoint_activations,
    embedding_rows,
    load_causal_lm,
    load_config,
    load_tokenizer,
)
from rlhf.models.scalar_model import ScalarModel
from rlhf.modules.settings import Optimization, PPOSettings
from rlhf.modules.stage_module import StageModule
from rlhf.ops.advantages import gae
from rlhf.ops.kl_control import AdaptiveKL, FixedKL
from rlhf.ops.masking import whiten
from rlhf.ops.rewards import kl_estimate, penalise_missing_eos, score_index, token_rewards
from rlhf.ops.sequences import response_lengths, truncate_after_eos
from rlhf.sampling.cuda_graphs import sample_in_graph
from rlhf.sampling.grouping import by_length, split
from rlhf.sampling.rollout import Rollout, in_groups, response_masks
from rlhf.sampling.sampler import sample, uniforms
from rlhf.seeding import generator
from rlhf.strategies import Zero2Strategy

RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]


class ExperienceModule(StageModule):
    """Makes the experience of PPO; `PPOModule`, which learns from it, says what the arguments are."""

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
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(model_path, optimization, pad_token, activation_checkpointing)
        self.reward_path = reward_path
        self.reward_function = reward_function
        self.evaluation_function = evaluation_function
        self.reference_path = reference_path or model_path
        self.reference_placement = reference_placement
        self.reward_placement = reward_placement
        self.ppo = ppo
        check_pad_in_embedding(self.tokenizer, embedding_rows(self.model_config), model_path)
        self._check_settings()
        self.actor_critic: Any = None
        self.reference: FrozenModel[Any] | None = None
        self.reward_model: FrozenModel[ScalarModel] | None = None
        self.kl_control: FixedKL | AdaptiveKL = FixedKL(ppo.kl_coefficient)
        if ppo.kl_target is not None:
            self.kl_control = AdaptiveKL(ppo.kl_coefficient, ppo.kl_target, ppo.kl_horizon)
        self.seconds: dict[str, float] = {}

    def _check_settings(self) -> None:
        own_reward = type(self).score_responses is not ExperienceModule.score_responses
        if self.reward_path is None and self.reward_function is None and not own_reward:
            raise UserError("PPO has no reward: set model.reward_path, model.reward_function, or both.")
        check_language_model(self.model_config, self.model_path, "model.model_path")
        if self.reference_path != self.model_path:
            config = load_config(self.reference_path, "model.reference_path")
            check_language_model(config, self.reference_path, "model.reference_path")
        if self.reward_path is not None:
            check_reward_model(
                load_config(self.reward_path, "model.reward_path"), self.reward_path, "model.reward_path"
            )
            theirs = load_tokenizer(self.reward_path, self.tokenizer.pad_token, "model.reward_path")
            if theirs.get_vocab() != self.tokenizer.get_vocab():
                raise UserError(
                    f"The reward model {self.reward_path} has another tokenizer than the policy {self.model_path}; "
                    "train it from the same SFT model."
                )

    @property
    def response_room(self) -> int:
        """Responses of the rollout."""
        return self.ppo.response_length

    # ------------------------------------------------------------------------------------------------------ models

    def configure_model(self) -> None:
        """Load policy and critic, once (D24)."""
        if self.actor_critic is not None:
            return
        if self.reward_path is not None:
            critic = ScalarModel.from_pretrained(self.reward_path, "model.reward_path", self.weights_dtype)
        else:
            critic = ScalarModel.from_policy(self.model_path, self.seed, dtype=self.weights_dtype)
        critic = critic.to(self.weights_device)
        policy: Any = load_causal_lm(self.model_path, dtype=self.weights_dtype)
        self.actor_critic = ActorCritic(policy.to(self.weights_device), critic)
        if self.activation_checkpointing:
            checkpoint_activations(policy)
            checkpoint_activations(critic.model)

    def setup(self, stage: str) -> None:
        """ZeRO-3 shares its processes with the strategy."""
        super().setup(stage)
        if "zero3" in self.placements and not isinstance(self.trainer.strategy, Zero2Strategy):
            raise UserError(
                "model.reference_placement and reward_placement zero3 need trainer.strategy zero2; use cpu."
            )

    @property
    def placements(self) -> tuple[Placement, Placement]:
        """Of reference and reward model."""
        return self.reference_placement, self.reward_placement

    def _load_frozen(self) -> None:
        """Reference and reward model, in the precision that the policy has now, so that the first KL is exactly 0."""
        dtype = next(self.actor_critic.policy.parameters()).dtype
        if self.reference is None and self.trainer.training:
            reference = load_causal_lm(self.reference_path, "model.reference_path", dtype)
            self.reference = FrozenModel(reference, self.reference_placement)
        if self.reward_model is None and self.reward_path is not None:
            reward_model = ScalarModel.from_pretrained(self.reward_path, "model.reward_path", dtype)
            self.reward_model = FrozenModel(reward_model, self.reward_placement)

    def on_fit_start(self) -> None:
        """Load the frozen models; the reference is needed in training only."""
        self._load_frozen()

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    @property
    def frozen_models(self) -> list[FrozenModel[Any]]:
        """Reference and reward model, those that are loaded."""
        return [model for model in (self.reference, self.reward_model) if model is not None]

    # -------------------------------------------------------------------------------------------- what should hold

    @property
    def starts_at_reference(self) -> bool:
        """Whether policy and reference are the same model before the first update (D24)."""
        return self.reference_path == self.model_path

    @property
    def critic_starts_at_reward(self) -> bool:
        """Whether values equal rewards before the first update (D24)."""
        own_reward = type(self).score_responses is not ExperienceModule.score_responses
        return self.reward_path is not None and self.reward_function is None and not own_reward

    def padding_side_difference(self, batch: Rollout) -> Tensor | None:
        """Of the reward model, on a slice of the rollout."""
        if self.reward_model is None:
            return None
        with self.reward_model.on(self.device) as model, self.autocast():
            return model.padding_side_difference(*join(batch.queries, batch.query_mask, batch.responses, batch.mask))

    def demonstration_rewards(self) -> Tensor | None:
        """Of the reward model, on the references of some prompts, where there are any."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        batches = data.demonstration_dataloader()
        if self.reward_model is None or batches is None:
            return None
        with torch.no_grad(), self.reward_model.on(self.device) as model, self.autocast():
            pairs = ((b["input_ids"].to(self.device), b["attention_mask"].to(self.device)) for b in batches)
            return torch.cat([model.score(ids, mask) for ids, mask in pairs])

    # ----------------------------------------------------------------------------------------------------- rollout

    @torch.no_grad()
    def rollout(self, batch: dict[str, Any], update: int) -> Rollout:
        """One batch of experience, from prompts to advantages.

        Args:
            batch: `queries (N, P)` padded on the left, `query_mask (N, P)`, `texts`: per row `query`, `reference`,
                `record`; `chunk`: how many of the longest rows go through a model at a time, and more of shorter ones.
            update: the number of this update; it seeds the sampling.
        """
        start = time.perf_counter()
        queries, query_mask = batch["queries"], batch["query_mask"]
        tokens = batch["chunk"] * (queries.shape[1] + self.ppo.response_length)
        # 1. Sample responses; everything after the first EOS is PAD.
        random = generator(self.device, update, self.global_rank)
        responses = self._sample_groups(queries, query_mask, tokens, self.ppo.temperature, random)
        lengths, has_eos = response_lengths(responses, self.tokenizer.eos_token_id)
        responses = self._widen(responses, lengths)
        mask, value_mask = response_masks(lengths, responses.shape[1], self.ppo.score_position)
        texts = self._with_responses(batch["texts"], responses, mask)
        episodes = Rollout(
            texts, queries=queries, query_mask=query_mask, responses=responses, lengths=lengths, has_eos=has_eos,
            mask=mask, value_mask=value_mask,
        )  # fmt: skip
        start = self._clock("sampling", start)
        # 2. Log-probabilities and values of the networks that will be trained, then of the reference.
        groups = self._groups(episodes, tokens)
        now = in_groups(episodes, groups, self._evaluate)
        episodes.logprobs, episodes.values = now[0], torch.where(value_mask, now[1], 0.0)
        start = self._clock("values", start)
        episodes.ref_logprobs = self._reference_logprobs(episodes, groups)
        start = self._clock("reference", start)
        # 3. One score per response; the EOS trick.
        episodes.scores = self._final_scores(episodes, self._score(episodes, groups))
        start = self._clock("reward", start)
        # 4. Episodes that are not to be learnt from.
        keep = self.keep_episodes(episodes).to(self.device).unsqueeze(1)
        episodes.mask, episodes.value_mask = mask & keep, value_mask & keep
        # 5. Rewards per token: the KL penalty, and the score where it lands.
        kl = kl_estimate(episodes.logprobs, episodes.ref_logprobs, self.ppo.kl_estimator)
        episodes.kl = torch.where(mask, kl, 0.0)
        episodes.rewards = self.token_rewards(episodes)
        if self.ppo.whiten_rewards:
            episodes.rewards = whiten(episodes.rewards, episodes.value_mask, False, self.reduce_sum)
        # 6. Advantages and returns.
        episodes.advantages, episodes.returns = gae(episodes.rewards, episodes.values, self.ppo.gamma, self.ppo.lam)
        episodes.returns = torch.where(episodes.value_mask, episodes.returns, 0.0)
        episodes.advantages = self._whiten_advantages(episodes)
        self._clock("advantages", start)
        return episodes

    def sample_responses(self, queries: Tensor, query_mask: Tensor, temperature: float, uniforms: Tensor) -> Tensor:
        """Token ids `(n, r)` for left-padded queries `(n, P)`. Override this to sample with another engine.

        Args:
            uniforms: `(n, response_length)`, the random numbers of each row. An engine that draws its own may take its
                seed from them.
        """
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        draw = sample_in_graph if self.ppo.cuda_graphs else sample
        policy = self.actor_critic.policy
        return draw(policy, queries, query_mask, uniforms, temperature=temperature, eos_id=eos, pad_id=pad)

    def score_responses(self, episodes: Rollout) -> Tensor:
        """The reward of every episode, `(N,)`: reward model, reward function, or their sum. Override for your own.

        Args:
            episodes: with `queries`, `responses`, their masks, `lengths`, `has_eos`, and `texts`.
        """
        scores = torch.zeros(len(episodes), device=self.device)
        if self.reward_model is not None:
            ids, mask = join(episodes.queries, episodes.query_mask, episodes.responses, episodes.mask)
            with self.reward_model.on(self.device) as model, self.autocast():
                scores = model.score(ids, mask)
        if self.reward_function is not None:
            scores = scores + self._call(self.reward_function, episodes.texts)
        return scores

    def keep_episodes(self, episodes: Rollout) -> Tensor:
        """Which episodes to learn from, bool `(N,)`; by default all.

        The others count in no loss and no whitening. The curves of the rollout show all episodes.
        """
        return torch.ones(len(episodes), dtype=torch.bool, device=self.device)

    def token_rewards(self, episodes: Rollout) -> Tensor:
        """Rewards per token `(N, R)` from `kl (N, R)` and `scores (N,)` (D28, D29)."""
        index = score_index(episodes.lengths, episodes.responses.shape[1], self.ppo.score_position)
        return token_rewards(episodes.kl, episodes.scores, index, episodes.mask, self.kl_control.coefficient)

    # -------------------------------------------------------------------------------------------- rollout, smaller

    def _sample_groups(
        self, queries: Tensor, query_mask: Tensor, tokens: int, temperature: float, random: torch.Generator
    ) -> Tensor:
        """Responses `(N, R)`, sampled in groups of similar length of at most `tokens` tokens with padding."""
        eos, pad, longest = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, self.ppo.response_length
        numbers = uniforms(len(queries), longest, random)
        responses = torch.full((len(queries), longest), pad, device=queries.device)
        width = 1
        for rows in by_length((query_mask.sum(1) + longest).tolist(), tokens, shortest=0):
            first = int(query_mask[rows].any(0).long().argmax())
            inputs = queries[rows, first:], query_mask[rows, first:]
            with self.autocast():
                part = self.sample_responses(*inputs, temperature, numbers[rows])
            responses[rows, : part.shape[1]] = part
            width = max(width, part.shape[1])
        return truncate_after_eos(responses[:, :width], eos, pad)

    def _groups(self, episodes: Rollout, tokens: int) -> list[list[int]]:
        """Rows that go through a model together, at most `tokens` with padding; under ZeRO-3 as many everywhere."""
        lengths = episodes.total_lengths()
        groups = by_length(lengths, tokens)
        if "zero3" not in self.placements:
            return groups
        most, fewest_rows = self.reduce_max(torch.tensor([len(groups), -len(lengths)], device=self.device)).tolist()
        return split(lengths, min(most, -fewest_rows))

    def _widen(self, responses: Tensor, lengths: Tensor) -> Tensor:
        """One more column where the longest response leaves room for it, for the score after EOS (D29)."""
        width = min(int(lengths.max()) + 1, self.ppo.response_length)
        pad = self.tokenizer.pad_token_id
        return torch.nn.functional.pad(responses, (0, max(0, width - responses.shape[1])), value=pad)

    def _with_responses(self, texts: list[dict[str, Any]], responses: Tensor, mask: Tensor) -> list[dict[str, Any]]:
        tokens = [row[keep].tolist() for row, keep in zip(responses, mask, strict=True)]
        decoded = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [{**text, "response": response} for text, response in zip(texts, decoded, strict=True)]

    def _evaluate(self, part: Rollout) -> tuple[Tensor, Tensor]:
        with self.autocast():
            now = self._networks(part)
        return now.logprobs, now.values

    def _networks(self, part: Rollout) -> Evaluation:
        return self.actor_critic(part.queries, part.query_mask, part.responses, part.mask, self.ppo.temperature)

    def _reference_logprobs(self, episodes: Rollout, groups: list[list[int]]) -> Tensor:
        assert self.reference is not None
        with self.reference.on(self.device) as reference, self.autocast():

            def logprobs(part: Rollout) -> tuple[Tensor]:
                inputs = (part.queries, part.query_mask, part.responses, part.mask)
                return (response_logprobs(reference, *inputs, self.ppo.temperature)[0],)

            return in_groups(episodes, groups, logprobs)[0]

    def _score(self, episodes: Rollout, groups: list[list[int]]) -> Tensor:
        def scores(part: Rollout) -> tuple[Tensor]:
            values = self.score_responses(part).to(self.device, torch.float32)
            if values.shape != (len(part),):
                raise UserError(f"score_responses gave shape {tuple(values.shape)} for {len(part)} episodes.")
            return (values,)

        with self.reward_model.on(self.device) if self.reward_model is not None else nullcontext():
            return in_groups(episodes, groups, scores)[0]

    def _final_scores(self, episodes: Rollout, scores: Tensor) -> Tensor:
        if self.ppo.missing_eos_score is None:
            return scores
        return penalise_missing_eos(scores, episodes.has_eos, self.ppo.missing_eos_score, self.ppo.missing_eos)

    def _call(self, function: RewardFunction, texts: list[dict[str, Any]]) -> Tensor:
        names = ("query", "response", "record")
        values = function(*([text[name] for text in texts] for name in names))
        if len(values) != len(texts):
            raise UserError(f"{function.__name__} gave {len(values)} rewards for {len(texts)} responses.")
        return torch.tensor([float(v) for v in values], device=self.device)

    def _whiten_advantages(self, episodes: Rollout) -> Tensor:
        if self.ppo.whiten_advantages == "off":
            return torch.where(episodes.mask, episodes.advantages, 0.0)
        if self.ppo.whiten_advantages == "rank":
            return whiten(episodes.advantages, episodes.mask)
        return whiten(episodes.advantages, episodes.mask, reduce=self.reduce_sum)

    def _clock(self, phase: str, start: float) -> float:
        torch.get_device_module(self.device).synchronize()
        now = time.perf_counter()
        self.seconds[phase] = now - start
        return now

    # -------------------------------------------------------------------------------------------------- evaluation

    def respond(self, batch: dict[str, Any], seed: int) -> Rollout:
        """Responses at the evaluation temperature, with their scores (without the EOS trick)."""
        queries, query_mask = batch["queries"], batch["query_mask"]
        random = generator(self.device, 0, seed, self.global_rank)
        temperature = self.ppo.evaluation_temperature
        tokens = len(queries) * (queries.shape[1] + self.ppo.response_length)
        responses = self._sample_groups(queries, query_mask, tokens, temperature, random)
        lengths, has_eos = response_lengths(responses, self.tokenizer.eos_token_id)
        mask, value_mask = response_masks(lengths, responses.shape[1])
        episodes = Rollout(
            self._with_responses(batch["texts"], responses, mask), queries=queries, query_mask=query_mask,
            responses=responses, lengths=lengths, has_eos=has_eos, mask=mask, value_mask=value_mask,
        )  # fmt: skip
        episodes.scores = self._score(episodes, self._groups(episodes, tokens))
        return episodes
