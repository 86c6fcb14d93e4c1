"""What is measured of a rollout before anything is learnt from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf.callbacks.findings import Finding, Tolerance
from rlhf.ops.masking import masked_moments
from rlhf.sampling.rollout import Rollout


def measure_rollout(
    rollout: Rollout, module: Any, update: int, limits: Tolerance, highest_kl: float
) -> Iterator[Finding]:
    """Findings over the episodes of all ranks; those before the first update only where `update` is 0."""
    bad = (~rollout.rewards.isfinite() & rollout.value_mask).sum() + (
        ~rollout.scores.isfinite() & rollout.mask.any(1)
    ).sum()
    yield Finding("finite_rewards", module.reduce_sum(bad.float()).item(), 0)
    kl = rollout.kl.sum(1)
    mean, variance = masked_moments(kl, torch.ones_like(rollout.has_eos), module.reduce_sum)
    episodes = len(rollout) * module.trainer.world_size
    noise = 4 * (variance / episodes).sqrt().item()
    yield Finding("kl", max(0.0, -mean.item()), noise + limits.ratio)
    yield Finding("kl_ceiling", mean.item(), highest_kl)
    if update == 0 and module.starts_at_reference:
        distance = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0).abs().max()
        yield Finding("first_kl", module.reduce_max(distance).item(), limits.ratio)
    if update == 0 and module.critic_starts_at_reward:
        error, defined = value_error(rollout)
        if module.reduce_sum(defined) > 0:
            yield Finding("first_value", module.reduce_max(error).item(), limits.reward)


def value_error(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Largest distance of the value of a finished response from its score, in units of the largest score (at least 1),
    and the number of such responses.

    Only responses with EOS are finished, and only those shorter than the rollout have a value there.
    """
    after = rollout.lengths.clamp(max=rollout.values.shape[1] - 1).unsqueeze(1)
    defined = rollout.has_eos & (rollout.lengths < rollout.values.shape[1]) & rollout.value_mask.gather(1, after)[:, 0]
    error = torch.where(defined, rollout.values.gather(1, after)[:, 0] - rollout.scores, 0.0).abs().max()
    return error / torch.where(defined, rollout.scores, 0.0).abs().max().clamp(min=1), defined.sum()
