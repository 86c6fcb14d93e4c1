from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import pad

from rlhf.ops.advantages import gae


def random_batch(rows: int = 3, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng((seed, rows, width))
    return torch.tensor(rng.normal(size=(rows, width))), torch.tensor(rng.normal(size=(rows, width)))


def double_sum(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """`advantage[t]` is the sum over k >= t of `(gamma x lam)^(k - t) x delta[k]`, written out."""
    expected = np.zeros(rewards.shape)
    rows, width = rewards.shape
    for row, t in np.ndindex(rows, width):
        for later in range(t, width):
            following = values[row, later + 1] if later + 1 < width else 0.0
            delta = rewards[row, later] + gamma * following - values[row, later]
            expected[row, t] += (gamma * lam) ** (later - t) * delta
    return expected


def test_frozen_numbers() -> None:
    """First row: deltas 1 + 0.9 x 4 - 2 = 2.6 and 3 - 4 = -1; the first advantage is 2.6 + 0.9 x 0.5 x -1."""
    rewards, values = torch.tensor([[1.0, 3.0], [0.0, 1.0]]), torch.tensor([[2.0, 4.0], [0.0, 0.0]])
    advantages, returns = gae(rewards, values, gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[2.15, -1.0], [0.45, 1.0]]), atol=2e-6, rtol=0)
    torch.testing.assert_close(returns, torch.tensor([[4.15, 3.0], [0.45, 1.0]]), atol=2e-6, rtol=0)


def test_frozen_numbers_at_the_papers_settings() -> None:
    """Deltas -1.1, 1 and 0.7; backwards: 0.7, 1 + 0.95 x 0.7 = 1.665, -1.1 + 0.95 x 1.665 = 0.48175."""
    advantages, returns = gae(torch.tensor([[-0.1, 0.2, 1.0]]), torch.tensor([[0.5, -0.5, 0.3]]))
    torch.testing.assert_close(advantages, torch.tensor([[0.48175, 1.665, 0.7]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(returns, torch.tensor([[0.98175, 1.165, 1.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (0.99, 1.0)])
@pytest.mark.parametrize(("rows", "width"), [(3, 6), (1, 6), (2, 1), (1, 1)])
def test_equals_the_double_sum_of_discounted_deltas(rows: int, width: int, gamma: float, lam: float) -> None:
    rewards, values = random_batch(rows, width)
    expected = double_sum(rewards.numpy(), values.numpy(), gamma, lam)
    advantages, returns = gae(rewards, values, gamma, lam)
    np.testing.assert_allclose(advantages.numpy(), expected)
    np.testing.assert_allclose(returns.numpy(), expected + values.numpy())


@pytest.mark.parametrize("seed", range(3))
def test_float32_is_precise_over_the_papers_53_tokens(seed: int) -> None:
    rewards, values = (x.float() for x in random_batch(4, 53, seed))
    expected = double_sum(rewards.double().numpy(), values.double().numpy(), 1.0, 0.95)
    advantages, returns = gae(rewards, values)
    assert advantages.dtype == returns.dtype == torch.float32
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(returns.numpy(), expected + values.double().numpy(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_lambda_one_gives_discounted_return_minus_value(seed: int, gamma: float) -> None:
    rewards, values = random_batch(seed=seed)
    discounts = np.tril(gamma ** np.subtract.outer(np.arange(6.0), np.arange(6.0)))
    future = rewards.numpy() @ discounts
    advantages, returns = gae(rewards, values, gamma, 1.0)
    np.testing.assert_allclose(returns.numpy(), future)
    np.testing.assert_allclose(advantages.numpy(), future - values.numpy())


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_it_is_the_weighted_mean_of_n_step_advantages(lam: float) -> None:
    """Weights (1 - lam) x lam^(n - 1), the rest of them on the return to the end, in the words of the GAE paper."""
    gamma, width = 0.9, 6
    rewards, values = (x[0].numpy() for x in random_batch(1, width))
    expected = np.zeros(width)
    for t in range(width):
        for n in range(1, width - t + 1):
            rest = gamma**n * values[t + n] if t + n < width else 0.0
            n_step = sum(gamma**k * rewards[t + k] for k in range(n)) + rest - values[t]
            expected[t] += (lam ** (n - 1) if t + n == width else (1 - lam) * lam ** (n - 1)) * n_step
    advantages, _ = gae(*random_batch(1, width), gamma, lam)
    np.testing.assert_allclose(advantages[0].numpy(), expected)


def test_exact_values_leave_no_advantage() -> None:
    rewards, _ = random_batch()
    values = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(gae(rewards, values)[0], torch.zeros_like(values), atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_padding_columns_change_nothing(length: int) -> None:
    """A row of `length` real columns, among longer ones."""
    rewards, values = random_batch()
    rewards[0, length:] = values[0, length:] = 0
    alone = gae(rewards[:1, :length], values[:1, :length])
    for padded, tight in zip(gae(pad(rewards, (0, 4)), pad(values, (0, 4))), alone, strict=True):
        assert torch.equal(padded[:1, :length], tight)
        assert (padded[0, length:] == 0).all()


def test_gradients_are_finite_differences() -> None:
    rewards, values = (x.requires_grad_() for x in random_batch())
    assert gradcheck(lambda r, v: gae(r, v, 0.9, 0.8), (rewards, values))


def test_inputs_are_left_alone() -> None:
    rewards, values = random_batch()
    before = rewards.clone(), values.clone()
    gae(rewards, values)
    assert torch.equal(rewards, before[0])
    assert torch.equal(values, before[1])
