"""Advantages: of each token by a critic, or of whole episodes by the others of their group."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PerToken = Float[Tensor, "B R"]
PerRow = Float[Tensor, " B"]
Kept = Bool[Tensor, " B"]


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


def leave_one_out(rewards: PerRow, keep: Kept, size: int) -> PerRow:
    """Subtracts from the reward of an episode the mean of those of the others in its group, the baseline of RLOO.

    `reward - mean of the others`, which is `n / (n - 1) x (reward - mean of all n)` (Ahmadian et al. 2024,
    arXiv 2402.14740, section 2.2). The advantages of a group sum to 0.

    Args:
        rewards: of whole episodes; `size` rows that follow one another are a group, responses to the same prompt.
        keep: the others do not count in their group and have the advantage 0, as has the only one that is kept.
    """
    deviations, count = _in_groups(rewards, keep, size)
    return (deviations * count / (count - 1).clamp(min=1)).flatten()


def group_normalised(rewards: PerRow, keep: Kept, size: int) -> PerRow:
    """Scales the rewards of each group to mean 0 and standard deviation 1, the advantage of GRPO.

    `(reward - mean) / (std + 1e-4)`, where the variance divides by n - 1 (Shao et al. 2024, arXiv 2402.03300, section
    4.1.2; epsilon and n - 1 are TRL's). The arguments are those of `leave_one_out`.
    """
    deviations, count = _in_groups(rewards, keep, size)
    std = ((deviations**2).sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return (deviations / (std + 1e-4)).flatten()


def _in_groups(rewards: PerRow, keep: Kept, size: int) -> tuple[Tensor, Tensor]:
    """Returns deviations from the mean of the group, `(groups, size)`, and how many are kept, `(groups, 1)`."""
    rows, kept = rewards.view(-1, size), keep.view(-1, size)
    count = kept.sum(1, keepdim=True)
    mean = torch.where(kept, rows, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
    return torch.where(kept, rows - mean, 0.0), count
