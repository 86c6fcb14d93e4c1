"""Losses, per token or per pair; `masked_total` turns them into a number.

A loss is a mean over the real tokens of the *global* minibatch (D14). A micro-batch therefore divides its sum not by
its own number of tokens but by the average number of tokens per micro-batch of that minibatch, counted over all
micro-batches and ranks: then the mean over micro-batches (accumulation) and ranks (DDP, ZeRO) is exact for any split.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.ops.masking import Mask, Scalar, Values, masked_sum


def masked_total(losses: Values, mask: Mask, normaliser: Tensor | float | int) -> Scalar:
    """Computes the sum of the real entries over `normaliser` (see the module's docstring)."""
    return masked_sum(losses, mask) / normaliser


def pairwise_losses(chosen: Values, rejected: Values) -> Values:
    """Computes the Bradley-Terry loss `-log sigmoid(r_chosen - r_rejected)` of each pair (D18)."""
    return -F.logsigmoid(chosen - rejected)


def dpo_losses(margins: Values, label_smoothing: float = 0.0) -> Values:
    """Computes the loss of DPO of each pair (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    `-(1 - e) log sigmoid(m) - e log sigmoid(-m)`, where labels are wrong with probability e (Mitchell 2023, "A note on
    DPO with noisy preferences", eq. 3).

    Args:
        margins: difference of the implicit rewards of the chosen and the rejected response.
    """
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def ipo_losses(margins: Values, beta: float) -> Values:
    """Computes the loss of IPO of each pair (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    `(m / beta - 1 / (2 beta))^2`, where `m / beta` is the difference of the log-ratios. The arguments are those of
    `dpo_losses`.
    """
    return ((margins - 0.5) / beta) ** 2


def policy_losses(logprobs: Values, old_logprobs: Values, advantages: Values, clip: float) -> tuple[Values, Mask]:
    """Computes PPO's clipped surrogate loss (D34; Schulman et al. 2017, arXiv 1707.06347, eq. 7, negated).

    `max(-A x ratio, -A x clamp(ratio, 1 - clip, 1 + clip))` with `ratio = exp(logprob - old_logprob)`. The exponent
    ends at 80: beyond, float32 overflows, and the gradient of a term that does not count would be NaN.

    Returns:
        The losses, and where the clipped term is the larger one.
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(max=80))
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def importance_weights(logprobs: Values, engine_logprobs: Values, cap: float) -> Values:
    """Computes `min(exp(logprob - engine_logprob), cap)`, what a token that an engine sampled counts in the loss.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training", with a cap of 2).
    """
    return torch.exp(logprobs - engine_logprobs).clamp(max=cap)


def value_losses(values: Values, old_values: Values, returns: Values, clip: float | None) -> tuple[Values, Mask]:
    """Computes 0.5 x the squared error of the values, clipped or unclipped, whichever is larger (D34).

    Args:
        clip: how far a value may move from its old value before its error stops shrinking; None: no clipping.

    Returns:
        The losses, and where the clipped term is the larger one.
    """
    unclipped = (values - returns) ** 2
    if clip is None:
        return 0.5 * unclipped, torch.zeros_like(unclipped, dtype=torch.bool)
    near = torch.clamp(values, old_values - clip, old_values + clip)
    clipped = (near - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped
