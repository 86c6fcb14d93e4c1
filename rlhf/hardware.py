"""What devices can do, and how much memory a process keeps and has held."""

import ctypes
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

GIB = 2**30
WITHOUT_FLOAT64 = {"mps"}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>

Precision = Literal["auto", "float32", "bfloat16"]


def best_device() -> torch.device:
    """Returns the NVIDIA GPU of this process, or the CPU (on a Mac always the CPU)."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def weights_precision(precision: Precision) -> Literal["float32", "bfloat16"]:
    """Returns the precision of weights outside of a Trainer; `auto` is bfloat16 on GPUs that compute in it."""
    if precision == "auto":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return precision


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """Returns the precision for sums that should not round: float64, or float32 on a Mac's GPU, which lacks it."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor to a device; a GPU copies it from pinned memory, so that the CPU does not wait for its turn."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded one cannot be pinned
    return tensor.to(device)


def device_memory(device: torch.device, processes: int) -> int:
    """Returns the bytes of a GPU, or the share that one of several processes has of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // processes


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak memory of a GPU, or of this process where it trains on the CPU, in GiB."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else peak_resident_gib()


def peak_resident_gib() -> float:
    """Returns the most memory that this process has held, in GiB."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


@contextmanager
def timed(seconds: dict[str, float], phase: str, device: torch.device) -> Iterator[None]:
    """Measures how long the block takes, until the device has done its work, and keeps it as `seconds[phase]`."""
    start = time.perf_counter()
    yield
    torch.get_device_module(device).synchronize()
    seconds[phase] = time.perf_counter() - start


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation instead of returning it to the system.

    Every micro-batch frees its activations and gradients and asks for as much again. Memory that comes from the system
    is cleared first, page by page, tens of thousands in a micro-batch. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def bound_primitive_cache() -> None:
    """Makes oneDNN keep 64 compiled primitives instead of 1,024, unless the user has set a number.

    A primitive is compiled for one shape, and the shapes of a rollout hardly ever repeat: the cache of a PPO run on a
    small model grew by half a gibibyte. Has an effect only before oneDNN's first use.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def avoid_plans_of_attention() -> None:
    """Makes PyTorch compute attention without cuDNN, in the whole process.

    On an H100 or newer cuDNN comes first for attention with a mask in half precision. It builds a plan for every new
    shape, which takes as long as hundreds of layers, and the shapes of a rollout hardly ever repeat: plain sampling has
    a new one in every step.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
