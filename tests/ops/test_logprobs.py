"""Log-probabilities from hidden states against formulas on whole logits in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.ops import logprobs
from rlhf.ops.logprobs import linear_logprobs

N, H, V, T = 9, 16, 300, 0.7


@pytest.fixture(params=[2**19, 9 * 64, 9 * 128 + 5], ids=["one stretch", "stretches of 64", "a short last one"])
def stretches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(logprobs.LOGITS, "cpu", request.param)
    return


def inputs(dtype: torch.dtype = torch.float32, rows: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, and tokens: the first and the last of the vocabulary, and one on each side of 64."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, H, generator=g), torch.randn(V, H, generator=g)
    tokens = torch.tensor([0, V - 1, 63, 64, 65, 127, 128, 200, 5])[:rows]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), tokens


def plain(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logs = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    return logs.gather(1, tokens[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


def gradients(function: Any, of_logprob: Tensor, of_entropy: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, tokens = inputs(dtype)
    found, entropy = function(hidden, weight, tokens, T)
    total = (found * of_logprob).sum()
    if of_entropy is not None:
        total = total + (entropy * of_entropy).sum()
    total.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [hidden.grad.double(), weight.grad.double()]


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("temperature", [0.7, 1.0, 0.01])
def test_values_are_those_of_the_whole_logits(temperature: float) -> None:
    hidden, weight, tokens = inputs()
    found, expected = linear_logprobs(hidden, weight, tokens, temperature), plain(hidden, weight, tokens, temperature)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, atol=1e-5 / temperature, rtol=1e-5)


@pytest.mark.usefixtures("stretches")
@pytest.mark.parametrize("entropy", [False, True])
def test_gradients_are_those_of_the_whole_logits(entropy: bool) -> None:
    of_logprob, of_entropy = torch.linspace(-2, 3, N), torch.linspace(1, -1, N) if entropy else None
    found = gradients(linear_logprobs, of_logprob, of_entropy, torch.float32)
    expected = gradients(plain, of_logprob, of_entropy, torch.float32)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_the_entropy_alone_has_a_gradient() -> None:
    found = gradients(linear_logprobs, torch.zeros(N), torch.ones(N), torch.float32)
    expected = gradients(plain, torch.zeros(N), torch.ones(N), torch.float32)
    assert expected[0].abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_sixteen_bits_round_the_logits_and_nothing_else(how: str) -> None:
    """The same as a log-softmax in float32 of logits that were rounded to bfloat16."""
    hidden, weight, tokens = inputs(torch.bfloat16 if how == "weights" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found, entropy = linear_logprobs(hidden, weight, tokens, T)
        logits = torch.nn.functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    logs = (logits.float() / T).log_softmax(-1)
    torch.testing.assert_close(found, logs.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(-1), atol=1e-5, rtol=1e-5)
    found.sum().backward()
    of_logits = torch.nn.functional.one_hot(tokens, V) - logs.exp()
    expected = (of_logits.detach() / T) @ weight.detach().float()
    assert hidden.grad is not None
    assert hidden.grad.dtype == hidden.dtype
    torch.testing.assert_close(hidden.grad.float(), expected, atol=0.05, rtol=0.02)


def test_no_tokens_give_no_numbers_and_no_gradient() -> None:
    hidden, weight, tokens = inputs(rows=0)
    found, entropy = linear_logprobs(hidden, weight, tokens, T)
    (found.sum() + entropy.sum()).backward()
    assert found.shape == entropy.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_logits_of_all_tokens_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    monkeypatch.setitem(logprobs.LOGITS, "cpu", N * 64)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dim() == 2 and out.shape[0] == N:
                largest = max(largest, out.shape[1])
            return out

    hidden, weight, tokens = inputs()
    with Watch():
        found, _ = linear_logprobs(hidden, weight, tokens, T)
        found.sum().backward()
    assert 64 <= largest < V
