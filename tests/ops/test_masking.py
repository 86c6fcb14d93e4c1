from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.ops.masking import masked_mean, masked_moments, masked_sum, whiten

VALUES = torch.from_numpy(np.random.default_rng(0).normal(2.0, 3.0, (6, 7))).float()
MASK = torch.arange(7) < torch.tensor([[7], [1], [4], [2], [6], [3]])


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


@pytest.mark.parametrize("padding", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_padding_counts_nowhere(padding: float) -> None:
    values = torch.where(MASK, VALUES, padding).requires_grad_()
    clean = torch.where(MASK, VALUES, 0.0)
    assert torch.equal(masked_mean(values, MASK), masked_mean(clean, MASK))
    assert torch.equal(whiten(values, MASK), whiten(clean, MASK))
    masked_mean(values, MASK).backward()
    assert torch.allclose(values.grad, MASK / MASK.sum())


def test_an_empty_mask_has_mean_zero() -> None:
    assert masked_mean(VALUES, torch.zeros_like(MASK)) == 0


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_is_the_reference_formula(shift_mean: bool) -> None:
    """The reference whitens with `masked_var(values, mask, unbiased=False)`: divided by n, not by n - 1."""
    real = VALUES.double().numpy()[MASK.numpy()]
    expected = (real - real.mean()) / np.sqrt(real.var(ddof=0) + 1e-8) + (0 if shift_mean else real.mean())
    whitened = whiten(VALUES, MASK, shift_mean)
    np.testing.assert_allclose(whitened[MASK].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert (whitened[~MASK] == 0).all()


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitened_mean(shift_mean: bool) -> None:
    """D30 keeps the mean of the rewards, D32 removes that of the advantages."""
    mean = whiten(VALUES, MASK, shift_mean)[MASK].mean()
    assert mean.item() == pytest.approx(0 if shift_mean else VALUES[MASK].mean().item(), abs=1e-5)


def test_whitening_is_invariant_to_scale_and_shift() -> None:
    assert torch.allclose(whiten(50 * VALUES - 3, MASK), whiten(VALUES, MASK), atol=1e-4)


def test_whitening_ignores_the_amount_of_padding() -> None:
    wider = whiten(torch.nn.functional.pad(VALUES, (0, 3), value=9.0), torch.nn.functional.pad(MASK, (0, 3)))
    assert torch.allclose(wider[:, :7], whiten(VALUES, MASK))


@pytest.mark.parametrize("values", [torch.full((2, 3), 5.0), torch.tensor([[5.0, 9.0, 9.0], [9.0, 9.0, 9.0]])])
def test_no_spread_whitens_to_zero(values: Tensor) -> None:
    """All entries equal; a single real entry."""
    mask = values == 5.0
    mean, variance = masked_moments(values, mask)
    assert (mean, variance) == (5, 0)
    assert (whiten(values, mask) == 0).all()
    assert torch.allclose(whiten(values, mask, shift_mean=False), torch.where(mask, 5.0, 0.0))


@pytest.mark.parametrize("rows_of_first", [1, 2, 5])
def test_sharded_whitening_equals_global_whitening(rows_of_first: int) -> None:
    reduce = AllReduce(2)
    shards = [(VALUES[:rows_of_first], MASK[:rows_of_first]), (VALUES[rows_of_first:], MASK[rows_of_first:])]

    def run(rank: int) -> Tensor:
        return whiten(*shards[rank], reduce=lambda x: reduce(rank, x))

    with ThreadPoolExecutor(2) as pool:
        whitened = torch.cat(list(pool.map(run, range(2))))
    assert torch.allclose(whitened, whiten(VALUES, MASK), atol=1e-6)
    assert not torch.allclose(whiten(*shards[0]), whitened[:rows_of_first], atol=1e-2)
