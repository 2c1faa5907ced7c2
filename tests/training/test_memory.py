"""Freed tensors leave the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lorica.training.memory import return_freed_memory

CODE = """
import torch
from lorica.training.memory import return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

assert return_freed_memory()
# Blocks of 4 MiB with small objects between them: on the heap these would pin what is freed.
start = resident()
held = [(torch.ones(1 << 20), torch.ones(16)) for _ in range(50)]
full = resident()
small = [pair[1] for pair in held]
del held
print(full - start, resident() - start)
"""


def test_large_tensors_leave_when_they_are_freed() -> None:
    if not return_freed_memory():
        pytest.skip("the C library is not glibc")
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    full, after = map(int, done.stdout.split())
    assert full > 190 << 20 and after < 20 << 20
