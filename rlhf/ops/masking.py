"""Statistics over the real entries of padded tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """The reduction over a single process."""
    return x


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of `values` where `mask` is true; both `(...)` of the same shape. Masked entries may be non-finite."""
    return torch.where(mask, values, 0.0).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true; 0 where the mask is empty."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_moments(values: Tensor, mask: Tensor, reduce: Reduce = identity) -> tuple[Tensor, Tensor]:
    """Mean and variance of the real entries.

    Args:
        values: `(...)`.
        mask: `(...)`, true where real.
        reduce: sums a tensor over all ranks, so that the moments are those of the global batch.

    Returns:
        Two scalars. The variance divides by n, as in the reference.
    """
    count, total = reduce(torch.stack([mask.sum().to(values.dtype), masked_sum(values, mask)]))
    mean = total / count.clamp(min=1)
    deviations = torch.where(mask, values - mean, 0.0)
    return mean, reduce((deviations**2).sum()) / count.clamp(min=1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Reduce = identity) -> Tensor:
    """Scale the real entries to variance 1 and, with `shift_mean`, to mean 0; masked entries become 0.

    `(x - mean) / sqrt(var + 1e-8)`, plus the mean again where it is not to be shifted (D30, D32).
    """
    values = torch.where(mask, values, 0.0)
    mean, variance = masked_moments(values, mask, reduce)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)
