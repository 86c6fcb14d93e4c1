"""Statistics over the real entries of padded tensors, those where the mask is true. Padding may be non-finite."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Values = Float[Tensor, "*shape"]
Mask = Bool[Tensor, "*shape"]
Scalar = Float[Tensor, ""]
Reduce = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """Returns the tensor: the sum over a single process."""
    return x


def masked_sum(values: Values, mask: Mask) -> Scalar:
    """Computes the sum of the real entries."""
    return torch.where(mask, values, 0.0).sum()


def masked_mean(values: Values, mask: Mask) -> Scalar:
    """Computes the mean of the real entries; 0 if there are none."""
    return masked_sum(values, mask) / mask.sum().clamp(min=1)


def masked_moments(values: Values, mask: Mask, reduce: Reduce = identity) -> tuple[Scalar, Scalar]:
    """Computes the mean and the variance of the real entries; the variance divides by n, as in the reference.

    Args:
        reduce: sums a tensor over all ranks, so that the moments are those of the global batch.
    """
    count, total = reduce(torch.stack([mask.sum().to(values.dtype), masked_sum(values, mask)]))
    mean = total / count.clamp(min=1)
    deviations = torch.where(mask, values - mean, 0.0)
    return mean, reduce((deviations**2).sum()) / count.clamp(min=1)


def whiten(values: Values, mask: Mask, shift_mean: bool = True, reduce: Reduce = identity) -> Values:
    """Scales the real entries to variance 1 and, with `shift_mean`, to mean 0; masked entries become 0.

    `(x - mean) / sqrt(var + 1e-8)`, plus the mean again where it is not to be shifted (D30, D32).
    """
    values = torch.where(mask, values, 0.0)
    mean, variance = masked_moments(values, mask, reduce)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)
