"""Advantages of whole episodes within groups: RLOO's and GRPO's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from rlhf.ops.advantages import group_normalised, leave_one_out

BOTH = pytest.mark.parametrize("advantage", [leave_one_out, group_normalised])


def random_groups(groups: int = 5, size: int = 4, seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(3, 2, size=groups * size))


def everyone(rewards: Tensor) -> Tensor:
    return torch.ones_like(rewards, dtype=torch.bool)


def test_frozen_numbers() -> None:
    """Group 1, 2, 6: others' means 4, 3.5 and 1.5. Mean 3, deviations -2, -1, 3, std sqrt(14 / 2) = 2.645751."""
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    expected = torch.tensor([-3.0, -1.5, 4.5, 0.0, 0.0, 0.0])
    torch.testing.assert_close(leave_one_out(rewards, everyone(rewards), 3), expected, atol=1e-6, rtol=0)
    expected = torch.tensor([-0.755900, -0.377950, 1.133850, 0.0, 0.0, 0.0])
    torch.testing.assert_close(group_normalised(rewards, everyone(rewards), 3), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_they_are_what_the_papers_write(size: int) -> None:
    rewards = random_groups(size=size)
    keep = torch.tensor(np.random.default_rng(1).random(len(rewards)) < 0.7)
    out, normalised = leave_one_out(rewards, keep, size), group_normalised(rewards, keep, size)
    for row, reward in enumerate(rewards.tolist()):
        first = row // size * size
        group = [rewards[n].item() for n in range(first, first + size) if keep[n]]
        others = [rewards[n].item() for n in range(first, first + size) if keep[n] and n != row]
        if not keep[row] or not others:
            assert out[row] == normalised[row] == 0
        else:
            assert out[row].item() == pytest.approx(reward - np.mean(others))
            expected = (reward - np.mean(group)) / (np.std(group, ddof=1) + 1e-4)
            assert normalised[row].item() == pytest.approx(expected)


@BOTH
def test_the_advantages_of_a_group_sum_to_zero(advantage: type) -> None:
    rewards = random_groups()
    keep = torch.arange(len(rewards)) % 3 > 0
    for kept in (keep, everyone(rewards)):
        sums = advantage(rewards, kept, 4).view(-1, 4).sum(1)
        torch.testing.assert_close(sums, torch.zeros_like(sums), atol=1e-12, rtol=0)


@BOTH
def test_a_group_depends_on_itself_alone_and_not_on_what_all_its_rewards_have_in_common(advantage: type) -> None:
    rewards = random_groups()
    shifted = rewards + torch.arange(5.0).double().repeat_interleave(4)
    expected = advantage(rewards, everyone(rewards), 4)
    torch.testing.assert_close(advantage(shifted, everyone(rewards), 4), expected)


@BOTH
def test_an_episode_that_is_not_kept_counts_for_nothing_even_if_its_reward_is_not_finite(advantage: type) -> None:
    rewards = random_groups(1)
    keep = torch.tensor([True, True, False, True])
    expected = advantage(rewards[keep], everyone(rewards[keep]), 3)
    rewards[2] = torch.nan
    found = advantage(rewards, keep, 4)
    torch.testing.assert_close(found[keep], expected)
    assert found[2] == 0


@BOTH
def test_the_only_one_that_is_kept_has_none(advantage: type) -> None:
    assert advantage(torch.tensor([3.0, 9.0]), torch.tensor([True, False]), 2).tolist() == [0, 0]


@BOTH
def test_gradients_are_finite_differences(advantage: type) -> None:
    rewards = random_groups(2).requires_grad_()
    keep = torch.arange(8) != 5
    assert gradcheck(lambda r: advantage(r, keep, 4), (rewards,))
