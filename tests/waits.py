"""Counts how often the CPU waits for a GPU; where there is none, for tensors that are said to be on one."""

from __future__ import annotations

import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST, GPU = torch.device("cpu"), torch.device("cpu", 0)  # to PyTorch the same
aten = torch.ops.aten
READ = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2, aten.repeat_interleave}
INDEXED = {aten.index, aten.index_put, aten.index_put_}
NOT_WAITING = {"sent", "batch_to"}  # functions that copy to a GPU from pinned memory: ours, and Lightning's for batches
Waits = list[str]  # the lines of code that waited


def _here() -> traceback.FrameSummary:
    """The innermost line of code outside of PyTorch and this file."""
    frames = traceback.extract_stack()
    return next(f for f in reversed(frames) if "/torch/" not in f.filename and f.filename != __file__)


class _Tags:
    """The memory that is said to be on a GPU."""

    def __init__(self) -> None:
        self.alive: dict[int, Any] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.alive.pop(key, None))
        return tensor

    def remove(self, tensor: Tensor) -> None:
        self.alive.pop(tensor.untyped_storage()._cdata, None)

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self.alive


class _Dispatch(TorchDispatchMode):
    """What is made of memory on a GPU is there, too; for an operator whose result depends on it the CPU waits."""

    def __init__(self, tags: _Tags, wait: Callable[[], None]) -> None:
        super().__init__()
        self.tags, self.wait = tags, wait

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(x in self.tags for x in tree_leaves((args, kwargs or {}))):
            masks = tree_leaves(args[1]) if func.overloadpacket in INDEXED else ()
            if func.overloadpacket in READ or any(x in self.tags and x.dtype == torch.bool for x in masks):
                self.wait()
            for tensor in tree_leaves(out):
                if isinstance(tensor, Tensor):
                    self.tags.add(tensor)
        return out


class _Function(TorchFunctionMode):
    """Moves tensors between the CPU and what is said to be a GPU, and knows which are where."""

    def __init__(self, tags: _Tags, wait: Callable[[], None]) -> None:
        super().__init__()
        self.tags, self.wait = tags, wait

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = bool(args) and args[0] in self.tags
        if func == Tensor.device.__get__:
            return GPU if there else func(*args)
        if func is Tensor.tolist and there:
            self.wait()
        if func in (Tensor.cpu, Tensor.to) and self._goal(func, there, *args[1:], **kwargs) != there:
            if there or _here().name not in NOT_WAITING:
                self.wait()
            moved = args[0].detach().clone()
            (self.tags.remove if there else self.tags.add)(moved)
            return func(moved, *args[1:], **kwargs)
        out = func(*args, **kwargs)
        if isinstance(kwargs.get("device"), torch.device) and kwargs["device"].index == 0:
            if func is torch.tensor:
                self.wait()
            self.tags.add(out)
        return out

    def _goal(self, func: Any, there: bool, *args: Any, **kwargs: Any) -> bool:
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.device | str):
                return torch.device(x).index == 0
            if isinstance(x, Tensor):
                return x in self.tags
        return there and func is Tensor.to


@contextmanager
def counted(device: str) -> Iterator[Waits]:
    """Counts inside the block; where there is no GPU, `GPU` is the device that is said to be one."""
    waits: Waits = []

    def wait() -> None:
        frame = _here()
        waits.append(f"{'/'.join(frame.filename.split('/')[-3:])}:{frame.lineno} {frame.line}")

    if device == "cpu":
        tags = _Tags()
        with _Dispatch(tags, wait), _Function(tags, wait):
            yield waits
        return
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("always")
        patch.setattr(warnings, "showwarning", lambda message, *_: "synchronizing" in str(message) and wait())
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
