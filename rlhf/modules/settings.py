"""Groups of settings, with the paper's values as defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.checks import above, at_least, at_most
from rlhf.ops.rewards import KLEstimator, MissingEOS, ScorePosition

LossReduction = Literal["minibatch", "microbatch"]


@dataclass(frozen=True)
class Optimization:
    """AdamW and its schedule (D11): the paper's values, the same in all three stages.

    Attributes:
        learning_rate: the highest learning rate.
        eps: AdamW's epsilon.
        weight_decay: AdamW's decoupled weight decay (torch's default, which the reference uses).
        schedule: `cosine` or `linear` to 0, or `constant`.
        warmup_steps: optimizer steps (PPO: updates) from 0 to the learning rate.
        loss_reduction: `minibatch` averages the loss over the real tokens or pairs of the whole global batch;
            `microbatch` averages the means of the micro-batches, as the reference does (D14).
    """

    learning_rate: float = 3e-6
    eps: float = 1e-5
    weight_decay: float = 0.01
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    loss_reduction: LossReduction = "minibatch"

    def __post_init__(self) -> None:
        above("model.optimization.learning_rate", self.learning_rate, 0)
        for name in ("eps", "weight_decay", "warmup_steps"):
            at_least(f"model.optimization.{name}", getattr(self, name), 0)


@dataclass(frozen=True)
class PPOSettings:
    """The details of PPO; the defaults are the paper's.

    Attributes:
        response_length: longest response in tokens.
        temperature: of the sampling and of all log-probabilities (D25, D26).
        ppo_epochs: passes over each batch (D33).
        minibatches: optimizer steps per pass (D33).
        gamma, lam: of the advantage estimation (D31).
        kl_coefficient: of the KL penalty in the reward; the start value where it adapts (D28).
        kl_estimator: `k1`, `k2`, `k3` or `abs` (D28).
        kl_target: mean KL per response in nats to adapt the coefficient to; null keeps it fixed.
        kl_horizon: episodes over which the coefficient adapts.
        missing_eos_score: score of a response without EOS (D27); null switches the EOS trick off.
        missing_eos: `replace` the score by that value, or `subtract` it (D27).
        score_position: the score lands `after_eos` or on the `eos` (D29).
        whiten_rewards: scale the rewards to variance 1, keeping their mean (D30).
        whiten_advantages: over the `global` batch, each `rank`'s own, or `off` (D32).
        clip: of the policy's ratio (D34).
        value_clip: of the value; null: no clipping (D34).
        value_coefficient: weight of the value loss (D34).
        entropy_coefficient: weight of an entropy bonus (D35).
        critic_warmup: updates at the beginning in which the critic learns alone. The policy's weights stay as they are
            to the last bit, and AdamW begins with it afterwards as with a new one; the schedule of the learning rate
            counts these updates. The paper has none; with a large learning rate the policy would follow the first,
            wrong values.
        evaluation_temperature: of the samples in validation (D37).
        cuda_graphs: sample with a cache of fixed size and, on a GPU, replay one captured step instead of launching its
            kernels anew. The same responses up to rounding. Not yet run on a GPU, so it is off.
    """

    response_length: int = 53
    temperature: float = 0.7
    ppo_epochs: int = 4
    minibatches: int = 1
    gamma: float = 1.0
    lam: float = 0.95
    kl_coefficient: float = 0.05
    kl_estimator: KLEstimator = "k1"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    missing_eos_score: float | None = -1.0
    missing_eos: MissingEOS = "replace"
    score_position: ScorePosition = "after_eos"
    whiten_rewards: bool = False
    whiten_advantages: Literal["global", "rank", "off"] = "global"
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_coefficient: float = 0.1
    entropy_coefficient: float = 0.0
    critic_warmup: int = 0
    evaluation_temperature: float = 0.01
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("response_length", "ppo_epochs", "minibatches", "kl_horizon"):
            at_least(f"model.ppo.{name}", getattr(self, name), 1)
        for name in ("gamma", "lam", "kl_coefficient", "value_coefficient", "critic_warmup"):
            at_least(f"model.ppo.{name}", getattr(self, name), 0)
        for name in ("gamma", "lam"):
            at_most(f"model.ppo.{name}", getattr(self, name), 1)
        for name in ("temperature", "evaluation_temperature", "clip"):
            above(f"model.ppo.{name}", getattr(self, name), 0)
        for name in ("kl_target", "value_clip"):
            value = getattr(self, name)
            if value is not None:
                above(f"model.ppo.{name}", value, 0)
