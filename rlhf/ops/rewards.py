"""From scores and log-probabilities to one reward per token."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3", "abs"]
ScorePosition = Literal["after_eos", "eos"]
MissingEOS = Literal["replace", "subtract"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) from samples of the policy (D28). `(B, R) -> (B, R)`.

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
    if estimator == "abs":
        return d.abs()
    raise ValueError(f"kl_estimator is {estimator!r}; choose one of {', '.join(get_args(KLEstimator))}")


def penalise_missing_eos(scores: Tensor, has_eos: Tensor, value: float, mode: MissingEOS = "replace") -> Tensor:
    """The "EOS trick" (D27): a response without EOS gets the score `value`, or loses `abs(value)` of its score.

    Args:
        scores: `(B,)`.
        has_eos: `(B,)`, bool.
    """
    penalised = torch.full_like(scores, value) if mode == "replace" else scores - abs(value)
    return torch.where(has_eos, scores, penalised)


def score_index(lengths: Tensor, width: int, position: ScorePosition = "after_eos") -> Tensor:
    """Column on which the score lands (D29). `(B,) -> (B,)`.

    `after_eos`: the column after the last real token where there is one, else the last column. `eos`: the last real
    token. `width` is the longest response that the sampler may give, so that a response which ends exactly there gets
    its score on its last token, as in the reference.
    """
    return (lengths if position == "after_eos" else lengths - 1).clamp(max=width - 1)


def token_rewards(kl: Tensor, scores: Tensor, index: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """`reward[t] = -coefficient x kl[t]`, plus the score at `index` (D28, D29).

    Args:
        kl: `(B, R)` per token.
        scores: `(B,)`.
        index: `(B,)` column of the score.
        mask: `(B, R)`, true on real response tokens; the penalty is 0 elsewhere. A row without any, an episode that
            is not to be learnt from, has no score either.
    """
    rewards = torch.where(mask, -coefficient * kl, 0.0)
    scores = torch.where(mask.any(1), scores, 0.0)
    return rewards.scatter_add(1, index.unsqueeze(1), scores.unsqueeze(1))
