"""The memory of a process whose device is a CPU."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of <malloc.h>
NEVER = -1
PRIMITIVES = "64"


def keep_freed_memory() -> None:
    """Has glibc keep freed memory for the next allocation instead of handing it back to the system.

    Every micro-batch frees its activations and gradients and asks for as much again. Memory that comes anew from the
    system is cleared first, page by page, tens of thousands in a micro-batch. Other C libraries are left as they are.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, NEVER)


def bound_primitive_cache() -> None:
    """Has oneDNN keep 64 compiled primitives instead of 1,024, before its first use; what the user has set stands.

    A primitive is compiled for one shape, and the shapes of a rollout hardly ever come back: the cache of a PPO run on
    a small model grew by half a gibibyte.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVES)


def peak_resident_gib() -> float:
    """Returns the most memory that this process has held, in GiB."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
