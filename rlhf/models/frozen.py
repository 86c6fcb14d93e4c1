"""Frozen models: outside the module's parameters, the optimizer, the ZeRO engine and the checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

Placement = Literal["device", "cpu", "zero3"]
M = TypeVar("M", bound=nn.Module)


class FrozenModel(Generic[M]):
    """Holds a frozen model and decides where it is kept (D38).

    It is deliberately no `nn.Module`: a registered submodule would be broadcast, saved and switched by `.train()`.

    Args:
        model: any module; it goes into evaluation mode, and its parameters require no gradients any more.
        placement: `device` keeps it on the training device. `cpu` keeps it in CPU memory (pinned, if the device is a
            GPU) and copies it to the device for the time of a `with` block. `zero3` partitions the weights across
            processes, in CPU memory, and gathers them layer by layer: every process must then make the same number of
            forwards.
    """

    def __init__(self, model: M, placement: Placement = "device") -> None:
        self._model = model.eval().requires_grad_(False)
        self.placement = placement
        self._users = 0
        self._at_home: list[tuple[Tensor, Tensor]] = []
        self._engine: Any = None

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterates over its parameters, wherever they are."""
        return self._model.parameters()

    @contextmanager
    def on(self, device: torch.device) -> Iterator[M]:
        """Yields the model, ready on `device`. Blocks can be nested; the outermost one moves it."""
        if not self._users:
            self._bring(device)
        self._users += 1
        try:
            yield self._model
        finally:
            self._users -= 1
            if not self._users:
                for tensor, home in self._at_home:
                    tensor.data = home  # the copy on the device is dropped

    def _bring(self, device: torch.device) -> None:
        if self.placement == "device":
            self._model.to(device)
        elif self.placement == "zero3":
            self._engine = self._engine or _zero3_engine(self._model, device)
        elif not self._at_home:
            for tensor in chain(self._model.parameters(), self._model.buffers()):
                if device.type == "cuda":  # one by one: its unpinned memory is free before the next is pinned
                    tensor.data = tensor.data.pin_memory()
                self._at_home.append((tensor, tensor.data))
        for tensor, home in self._at_home:
            tensor.data = home.to(device, non_blocking=True)


def _zero3_engine(model: nn.Module, device: torch.device) -> Any:
    import deepspeed

    dtype = next(model.parameters()).dtype
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": device.type == "cuda"}},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    return deepspeed.initialize(model=model, config=config)[0]
