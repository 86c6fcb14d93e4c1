"""Signs that a run has learnt nothing: when each one counts, its usual cause, and what to change."""

from collections.abc import Sequence
from typing import NamedTuple

from rlhf.models.learning_rates import is_usual, proposed_learning_rate

HARDLY_ANY = 0.1  # share of responses with EOS
BETTER = 0.65  # an accuracy that is clearly better than chance
HARDLY_CHANGED = 0.005  # of a loss
STEPS = 10  # of the optimizer, before a loss counts
EPISODES = 64  # with equal scores, before that counts
NO_KL = 1e-3  # nats per response
SAME = 0.9  # share of responses that are the same


class Symptom(NamedTuple):
    """What is measured, when it counts, and what a user should know then."""

    measured: str
    counts: str  # always such that a run which is too short to tell has no symptom
    cause: str
    change: str


SYMPTOMS = {
    "learning_rate": Symptom(
        "the highest learning rate, at the start of every stage",
        "it is below a tenth of what is usual for the size of the model, or above thirty times that",
        "the default is the paper's, for a billion parameters and more; a smaller model hardly moves at it",
        "model.optimization.learning_rate",
    ),
    "loss": Symptom(
        "the losses of the rows of the first step, before it, after half of the training and after all of it (SFT, "
        "reward model)",
        "after 10 steps or more, they differ by less than 0.5% on average, or their mean is higher by more than 5% and "
        "its interval",
        "the learning rate is too low for the size of the model, or so high that training diverges",
        "model.optimization.learning_rate, or train longer (trainer.max_epochs)",
    ),
    "no_eos": Symptom(
        "the share of responses with EOS: in validation in the second half of SFT, of the last four rollouts of PPO "
        "under the EOS trick, and of judged tables",
        "its 95% interval lies below a tenth, for which it takes 35 responses",
        "SFT has not learned to end a response (too low a learning rate, too few steps), its demonstrations were "
        "longer than data.text.max_response_length and lost their EOS, or responses may not be as long as they",
        "model.optimization.learning_rate and trainer.max_epochs of SFT, or the longest lengths",
    ),
    "chance": Symptom(
        "the accuracy on validation pairs in the second half of the training of the reward model",
        "its 95% interval holds 0.5 and lies below 0.65",
        "the learning rate is too low or there are too few comparisons, or chosen and rejected are mixed up",
        "model.optimization.learning_rate of the reward model, and look at data.train",
    ),
    "equal_scores": Symptom(
        "the largest difference between the scores of an update of PPO",
        "it has been 0 for 64 episodes or more in a row; in `check`, in its one update",
        "no response ends with EOS, so that each gets model.ppo.missing_eos_score, or the reward does not tell "
        "responses apart; there is nothing to learn from",
        "model.ppo.response_length or the SFT model, model.reward_path, model.reward_function",
    ),
    "no_kl": Symptom(
        "the KL to the reference per response in PPO (half the squared difference of log-probabilities), where the "
        "policy starts at the reference",
        "it was below 0.001 nats in the last five updates, after as many updates as five at the full learning rate",
        "the learning rate is too low for the size of the model, all scores are equal, or the KL penalty is too high",
        "model.optimization.learning_rate, model.ppo.kl_coefficient",
    ),
    "same_responses": Symptom(
        "the share of queries to which PPO and SFT gave the same response, in judged tables",
        "its 95% interval lies above 0.9, for which it takes 35 queries",
        "PPO has not moved the policy: too low a learning rate, scores that are all equal, or too few updates",
        "model.optimization.learning_rate and trainer.max_epochs of PPO",
    ),
}


def sentences(name: str, found: str) -> str:
    """Says what was found, its usual cause, and what to change."""
    known = SYMPTOMS[name]
    return f"{found} Usual cause: {known.cause}. Change {known.change}."


def unusual_learning_rate(learning_rate: float, parameters: int, adapters: bool = False) -> str | None:
    """Judges a learning rate by the size of the model."""
    if is_usual(learning_rate, parameters, adapters):
        return None
    proposed = proposed_learning_rate(parameters, adapters)
    side = "low" if learning_rate < proposed else "high"
    of = "adapters of " if adapters else ""
    found = f"The learning rate {learning_rate:.1e} is {side} for {of}a model of {parameters:,} parameters"
    return sentences("learning_rate", f"{found}; try {proposed:.1e}.")


def unmoved_loss(before: Sequence[float], after: Sequence[float], steps: int) -> str | None:
    """Judges the losses of the same rows before training and after some optimizer steps."""
    from rlhf.evaluation.statistics import mean_interval

    if steps < STEPS or not before:
        return None
    changes = [y - x for x, y in zip(before, after, strict=True)]
    first, last = sum(before) / len(before), sum(after) / len(after)
    if sum(map(abs, changes)) / len(changes) < HARDLY_CHANGED * first:
        found = "did not fall"
    elif last - first > 0.05 * first and mean_interval(changes).low > 0.05 * first:
        found = "rose"
    else:
        return None
    numbers = f"{first:.4f} before training, and {last:.4f} after {steps} steps"
    return sentences("loss", f"The loss {found}: on the rows of the first step it was {numbers}.")


def hardly_any_eos(ends: float, responses: float, whose: str) -> str | None:
    """Judges how many responses end with EOS."""
    from rlhf.evaluation.statistics import proportion

    if not responses or ends >= HARDLY_ANY * responses or proportion(ends / responses, responses).high >= HARDLY_ANY:
        return None
    return sentences("no_eos", f"Hardly any response of {whose} ends with EOS: {ends:.0f} of {responses:.0f}.")


def at_chance(right: float, pairs: float) -> str | None:
    """Judges the accuracy of a reward model."""
    from rlhf.evaluation.statistics import proportion

    if not pairs:
        return None
    found = proportion(right / pairs, pairs)
    if found.low > 0.5 or found.high >= BETTER:
        return None
    return sentences(
        "chance",
        f"The reward model is at chance: its accuracy on {pairs:.0f} validation pairs is {found.value:.3f} "
        f"({found.low:.3f} to {found.high:.3f}).",
    )


def same_responses(same: int, queries: int) -> str | None:
    """Judges to how many queries two policies gave the same response."""
    from rlhf.evaluation.statistics import proportion

    if not queries or proportion(same / queries, queries).low <= SAME:
        return None
    found = f"PPO and SFT gave the same response to {same} of {queries} queries: the policy is the SFT model."
    return sentences("same_responses", found)
