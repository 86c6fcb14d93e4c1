"""Freed memory stays with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from rlhf.heap import keep_freed_memory

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
