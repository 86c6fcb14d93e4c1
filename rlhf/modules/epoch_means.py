"""Means over the micro-batches of an epoch, which survive a stop in its middle."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.hardware import accumulator_dtype
from rlhf.ops.masking import masked_sum

State = dict[str, list[float]]


class EpochMeans:
    """Averages statistics over all real entries of an epoch and all ranks.

    Not torchmetrics' `MeanMetric`: it waits for the device at every update to look for NaN, and without that check
    (`nan_strategy="disable"`) it ignores weights.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor, mask: Tensor) -> None:
        """Adds the entries of `values` where `mask` is true; both have the same shape."""
        values = values.detach()
        sums = torch.stack([masked_sum(values, mask), mask.sum()]).to(accumulator_dtype(values.device))
        self._sums[name] = self._sums[name].to(sums) + sums if name in self._sums else sums

    def pop(self, reduce_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Returns the means over all ranks and starts again; every rank must have added to the same names.

        Args:
            reduce_sum: sums a tensor over ranks.
        """
        if not self._sums:
            return {}
        sums = reduce_sum(torch.stack(list(self._sums.values())))
        means = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
        names = list(self._sums)
        self._sums = {}
        return dict(zip(names, means, strict=True))

    def state(self) -> list[State]:
        """Collects the sums of every rank, for a checkpoint. All ranks must call it together."""
        own: State = {name: sums.tolist() for name, sums in self._sums.items()}
        if not (dist.is_available() and dist.is_initialized()):
            return [own]
        everyone: list[State] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, own)
        return everyone

    def load(self, saved: list[State], rank: int, world_size: int) -> None:
        """Continues from `state`; with another number of ranks, the first one takes over the sums of all."""
        if len(saved) == world_size:
            own = saved[rank]
        else:
            own = {
                name: [sum(part) for part in zip(*(s[name] for s in saved), strict=True)] if rank == 0 else [0.0, 0.0]
                for name in saved[0]
            }
        self._sums = {name: torch.tensor(sums, dtype=torch.float64) for name, sums in own.items()}
