"""Generalised advantage estimation."""

import torch
from jaxtyping import Float
from torch import Tensor

PerToken = Float[Tensor, "B R"]


def gae(rewards: PerToken, values: PerToken, gamma: float = 1.0, lam: float = 0.95) -> tuple[PerToken, PerToken]:
    """Computes advantages and returns (D31; Schulman et al. 2016, arXiv 1506.02438).

    `delta[t] = reward[t] + gamma x value[t+1] - value[t]`, `advantage[t] = delta[t] + gamma x lam x advantage[t+1]`,
    `return[t] = advantage[t] + value[t]`; beyond the last column value and advantage are 0. On padding rewards and
    values must be 0.
    """
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values
