"""Models that are only read: outside the module's parameters, the optimizer, the ZeRO engine and the checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, Literal, TypeVar

import torch
from torch import nn

Placement = Literal["device", "cpu"]
M = TypeVar("M", bound=nn.Module)


class FrozenModel(Generic[M]):
    """Holds a frozen model and says where it lives (D38).

    It is deliberately no `nn.Module`: a registered submodule would be broadcast, saved and switched by `.train()`.

    Args:
        model: any module; its parameters stop requiring gradients and it goes into evaluation mode.
        placement: `device` keeps it on the training device; `cpu` keeps it in CPU memory and brings it in for the time
            of a `with` block.
    """

    def __init__(self, model: M, placement: Placement = "device") -> None:
        self._model = model.eval().requires_grad_(False)
        self.placement = placement

    @contextmanager
    def on(self, device: torch.device) -> Iterator[M]:
        """The model, ready on `device` inside the `with` block."""
        self._model.to(device)
        try:
            yield self._model
        finally:
            if self.placement == "cpu":
                self._model.to("cpu")
