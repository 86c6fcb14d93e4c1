"""What must hold while a stage trains: the list of invariants, and what was found."""

from typing import NamedTuple


class Invariant(NamedTuple):
    """What is measured, and what a user should know if it is too large."""

    detail: str  # the entry in docs/details.md
    what: str  # the number that is measured
    cause: str  # what usually makes it too large
    look_at: str  # the setting to look at


INVARIANTS = {
    "ratio": Invariant(
        "D33",
        "largest deviation of the PPO ratio from 1 before the first step of an update",
        "rollout and training differ in precision, temperature, padding or dropout",
        "trainer.precision, and what a subclass changes in `sample_responses` or `loss`",
    ),
    "engine": Invariant(
        "D25",
        "mean difference between the log-probabilities of the engine that sampled and of the policy",
        "the engine has not the policy's weights of this update, or computes in another precision",
        "model.sampler, trainer.precision, and what a subclass changes in `sample_responses`",
    ),
    "first_kl": Invariant(
        "D24",
        "largest difference between the log-probabilities of policy and reference before the first update",
        "the reference is another model than the policy starts from, or has another precision",
        "model.reference_path and trainer.precision",
    ),
    "first_value": Invariant(
        "D24",
        "largest difference between the value of a finished response and its reward before the first update",
        "the critic does not start from the reward model, or reads another token",
        "model.reward_path and trainer.precision",
    ),
    "demonstration_reward": Invariant(
        "D21",
        "distance of the mean reward of demonstrations from 0",
        "the reward model was exported without its shift, or was centred on other data",
        "data.demonstrations of the reward stage and model.reward_path",
    ),
    "padding_side": Invariant(
        "D20",
        "largest difference between the rewards of left- and right-padded sequences",
        "positions are not derived from the mask, or the precision is too low",
        "trainer.precision, and the position ids of the model",
    ),
    "kl": Invariant(
        "D28",
        "mean KL per response below 0 by more than its noise, in nats",
        "responses are not samples of the policy at model.ppo.temperature, or policy and reference are exchanged",
        "model.ppo.temperature, and what a subclass changes in `sample_responses`",
    ),
    "kl_ceiling": Invariant(
        "D28",
        "mean KL per response in nats",
        "the policy has left the texts that the reward model can judge",
        "model.ppo.kl_coefficient and model.optimization.learning_rate",
    ),
    "ranks": Invariant(
        "D12",
        "number of weight tensors in which the processes differ",
        "the nodes read different model folders, or a step was taken on one process only",
        "model.model_path on every node, and trainer.strategy",
    ),
    "dropout": Invariant(
        "D10",
        "number of places where dropout is on",
        "something switched it on after the start",
        "the callbacks in trainer.callbacks, and what a subclass changes in `configure_model`",
    ),
    "finite": Invariant(
        "D35",
        "number of losses or gradient norms that are not finite",
        "the learning rate is too high, or a subclass divides by zero",
        "model.optimization.learning_rate and trainer.gradient_clip_val",
    ),
    "finite_rewards": Invariant(
        "D31",
        "number of rewards that are not finite",
        "a reward function returned inf or nan",
        "model.reward_function and model.reward_path",
    ),
    "once_per_epoch": Invariant(
        "D13",
        "examples that were seen too often or too seldom",
        "every process shuffles by its own seed, or the loader was replaced",
        "data, and trainer.use_distributed_sampler",
    ),
}


class Finding(NamedTuple):
    """One measurement of an invariant."""

    name: str
    value: float
    limit: float
    fatal: float = float("inf")  # beyond it, the value is an error even if only a warning is asked for

    @property
    def holds(self) -> bool:
        """Whether the value is within its limit; NaN is not."""
        return self.value <= self.limit

    def __str__(self) -> str:
        known = INVARIANTS[self.name]
        return (
            f"Invariant {self.name} ({known.detail}): the {known.what} is {self.value:.3g}, above {self.limit:.3g}. "
            f"Usual cause: {known.cause}. Look at {known.look_at}."
        )


class Tolerance(NamedTuple):
    """The largest errors of rounding: of a ratio or log-probability, and of a reward or value of size 1.

    `engine` is that of the mean difference between the log-probabilities of two programs.
    """

    ratio: float
    reward: float
    engine: float


def tolerance(precision: str) -> Tolerance:
    """Returns the tolerance that a precision of the Trainer needs (`32-true`, `bf16-mixed`, ...).

    In 16 bit the logits themselves are rounded. If rows are padded to another width, a rounding that goes the other way
    moves one log-probability by up to the spacing of numbers there.
    """
    if precision.startswith("bf16"):
        return Tolerance(ratio=0.25, reward=0.1, engine=0.05)
    if precision.startswith("16"):
        return Tolerance(ratio=0.05, reward=0.02, engine=0.01)
    return Tolerance(ratio=1e-4, reward=1e-3, engine=1e-4)
