"""Frozen models: outside the module's parameters, the optimizer, the ZeRO engine and the checkpoints."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from rlhf.errors import UserError
from rlhf.hardware import GIB

ALIGNMENT = 64  # bytes, that of PyTorch's own CPU memory
PORTABLE = 1  # cudaHostRegisterPortable

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
            tensors = list(chain(self._model.parameters(), self._model.buffers()))
            if device.type == "cuda":
                buffer = _pin(tensors)
                weakref.finalize(self, torch.cuda.cudart().cudaHostUnregister, buffer.data_ptr())
            self._at_home = [(tensor, tensor.data) for tensor in tensors]
        for tensor, home in self._at_home:
            tensor.data = home.to(device, non_blocking=True)


def _pin(tensors: list[Tensor]) -> Tensor:
    """Moves the values of tensors into one buffer of page-locked CPU memory, of their size, and returns it.

    `Tensor.pin_memory` would take the next power of two for each of them.
    """
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
    for tensor, part in zip(tensors, buffer.split(sizes), strict=True):
        home = part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = home.copy_(tensor.data)  # one by one: the old memory of each is free before the next is written
    if status := int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, PORTABLE)):
        raise UserError(
            f"CUDA cannot pin {buffer.nbytes / GIB:.1f} GiB of CPU memory for a frozen model (error {status}). With "
            "model.reference_placement and model.reward_placement zero3 the processes of a machine share it out."
        )
    return buffer


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
