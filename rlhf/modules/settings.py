"""Groups of settings, with the paper's values as defaults."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from rlhf.errors import Finite, Fraction, NonNegative, Positive, UserError
from rlhf.ops.token_rewards import KLEstimator, MissingEOS, ScorePosition
from rlhf.sampling.vllm_process import CACHE_GIB

OF_A_CRITIC = (
    "gamma", "lam", "score_position", "whiten_rewards", "value_clip", "value_coefficient", "critic_warmup",
)  # fmt: skip


@dataclass(frozen=True, config=ConfigDict(title="model.optimization"))
class Optimization:
    """AdamW and its schedule: the paper's values, the same in all three stages (D11).

    Attributes:
        learning_rate: the highest learning rate.
        eps: AdamW's epsilon.
        weight_decay: AdamW's decoupled weight decay (torch's default, which the reference uses).
        schedule: `cosine` or `linear` to 0, or `constant`.
        warmup_steps: optimizer steps (PPO: updates) from 0 to the learning rate.
        loss_reduction: `minibatch` averages the loss over the real tokens or pairs of the whole global batch;
            `microbatch` averages the means of the micro-batches, as the reference does (D14).
    """

    learning_rate: Positive = 3e-6
    eps: NonNegative = 1e-5
    weight_decay: NonNegative = 0.01
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    loss_reduction: Literal["minibatch", "microbatch"] = "minibatch"


@dataclass(frozen=True, config=ConfigDict(title="model.dpo"))
class DPOSettings:
    """The details of DPO; the defaults are those of the paper's authors.

    Attributes:
        beta: weight of the KL penalty that the loss stands for; an implicit reward is beta x the log-ratio.
        loss: `sigmoid`, DPO's own, or `ipo`.
        label_smoothing: of the sigmoid loss: how often labels are taken to be wrong.
        length_normalised: take means over the tokens of a response in place of sums of log-probabilities.
    """

    beta: Positive = 0.05
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: Annotated[Fraction, Field(lt=0.5)] = 0.0
    length_normalised: bool = False

    def __post_init__(self) -> None:
        if self.loss == "ipo" and self.label_smoothing:
            raise UserError(
                "model.dpo.label_smoothing is for the sigmoid loss, but model.dpo.loss is ipo; leave it at 0."
            )


@dataclass(frozen=True, config=ConfigDict(title="model.ppo"))
class PPOSettings:
    """The details of PPO; the defaults are the paper's.

    Attributes:
        response_length: longest response in tokens.
        temperature: of the sampling and of all log-probabilities (D25, D26).
        ppo_epochs: passes over each batch (D33).
        minibatches: optimizer steps per pass (D33).
        advantage: `gae`, of a critic (D31); or without one, of the episode's whole reward: `leave_one_out` compares it
            with those of the other responses to the prompt (RLOO), `group_normalised` with the mean and standard
            deviation of all of them (GRPO).
        samples_per_prompt: responses to each prompt of a batch.
        gamma: discount of the advantage estimation (D31).
        lam: lambda of the advantage estimation (D31).
        kl_coefficient: weight of the KL penalty; the initial value if it adapts (D28).
        kl_in: subtract the penalty from the `reward`, or add it to the `loss`, as GRPO does.
        kl_estimator: `k1`, `k2`, `k3` or `abs` (D28).
        kl_target: mean KL per response in nats to adapt the coefficient to; null keeps it fixed.
        kl_horizon: episodes over which the coefficient adapts.
        missing_eos_score: score of a response without EOS; null switches the EOS trick off (D27).
        missing_eos: `replace` the score by that value, or `subtract` it (D27).
        score_position: add the score to the token `after_eos` or to the `eos` (D29).
        whiten_rewards: scale the rewards to variance 1, keeping their mean (D30).
        whiten_advantages: over the `global` batch, over each `rank`'s own, or `off` (D32); null: `global` with a
            critic, `off` without.
        clip: clipping range of the policy's ratio (D34).
        value_clip: clipping range of the value; null: no clipping (D34).
        value_coefficient: weight of the value loss (D34).
        entropy_coefficient: weight of an entropy bonus (D35).
        critic_warmup: updates at the beginning in which only the critic learns. The policy's weights stay bit-equal,
            and AdamW starts afresh for them afterwards; the learning-rate schedule counts these updates. The paper has
            none; at a large learning rate the policy would follow the first, wrong values.
        evaluation_temperature: of the samples in validation (D37).
        cuda_graphs: sample with a cache of fixed size and, on a GPU, replay one captured step instead of launching its
            kernels again: the same responses up to rounding, twice as fast on an H200. Null: on a GPU, if it can
            capture a step of the model. True elsewhere: the cache alone.
        vllm_cache_gib: with `model.sampler` vllm, memory of its cache of keys and values, in GiB.
        importance_cap: with `model.sampler` vllm, weigh each token in the policy's loss by how much more probable it is
            for the policy than for the engine, up to this (2 in Yao et al. 2025); null: no weights.
    """

    response_length: PositiveInt = 53
    temperature: Positive = 0.7
    ppo_epochs: PositiveInt = 4
    minibatches: PositiveInt = 1
    advantage: Literal["gae", "leave_one_out", "group_normalised"] = "gae"
    samples_per_prompt: PositiveInt = 1
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    kl_coefficient: NonNegative = 0.05
    kl_in: Literal["reward", "loss"] = "reward"
    kl_estimator: KLEstimator = "k1"
    kl_target: Positive | None = None
    kl_horizon: PositiveInt = 10_000
    missing_eos_score: Finite | None = -1.0
    missing_eos: MissingEOS = "replace"
    score_position: ScorePosition = "after_eos"
    whiten_rewards: bool = False
    whiten_advantages: Literal["global", "rank", "off"] | None = None
    clip: Positive = 0.2
    value_clip: Positive | None = 0.2
    value_coefficient: NonNegative = 0.1
    entropy_coefficient: Finite = 0.0
    critic_warmup: NonNegativeInt = 0
    evaluation_temperature: Positive = 0.01
    cuda_graphs: bool | None = None
    vllm_cache_gib: Positive = CACHE_GIB
    importance_cap: Positive | None = None

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained beside the policy."""
        return self.advantage == "gae"

    def check(self) -> None:
        """Refuses settings that do not go together."""
        if not self.has_critic:
            if self.samples_per_prompt < 2:
                raise UserError(
                    f"model.ppo.advantage {self.advantage} compares the responses to a prompt, but "
                    "model.ppo.samples_per_prompt is 1; set it to 2 or more."
                )
            others = [name for name in OF_A_CRITIC if getattr(self, name) != getattr(PPOSettings(), name)]
            if others:
                raise UserError(
                    f"model.ppo.{others[0]} is for a critic, which model.ppo.advantage {self.advantage} does without; "
                    f"leave it at {getattr(PPOSettings(), others[0])}."
                )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise UserError(
                "model.ppo.kl_estimator is k1, whose gradient in the loss is 0 on average, whatever the KL; with "
                "model.ppo.kl_in loss set it to k3 or k2."
            )
        if self.kl_in == "loss" and self.kl_target is not None:
            raise UserError(
                "model.ppo.kl_target adapts a penalty in the reward, but model.ppo.kl_in is loss; leave one out."
            )
