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
        self._users = 0

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its parameters, wherever they are."""
        return self._model.parameters()

    @contextmanager
    def on(self, device: torch.device) -> Iterator[M]:
        """The model, ready on `device` inside the `with` block; blocks can be nested, the outermost one moves it."""
        self._model.to(device)
        self._users += 1
        try:
            yield self._model
        finally:
            self._users -= 1
            if self.placement == "cpu" and not self._users:
                self._model.to("cpu")
