from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.ops.advantages import gae


def random_batch(rows: int = 3, width: int = 6) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(rows * 100 + width)
    return torch.from_numpy(rng.normal(size=(rows, width))), torch.from_numpy(rng.normal(size=(rows, width)))


def test_frozen_numbers() -> None:
    """Deltas are 1 + 0.9 x 4 - 2 = 2.6 and 3 - 4 = -1; the first advantage is 2.6 + 0.9 x 0.5 x -1."""
    advantages, returns = gae(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]]), gamma=0.9, lam=0.5)
    assert advantages[0].tolist() == pytest.approx([2.15, -1.0])
    assert returns[0].tolist() == pytest.approx([4.15, 3.0])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.99, 1.0)])
@pytest.mark.parametrize(("rows", "width"), [(3, 6), (1, 6), (2, 1)])
def test_equals_the_double_sum_of_discounted_deltas(rows: int, width: int, gamma: float, lam: float) -> None:
    rewards, values = random_batch(rows, width)
    expected = np.zeros((rows, width))
    for row, t in np.ndindex(rows, width):
        for later in range(t, width):
            following = values[row, later + 1].item() if later + 1 < width else 0.0
            delta = rewards[row, later].item() + gamma * following - values[row, later].item()
            expected[row, t] += (gamma * lam) ** (later - t) * delta
    advantages, returns = gae(rewards, values, gamma, lam)
    np.testing.assert_allclose(advantages.numpy(), expected)
    np.testing.assert_allclose(returns.numpy(), expected + values.numpy())


def test_the_defaults_are_those_of_the_paper() -> None:
    rewards, values = random_batch()
    assert torch.equal(gae(rewards, values)[0], gae(rewards, values, gamma=1.0, lam=0.95)[0])


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_one_gives_discounted_return_minus_value(gamma: float) -> None:
    rewards, values = random_batch()
    discounts = np.tril(gamma ** np.subtract.outer(np.arange(6.0), np.arange(6.0)))
    future = rewards.numpy() @ discounts
    advantages, returns = gae(rewards, values, gamma, 1.0)
    np.testing.assert_allclose(returns.numpy(), future)
    np.testing.assert_allclose(advantages.numpy(), future - values.numpy())


def test_exact_values_leave_no_advantage() -> None:
    rewards, _ = random_batch()
    values = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(gae(rewards, values)[0], torch.zeros_like(values), atol=1e-12)


def test_padding_columns_change_nothing() -> None:
    rewards, values = random_batch()
    wide = gae(pad(rewards, (0, 4)), pad(values, (0, 4)))
    for padded, tight in zip(wide, gae(rewards, values), strict=True):
        assert torch.equal(padded[:, :6], tight)
        assert (padded[:, 6:] == 0).all()


def test_inputs_are_left_alone() -> None:
    rewards, values = random_batch()
    before = rewards.clone(), values.clone()
    gae(rewards, values)
    assert torch.equal(rewards, before[0])
    assert torch.equal(values, before[1])
