from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import pad

from rlhf.ops.masking import masked_mean, masked_moments, masked_sum, whiten

MASK = torch.arange(7) < torch.tensor([[7], [1], [4], [2], [6], [3]])
BAD = [float("nan"), float("inf"), -float("inf"), 1e30]
both_modes = pytest.mark.parametrize("shift_mean", [True, False])
non_finite = pytest.mark.parametrize("padding", BAD)


def random_values(seed: int = 0) -> Tensor:
    return torch.tensor(np.random.default_rng(seed).normal(2.0, 3.0, (6, 7))).float()


VALUES = random_values()


class AllReduce:
    """The sum over ranks that run in threads."""

    def __init__(self, ranks: int) -> None:
        self.parts = [torch.tensor(0.0)] * ranks
        self.barrier = Barrier(ranks, timeout=10)

    def __call__(self, rank: int, x: Tensor) -> Tensor:
        self.parts[rank] = x
        self.barrier.wait()
        total = torch.stack(self.parts).sum(0)
        self.barrier.wait()
        return total


def test_sum_and_mean_are_over_real_entries() -> None:
    values = torch.tensor([[1.0, 2.0, 100.0], [4.0, 100.0, 100.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_sum(values, mask) == 7
    assert masked_mean(values, mask) == pytest.approx(7 / 3)


def test_an_empty_mask_has_mean_zero() -> None:
    assert masked_mean(VALUES, torch.zeros_like(MASK)) == 0
    assert masked_moments(VALUES, torch.zeros_like(MASK)) == (0, 0)


def test_frozen_moments_and_whitening() -> None:
    """Real are 1, 2, 3 and 6: their mean is 3, their variance (4 + 1 + 0 + 9) / 4 = 3.5."""
    values = torch.tensor([[1.0, 2.0, 77.0], [3.0, 6.0, -77.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    mean, variance = masked_moments(values, mask)
    assert (mean.item(), variance.item()) == (3.0, 3.5)
    # -2, -1, 0 and 3, divided by sqrt(3.5) = 1.8708287
    expected = torch.tensor([[-1.0690450, -0.5345225, 0.0], [0.0, 1.6035675, 0.0]])
    torch.testing.assert_close(whiten(values, mask), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(whiten(values, mask, False), torch.where(mask, expected + 3, 0.0), atol=2e-6, rtol=0)


@both_modes
@pytest.mark.parametrize("seed", range(3))
def test_whiten_is_the_reference_formula(seed: int, shift_mean: bool) -> None:
    """The reference whitens with `masked_var(values, mask, unbiased=False)`: divided by n, not by n - 1."""
    values = random_values(seed)
    real = values.double().numpy()[MASK.numpy()]
    expected = (real - real.mean()) / np.sqrt(real.var(ddof=0) + 1e-8) + (0 if shift_mean else real.mean())
    whitened = whiten(values, MASK, shift_mean)
    np.testing.assert_allclose(whitened[MASK].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert (whitened[~MASK] == 0).all()


@both_modes
@pytest.mark.parametrize("scale", [1e-3, 3e-5, 1e-6])
def test_a_tiny_spread_is_scaled_by_the_reference_formula_too(scale: float, shift_mean: bool) -> None:
    """There the 1e-8, which stands under the root, is all that keeps noise from being blown up to 1."""
    values = scale * (random_values() - 2)
    real = values.double().numpy()[MASK.numpy()]
    expected = (real - real.mean()) / np.sqrt(real.var(ddof=0) + 1e-8) + (0 if shift_mean else real.mean())
    np.testing.assert_allclose(whiten(values, MASK, shift_mean)[MASK].numpy(), expected, rtol=1e-4, atol=1e-7)


@both_modes
def test_whitened_mean(shift_mean: bool) -> None:
    """D30 keeps the mean of the rewards, D32 removes that of the advantages; either way the variance becomes 1."""
    real = whiten(VALUES, MASK, shift_mean)[MASK]
    assert real.mean().item() == pytest.approx(0 if shift_mean else VALUES[MASK].mean().item(), abs=1e-5)
    assert real.var(correction=0).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", [50.0, 0.1, -1.0])
@pytest.mark.parametrize("seed", range(3))
def test_whitening_is_invariant_to_scale_and_shift(seed: int, scale: float) -> None:
    """Up to the sign of the scale, and to the 1e-8 beside the variance."""
    values = random_values(seed).double()
    expected = np.sign(scale) * whiten(values, MASK)
    torch.testing.assert_close(whiten(scale * values - 3, MASK), expected, atol=1e-6, rtol=0)


def test_whitening_ignores_the_amount_of_padding() -> None:
    wider = whiten(pad(VALUES, (0, 3), value=9.0), pad(MASK, (0, 3)))
    torch.testing.assert_close(wider[:, :7], whiten(VALUES, MASK), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("values", "mask"),
    [
        (torch.full((2, 3), 5.0), torch.ones(2, 3, dtype=torch.bool)),
        (torch.full((1, 3), 5.0), torch.tensor([[True, True, False]])),
        (torch.tensor([[5.0, 9.0], [9.0, 9.0]]), torch.tensor([[True, False], [False, False]])),
    ],
    ids=["all equal", "one row", "one real entry"],
)
def test_no_spread_whitens_to_zero(values: Tensor, mask: Tensor) -> None:
    assert masked_moments(values, mask) == (5, 0)
    assert (whiten(values, mask) == 0).all()
    torch.testing.assert_close(whiten(values, mask, shift_mean=False), torch.where(mask, 5.0, 0.0))


@non_finite
def test_non_finite_padding_counts_nowhere(padding: float) -> None:
    values, clean = torch.where(MASK, VALUES, padding), torch.where(MASK, VALUES, 0.0)
    assert torch.equal(masked_mean(values, MASK), masked_mean(clean, MASK))
    assert masked_moments(values, MASK) == masked_moments(clean, MASK)
    assert torch.equal(whiten(values, MASK), whiten(clean, MASK))


@non_finite
@both_modes
def test_non_finite_padding_leaves_gradients_alone(padding: float, shift_mean: bool) -> None:
    weights = random_values(1)
    gradients = []
    for filler in (padding, 0.0):
        values = torch.where(MASK, VALUES, filler).requires_grad_()
        (whiten(values, MASK, shift_mean) * weights).sum().backward()
        gradients.append(values.grad)
    assert torch.equal(*gradients)
    assert (gradients[0][~MASK] == 0).all()
    assert (gradients[0][MASK] != 0).all()
    values = torch.where(MASK, VALUES, padding).requires_grad_()
    masked_mean(values, MASK).backward()
    torch.testing.assert_close(values.grad, MASK / MASK.sum())


@both_modes
def test_gradients_are_finite_differences(shift_mean: bool) -> None:
    values = VALUES.double().requires_grad_()
    assert gradcheck(lambda x: whiten(x, MASK, shift_mean), values)
    assert gradcheck(lambda x: masked_moments(x, MASK), values)


@pytest.mark.parametrize("rows_of_first", [1, 2, 5, 6])
def test_sharded_whitening_equals_global_whitening(rows_of_first: int) -> None:
    """Also where the second rank has no real entry."""
    reduce = AllReduce(2)
    values, mask = pad(VALUES, (0, 0, 0, 1), value=9.0), pad(MASK, (0, 0, 0, 1))
    shards = [(values[:rows_of_first], mask[:rows_of_first]), (values[rows_of_first:], mask[rows_of_first:])]

    def run(rank: int) -> Tensor:
        return whiten(*shards[rank], reduce=lambda x: reduce(rank, x))

    with ThreadPoolExecutor(2) as pool:
        whitened = torch.cat(list(pool.map(run, range(2))))
    torch.testing.assert_close(whitened, whiten(values, mask), atol=1e-6, rtol=0)
    if rows_of_first < 6:
        assert not torch.allclose(whiten(*shards[0]), whitened[:rows_of_first], atol=1e-2)
