from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf.ops.losses import language_model_losses, masked_total, pairwise_losses, policy_losses, value_losses


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


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "loss", "clipped", "slope"),
    [
        (2.0, 1.0, 0.0, 0.2, 2.0, False, 2.0),
        (0.0, 1.0, 0.0, 0.2, 0.32, True, 0.0),
        (3.0, 1.0, 3.0, 0.2, 1.62, True, 0.0),
        (1.1, 1.0, 3.0, 0.2, 1.805, False, -1.9),
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


@pytest.mark.parametrize(
    ("chosen", "rejected", "loss"),
    [(1.0, 0.0, 0.3132617), (0.0, 1.0, 1.3132617), (5.0, 5.0, math.log(2)), (0.0, 500.0, 500.0), (500.0, 0.0, 0.0)],
)
def test_pairwise_loss(chosen: float, rejected: float, loss: float) -> None:
    assert pairwise_losses(torch.tensor([chosen]), torch.tensor([rejected])).item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_model_loss_matches_numpy(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 3, (2, 4, 7))).to(dtype)
    labels = torch.from_numpy(rng.integers(0, 7, (2, 4)))
    losses = language_model_losses(logits, labels)
    assert losses.dtype == torch.float32
    for b, t in np.ndindex(2, 4):
        row = logits[b, t].double().numpy()
        expected = np.log(np.exp(row).sum()) - row[labels[b, t]]
        assert losses[b, t].item() == pytest.approx(expected, abs=1e-5)


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
    assert torch.allclose(losses.grad, mask / mask.sum().double())


def test_masked_total_ignores_what_stands_at_padding() -> None:
    losses = torch.tensor([[1.0, 2.0, float("nan")]], requires_grad=True)
    total = masked_total(losses, torch.tensor([[True, True, False]]), 4.0)
    total.backward()
    assert total.item() == pytest.approx(0.75)
    assert losses.grad.tolist() == [[0.25, 0.25, 0.0]]
