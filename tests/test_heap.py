"""Freed memory stays with the process, and compiled primitives do not pile up in it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

FAULTS = """
import resource, sys
import torch
from rlhf.hardware import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(10):
    tensors = [torch.ones(2**20 * mebibytes // 4) for mebibytes in (40, 60, 80)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_memory_is_used_again() -> None:
    def faults(word: str) -> int:
        command = [sys.executable, "-c", FAULTS, word]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < 0.5 * faults("hand back")


GROWTH = """
import sys
import torch
from rlhf.hardware import bound_primitive_cache


def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


if sys.argv[1] == "bound":
    bound_primitive_cache()
for rows in range(2000, 2800):
    torch.nn.functional.gelu(torch.ones(rows, 8))
    before = resident() if rows == 2000 else before
print(resident() - before)
"""


@pytest.mark.skipif(not (sys.platform == "linux" and torch.backends.mkldnn.is_available()), reason="no oneDNN")
def test_memory_does_not_grow_with_the_number_of_shapes() -> None:
    def growth(word: str) -> float:
        command = [sys.executable, "-c", GROWTH, word]
        unset = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN_")}
        return float(subprocess.run(command, capture_output=True, text=True, check=True, env=unset).stdout)

    free = growth("free")
    if free < 15:
        pytest.skip("this build of torch computes GELU without oneDNN")
    assert growth("bound") < 0.5 * free
