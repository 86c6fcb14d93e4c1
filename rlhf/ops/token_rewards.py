"""From scores and log-probabilities to one reward per token."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.ops.masking import Values

KLEstimator = Literal["k1", "k2", "k3", "abs"]
ScorePosition = Literal["after_eos", "eos"]
MissingEOS = Literal["replace", "subtract"]
PerToken = Float[Tensor, "B R"]
PerRow = Float[Tensor, " B"]
Columns = Int[Tensor, " B"]


def kl_estimate(logprobs: Values, ref_logprobs: Values, estimator: KLEstimator = "k1") -> Values:
    """Estimates KL(policy || reference) at each token from samples of the policy (D28).

    With d = logprob - ref_logprob: k1 = d (unbiased), k2 = d^2 / 2, k3 = exp(-d) - 1 + d (unbiased, never negative;
    Schulman 2020, "Approximating KL divergence"), abs = |d|.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d**2
    if estimator == "k3":
        return torch.expm1(-d) + d
    return d.abs()


def penalise_missing_eos(
    scores: PerRow, has_eos: Bool[Tensor, " B"], value: float, mode: MissingEOS = "replace"
) -> PerRow:
    """Applies the "EOS trick" (D27): a response without EOS gets the score `value`, or loses `abs(value)`."""
    penalised = torch.full_like(scores, value) if mode == "replace" else scores - abs(value)
    return torch.where(has_eos, scores, penalised)


def score_index(lengths: Columns, width: int, position: ScorePosition = "after_eos") -> Columns:
    """Returns the column on which each score lands (D29).

    `after_eos`: the column after the last real token where there is one, else the last column. `eos`: the last real
    token. `width` is the longest response that the sampler may give, so that a response which ends exactly there gets
    its score on its last token, as in the reference.
    """
    return (lengths if position == "after_eos" else lengths - 1).clamp(max=width - 1)


def token_rewards(
    kl: PerToken, scores: PerRow, index: Columns, mask: Bool[Tensor, "B R"], coefficient: float
) -> PerToken:
    """Computes `reward[t] = -coefficient x kl[t]`, plus the score at `index` (D28, D29).

    Args:
        mask: true on real response tokens; the penalty is 0 elsewhere. A row without any, an episode that is not to be
            learnt from, has no score either.
    """
    rewards = torch.where(mask, -coefficient * kl, 0.0)
    scores = torch.where(mask.any(1), scores, 0.0)
    return rewards.scatter_add(1, index.unsqueeze(1), scores.unsqueeze(1))
