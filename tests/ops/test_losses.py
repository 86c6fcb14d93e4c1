from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from rlhf.ops.losses import dpo_losses, ipo_losses, masked_total, pairwise_losses, policy_losses, value_losses

SEEDS = pytest.mark.parametrize("seed", range(3))


def normal(seed: int, number: int, shape: tuple[int, ...] = (4, 6)) -> list[Tensor]:
    """Independent standard normal tensors in float64."""
    return list(torch.tensor(np.random.default_rng(seed).normal(size=(number, *shape))))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "slope"),
    [
        (1.0, 2.0, -2.0, False, -2.0),
        (1.5, 1.0, -1.2, True, 0.0),
        (0.5, 1.0, -0.5, False, -0.5),
        (0.5, -1.0, 0.8, True, 0.0),
        (1.5, -1.0, 1.5, False, 1.5),
        (1.1, 3.0, -3.3, False, -3.3),
        (1.5, 0.0, 0.0, False, 0.0),
    ],
)
def test_policy_loss(ratio: float, advantage: float, loss: float, clipped: bool, slope: float) -> None:
    """`slope` is the derivative with respect to the log-probability: -advantage x ratio, or 0 where it is clipped."""
    old = torch.tensor([[-2.0]])
    logprobs = (old + math.log(ratio)).requires_grad_()
    losses, was_clipped = policy_losses(logprobs, old, torch.tensor([[advantage]]), clip=0.2)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss, abs=1e-6)
    assert was_clipped.item() is clipped
    assert logprobs.grad.item() == pytest.approx(slope, abs=1e-6)


@SEEDS
def test_policy_loss_is_the_pessimistic_one(seed: int) -> None:
    """numpy, by cases: the ratio counts as it is, but not for more than 1.2 of a gain, nor less than 0.8 of a loss."""
    old, change, advantages = normal(seed, 3)
    losses, clipped = policy_losses((old + change).float(), old.float(), advantages.float(), 0.2)
    ratio, a = np.exp(change.numpy()), advantages.numpy()
    counted = np.where(a > 0, np.minimum(ratio, 1.2), np.maximum(ratio, 0.8))
    np.testing.assert_allclose(losses.numpy(), -a * counted, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(clipped.numpy(), counted != ratio)
    assert 0 < clipped.float().mean() < 1


@pytest.mark.parametrize("change", [3.5, 10.0, 40.0, 79.0])
def test_a_bad_token_that_became_much_more_probable_counts_in_full(change: float) -> None:
    """No bound on the ratio hides it: loss and slope are -advantage x ratio."""
    old = torch.tensor([[-2.0]])
    logprobs = (old + change).requires_grad_()
    losses, clipped = policy_losses(logprobs, old, torch.tensor([[-0.5]]), clip=0.2)
    losses.sum().backward()
    assert losses.item() == pytest.approx(0.5 * math.exp(change), rel=1e-4)
    assert logprobs.grad.item() == pytest.approx(0.5 * math.exp(change), rel=1e-4)
    assert not clipped.item()


@SEEDS
def test_gradient_of_the_policy_loss_is_a_finite_difference(seed: int) -> None:
    old, change, advantages = normal(seed, 3)
    assert gradcheck(lambda new: policy_losses(new, old, advantages, 0.2)[0], (old + change).requires_grad_())
    on_policy = old.clone().requires_grad_()
    policy_losses(on_policy, old, advantages, 0.2)[0].sum().backward()
    torch.testing.assert_close(on_policy.grad, -advantages)  # at a ratio of 1 it is the policy gradient


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
@pytest.mark.parametrize("change", [88.0, 89.0, 1000.0, -1000.0])
def test_a_ratio_beyond_float32_gives_no_nan(change: float, advantage: float) -> None:
    """exp(89) is infinite in float32, and 0 x inf NaN; a good action that is that likely has loss -1.2, slope 0."""
    logprobs = torch.tensor([[change]]).requires_grad_()
    losses, _ = policy_losses(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), clip=0.2)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logprobs.grad.isfinite().all()
    if advantage == 1:
        assert losses.item() == pytest.approx(-1.2 if change > 0 else 0)
        assert logprobs.grad.item() == 0


@pytest.mark.parametrize("padding", [1000.0, -1000.0, float("inf"), -float("inf"), float("nan")])
def test_logprobs_at_padding_leave_the_gradient_alone(padding: float) -> None:
    logprobs = torch.tensor([[-1.0, -2.0, padding], [-3.0, padding, padding]]).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    advantages = torch.tensor([[1.0, -1.0, 0.0], [2.0, 0.0, 0.0]])
    losses, _ = policy_losses(logprobs, torch.where(mask, logprobs.detach(), 0.0), advantages, clip=0.2)
    total = masked_total(losses, mask, 4.0)
    total.backward()
    assert total.item() == -0.5
    assert logprobs.grad.tolist() == [[-0.25, 0.25, 0.0], [-0.5, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "clipped", "slope"),
    [
        (2.0, 1.0, 0.0, 0.2, 2.0, False, 2.0),
        (0.0, 1.0, 0.0, 0.2, 0.32, True, 0.0),
        (3.0, 1.0, 3.0, 0.2, 1.62, True, 0.0),
        (1.1, 1.0, 3.0, 0.2, 1.805, False, -1.9),
        (1.0, 1.0, 3.0, 0.2, 2.0, False, -2.0),
        (0.0, 1.0, 0.0, None, 0.0, False, 0.0),
        (2.0, 1.0, 0.0, None, 2.0, False, 2.0),
    ],
)
def test_value_loss(
    value: float, old: float, target: float, clip: float | None, loss: float, clipped: bool, slope: float
) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    losses, was_clipped = value_losses(values, torch.tensor([[old]]), torch.tensor([[target]]), clip)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss, abs=1e-6)
    assert was_clipped.item() is clipped
    assert values.grad.item() == pytest.approx(slope, abs=1e-6)


@SEEDS
def test_value_loss_is_the_larger_of_two_errors(seed: int) -> None:
    """numpy: the value itself, and the value that moved from its old one by 0.2 at most."""
    values, old, returns = normal(seed, 3)
    losses, clipped = value_losses(values.float(), old.float(), returns.float(), 0.2)
    new, before, target = values.numpy(), old.numpy(), returns.numpy()
    moved = before + np.sign(new - before) * np.minimum(np.abs(new - before), 0.2)
    errors = np.abs(new - target), np.abs(moved - target)
    np.testing.assert_allclose(losses.numpy(), 0.5 * np.maximum(*errors) ** 2, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(clipped.numpy(), (np.abs(new - before) > 0.2) & (errors[1] > errors[0]))
    assert 0 < clipped.float().mean() < 1


@SEEDS
@pytest.mark.parametrize("clip", [0.2, None])
def test_gradient_of_the_value_loss_is_a_finite_difference(seed: int, clip: float | None) -> None:
    values, old, returns = normal(seed, 3)
    assert gradcheck(lambda v: value_losses(v, old, returns, clip)[0], values.requires_grad_())


def test_rounding_is_no_clipping() -> None:
    """Values that moved by less than the clip are not counted as clipped, whatever the last digit."""
    values, change, returns = (x.float() for x in normal(0, 3, (100, 100)))
    losses, clipped = value_losses(values, values + 0.19 * change.clamp(-1, 1), returns, 0.2)
    assert not clipped.any()
    assert torch.equal(losses, value_losses(values, values, returns, None)[0])


@pytest.mark.parametrize(
    ("chosen", "rejected", "loss"),
    [(1.0, 0.0, 0.3132617), (0.0, 1.0, 1.3132617), (5.0, 5.0, math.log(2)), (0.0, 500.0, 500.0), (500.0, 0.0, 0.0)],
)
def test_pairwise_loss(chosen: float, rejected: float, loss: float) -> None:
    assert pairwise_losses(torch.tensor([chosen]), torch.tensor([rejected])).item() == pytest.approx(loss, abs=1e-6)


@SEEDS
def test_pairwise_loss_and_its_gradient(seed: int) -> None:
    """`L(a, b) - L(b, a) = b - a`, `exp(-L(a, b)) + exp(-L(b, a)) = 1`, and the slope is `sigmoid(a - b) - 1`."""
    chosen, rejected = (x.requires_grad_() for x in normal(seed, 2, (8,)))
    losses, swapped = pairwise_losses(chosen, rejected), pairwise_losses(rejected, chosen)
    torch.testing.assert_close(losses - swapped, rejected - chosen)
    torch.testing.assert_close((-losses).exp() + (-swapped).exp(), torch.ones_like(losses))
    assert gradcheck(pairwise_losses, (chosen, rejected))
    losses.sum().backward()
    torch.testing.assert_close(chosen.grad, 1 / (1 + (rejected - chosen).exp()) - 1)
    torch.testing.assert_close(rejected.grad, -chosen.grad)


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1,) * 8, (5, 2, 1)])
def test_the_split_into_micro_batches_does_not_change_the_loss(sizes: tuple[int, ...]) -> None:
    """D14: dividing by the average number of tokens per micro-batch gives the global mean, and its gradient."""
    losses = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    mask = torch.arange(6) < torch.tensor([[6], [1], [2], [6], [1], [1], [5], [3]])
    share = mask.sum() / len(sizes)
    parts = zip(losses.split(sizes), mask.split(sizes), strict=True)
    total = sum(masked_total(part, part_mask, share) for part, part_mask in parts) / len(sizes)
    assert total.item() == pytest.approx(losses[mask].mean().item())
    total.backward()
    torch.testing.assert_close(losses.grad, mask / mask.sum().double())


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), -float("inf")])
def test_masked_total_ignores_what_stands_at_padding(padding: float) -> None:
    losses = torch.tensor([[1.0, 2.0, padding]], requires_grad=True)
    total = masked_total(losses, torch.tensor([[True, True, False]]), 4.0)
    total.backward()
    assert total.item() == pytest.approx(0.75)
    assert losses.grad.tolist() == [[0.25, 0.25, 0.0]]


@pytest.mark.parametrize(
    ("margin", "smoothing", "loss", "slope"),
    [
        (0.0, 0.0, 0.6931472, -0.5),
        (0.0, 0.3, 0.6931472, -0.2),
        (2.0, 0.0, 0.1269280, -0.1192029),  # log(1 + e^-2), -1 / (1 + e^2)
        (2.0, 0.1, 0.3269280, -0.0192029),  # 0.9 x 0.126928 + 0.1 x 2.126928
        (-2.0, 0.1, 1.9269280, -0.7807971),
    ],
)
def test_dpo_loss(margin: float, smoothing: float, loss: float, slope: float) -> None:
    margins = torch.tensor([margin], requires_grad=True)
    losses = dpo_losses(margins, smoothing)
    losses.sum().backward()
    assert losses.item() == pytest.approx(loss, abs=1e-6)
    assert margins.grad.item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "beta", "loss"), [(0.0, 0.1, 25.0), (5.0, 0.1, 0.0), (3.0, 0.5, 4.0), (-1.0, 0.5, 4.0)]
)
def test_ipo_loss_draws_the_log_ratio_to_its_target(ratio: float, beta: float, loss: float) -> None:
    """`ratio` is the difference of the log-ratios, whose target is 1 / (2 beta)."""
    assert ipo_losses(torch.tensor([beta * ratio], dtype=torch.float64), beta).item() == pytest.approx(loss)


@SEEDS
def test_gradients_of_losses_of_pairs(seed: int) -> None:
    (margins,) = normal(seed, 1)
    margins.requires_grad_()
    assert gradcheck(lambda m: dpo_losses(m, 0.2), margins)
    assert gradcheck(lambda m: ipo_losses(m, 0.3), margins)
