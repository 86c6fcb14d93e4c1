"""`linear_logprobs` against the formula on all logits at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.ops import logprobs
from rlhf.ops.logprobs import linear_logprobs

ROWS, WIDTH, VOCABULARY = 7, 12, 203
STRETCHES = pytest.mark.parametrize("stretch", [64, 70, 128, 203, 10_000])  # 203 = 3 x 64 + 11 = 2 x 70 + 63


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch, device: str) -> Callable[..., None]:
    """Sets how many tokens of the vocabulary are looked at together."""

    def cut(stretch: int, rows: int = ROWS) -> None:
        monkeypatch.setitem(logprobs.LOGITS, device, stretch * max(rows, 1))

    return cut


def inputs(seed: int = 0, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """States, weights, and tokens, among them the first and the last of the vocabulary and one that comes twice."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=random)
    weight = torch.randn(VOCABULARY, WIDTH, generator=random)
    tokens = torch.tensor([0, VOCABULARY - 1, 63, 64, 69, 70, 64])[:rows]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), tokens


def plain(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`p = exp(z) / sum exp(z)`, log p of the token, `-sum p log p`, in float64."""
    logs = torch.log_softmax(hidden.double() @ weight.double().T / temperature, -1)
    return logs[torch.arange(len(tokens)), tokens], -(logs.exp() * logs).sum(-1)


def gradients(results: tuple[Tensor, Tensor], of_logprob: float, of_entropy: float, *by: Tensor) -> tuple[Tensor, ...]:
    """Of a sum that has another factor for every row."""
    factors = torch.linspace(0.5, 2.0, len(results[0])).to(results[0])
    total = sum(
        weight * (x * factors).sum() for weight, x in zip((of_logprob, of_entropy), results, strict=True) if weight
    )
    return torch.autograd.grad(total, by)


@STRETCHES
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize(("of_logprob", "of_entropy"), [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.3)])
def test_values_and_gradients_are_those_of_the_plain_formula(
    cut: Callable[..., None], stretch: int, temperature: float, of_logprob: float, of_entropy: float
) -> None:
    cut(stretch)
    hidden, weight, tokens = inputs()
    found = linear_logprobs(hidden, weight, tokens, temperature)
    expected = plain(hidden, weight, tokens, temperature)
    assert {x.dtype for x in found} == {torch.float32}
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    ours = gradients(found, of_logprob, of_entropy, hidden, weight)
    theirs = gradients(expected, of_logprob, of_entropy, hidden, weight)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=5e-5, rtol=1e-5)  # logits of 20 are rounded by 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_finite_differences(cut: Callable[..., None], seed: int) -> None:
    """Along random directions of states and weights; the differences are those of the plain formula in float64."""
    cut(64)
    hidden, weight, tokens = inputs(seed)
    by_hidden, by_weight = gradients(linear_logprobs(hidden, weight, tokens, 0.7), 1.0, 0.4, hidden, weight)
    random = torch.Generator().manual_seed(seed + 10)
    step = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in (hidden, weight)]
    factors = torch.linspace(0.5, 2.0, ROWS).double()

    def total(size: float) -> float:
        values = plain(hidden + size * step[0], weight + size * step[1], tokens, 0.7)
        return sum(w * (x * factors).sum().item() for w, x in zip((1.0, 0.4), values, strict=True))

    slope = (by_hidden.double() * step[0]).sum() + (by_weight.double() * step[1]).sum()
    assert slope.item() == pytest.approx((total(1e-5) - total(-1e-5)) / 2e-5, abs=1e-3, rel=1e-5)


@pytest.mark.parametrize("how", ["weights", "autocast"])
@pytest.mark.parametrize("stretch", [64, 10_000])
def test_in_bfloat16_only_the_logits_and_gradients_are_rounded(
    cut: Callable[..., None], how: str, stretch: int, device: str
) -> None:
    """The logits are those of a product in bfloat16; everything after it is exact."""
    cut(stretch)
    hidden, weight, tokens = inputs(dtype=torch.bfloat16 if how == "weights" else torch.float32)
    with torch.autocast(device, torch.bfloat16, enabled=how == "autocast"):
        found = linear_logprobs(hidden, weight, tokens, 0.7)
    parts = [hidden.bfloat16() @ part.T for part in weight.bfloat16().split(stretch)]  # their shape decides of rounding
    logits = torch.cat(parts, 1).double() / 0.7
    logs = torch.log_softmax(logits, -1)
    expected = logs[torch.arange(ROWS), tokens], -(logs.exp() * logs).sum(-1)
    assert {x.dtype for x in found} == {torch.float32}
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=2e-5, rtol=2e-5)
    ours = gradients(found, 1.0, 0.3, hidden, weight)
    for one, other, of in zip(ours, gradients(expected, 1.0, 0.3, hidden, weight), (hidden, weight), strict=True):
        assert one.dtype == of.dtype
        torch.testing.assert_close(one.double(), other.double(), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("stretch", [64, 10_000])
def test_a_token_that_comes_often_has_its_whole_gradient(cut: Callable[..., None], stretch: int) -> None:
    """A sum of 2,000 equal terms in bfloat16 would end at 256 of them."""
    rows = 2000
    cut(stretch, rows)
    hidden, weight, _ = inputs(dtype=torch.bfloat16)
    many = hidden[:1].detach().expand(rows, -1).clone()
    tokens = torch.full((rows,), 5)
    (ours,) = torch.autograd.grad(linear_logprobs(many, weight, tokens)[0].sum(), weight)
    (theirs,) = torch.autograd.grad(plain(many, weight, tokens, 1.0)[0].sum(), weight)
    torch.testing.assert_close(ours[5], theirs[5], atol=0, rtol=0.01)


@STRETCHES
def test_the_stretches_change_nothing_but_rounding(cut: Callable[..., None], stretch: int) -> None:
    hidden, weight, tokens = inputs()
    whole = linear_logprobs(hidden, weight, tokens, 0.7)
    cut(stretch)
    for one, other in zip(linear_logprobs(hidden, weight, tokens, 0.7), whole, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-6)


def test_no_more_logits_exist_than_told(cut: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    cut(64)
    made: list[int] = []
    exp = torch.exp
    monkeypatch.setattr(torch, "exp", lambda x: made.append(x.numel()) or exp(x))
    linear_logprobs(*inputs())
    assert max(made) == 64 * ROWS


@pytest.mark.parametrize("stretch", [64, 10_000])
def test_no_rows_give_no_numbers_and_gradients_of_zero(cut: Callable[..., None], stretch: int) -> None:
    """A micro-batch that counts for nothing has no token to look at."""
    cut(stretch)
    hidden, weight, tokens = inputs(rows=0)
    found = linear_logprobs(hidden, weight, tokens, 0.7)
    assert [x.shape for x in found] == [(0,), (0,)]
    by_hidden, by_weight = torch.autograd.grad(found[0].sum() + found[1].sum(), (hidden, weight))
    assert by_hidden.shape == (0, WIDTH)
    assert torch.equal(by_weight, torch.zeros_like(weight))


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary(cut: Callable[..., None]) -> None:
    cut(64)
    found = linear_logprobs(torch.zeros(3, WIDTH), torch.randn(50, WIDTH), torch.tensor([0, 17, 49]))
    assert found[0].tolist() == pytest.approx([-math.log(50)] * 3, abs=1e-6)
    assert found[1].tolist() == pytest.approx([math.log(50)] * 3, abs=1e-6)


@pytest.mark.parametrize("place", [0, 100, 202])
def test_extreme_logits_have_finite_gradients(cut: Callable[..., None], place: int) -> None:
    """One token has everything, in the first, a middle and the last stretch."""
    cut(64)
    weight = torch.zeros(VOCABULARY, 1)
    weight[place] = 1e4
    hidden, weight = torch.ones(2, 1, requires_grad=True), weight.requires_grad_()
    logprob, entropy = linear_logprobs(hidden, weight, torch.tensor([place, (place + 1) % VOCABULARY]), 0.01)
    assert logprob.tolist() == pytest.approx([0.0, -1e6])
    assert entropy.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    found: Any = torch.autograd.grad((logprob + entropy).sum(), (hidden, weight))
    assert all(x.isfinite().all() for x in found)


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight, tokens = inputs()
    logprob, entropy = linear_logprobs(hidden, weight.detach(), tokens)
    (logprob + entropy).sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight, tokens)[0].requires_grad
