"""Log-probabilities of chosen tokens straight from hidden states, without the logits of all tokens."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

LOGITS = {"cpu": 2**19, "cuda": 2**26}  # float32 logits that exist at a time: 2 MiB fit in the cache of a CPU


def linear_logprobs(
    hidden: Float[Tensor, "n H"], weight: Float[Tensor, "V H"], tokens: Int[Tensor, " n"], temperature: float = 1.0
) -> tuple[Float32[Tensor, " n"], Float32[Tensor, " n"]]:
    """Computes the log-probability of tokens and the entropy at a temperature (D26), in nats, from hidden states.

    The logits are `hidden @ weight.T`, in the precision of autocast. They are computed for one stretch of the
    vocabulary at a time, again in the backward pass, and everything after them is float32: with
    z = logits / temperature, `logprob = z[token] - logsumexp(z)` and `entropy = logsumexp(z) - sum(softmax(z) z)`.
    Both have gradients.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast(device, enabled=False):
        return _LinearLogprobs.apply(hidden, weight, tokens, temperature)


def _stretches(rows: int, weight: Tensor) -> range:
    step = max(64, LOGITS.get(weight.device.type, LOGITS["cuda"]) // max(rows, 1))
    return range(0, len(weight), min(step, len(weight)))


def _columns(tokens: Int[Tensor, " n"], start: int, width: int) -> tuple[Bool[Tensor, " n"], Int[Tensor, "n 1"]]:
    """Returns which tokens are in a stretch of the vocabulary, and their columns; for the others any column."""
    columns = tokens - start
    return (columns >= 0) & (columns < width), columns.clamp(0, width - 1).unsqueeze(1)


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        # One pass over the vocabulary: largest z so far, sum of exp(z - largest), sum of z exp(z - largest).
        rows = hidden.new_zeros(len(hidden), dtype=torch.float32)
        largest, total, weighted, chosen = rows - torch.inf, rows, rows, rows
        stretches = _stretches(len(hidden), weight)
        for start in stretches:
            part = weight[start : start + stretches.step]
            z = (hidden @ part.T).float() / temperature
            here, column = _columns(tokens, start, len(part))
            chosen = torch.where(here, z.gather(1, column).squeeze(1), chosen)
            before, largest = largest, torch.maximum(largest, z.amax(1))
            shrink = torch.exp(before - largest)
            exponentials = torch.exp(z - largest.unsqueeze(1))
            total = total * shrink + exponentials.sum(1)
            weighted = weighted * shrink + torch.linalg.vecdot(exponentials, z)
        normaliser = largest + total.log()
        entropy = normaliser - weighted / total
        ctx.save_for_backward(hidden, weight, tokens, normaliser, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return chosen - normaliser, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        # With p = softmax(z): d logprob / dz = onehot - p, and d entropy / dz = -p (log p + entropy).
        of_logprob, of_entropy = gradients
        hidden, weight, tokens, normaliser, entropy = ctx.saved_tensors
        if of_logprob is None:
            of_logprob = torch.zeros_like(normaliser)
        scale = of_logprob / ctx.temperature
        of_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        of_weight = torch.empty_like(weight)
        stretches = _stretches(len(hidden), weight)
        for start in stretches:
            part = weight[start : start + stretches.step]
            logp = (hidden @ part.T).float().div_(ctx.temperature).sub_(normaliser.unsqueeze(1))
            if of_entropy is None:
                of_z = logp.exp_().mul_(-scale.unsqueeze(1))
            else:
                p, of_p = logp.exp(), (of_entropy / ctx.temperature).unsqueeze(1)
                of_z = logp.add_(entropy.unsqueeze(1)).mul_(-of_p).sub_(scale.unsqueeze(1)).mul_(p)
            here, column = _columns(tokens, start, len(part))
            own = of_z.gather(1, column) + torch.where(here, scale, 0.0).unsqueeze(1)
            of_z = of_z.scatter_(1, column, own).to(weight.dtype)
            of_hidden += of_z @ part
            torch.mm(of_z.T, hidden, out=of_weight[start : start + stretches.step])
        return of_hidden.to(hidden.dtype), of_weight, None, None
