"""A pool for torch's CPU tensors, because a general malloc serves a training step badly.

torch takes each tensor from malloc, aligned to 64 bytes. glibc's keeps the few bytes cut off in front of a block in its
caches of small blocks, where they never grow together with their neighbours again; so the hole that a tensor leaves is
too small for the next tensor of its size, and a step holds 1.3 to 2 times what is alive. What lies at the heap's end
goes back to the system after each step and comes again page by page: 950,000 page faults a step for a model of 135
million parameters, which on a virtual machine cost more than half of its time.

The pool (`csrc/pool.cpp`) is one reserved range of addresses and best fit with growing together, nothing else. A step
then holds within a few percent of what is alive, takes no page fault after the first, and how much it will hold can be
predicted by replaying the same algorithm (`training/heap.py`).

What it gives up: memory goes back to the system only when the process ends, and it needs a C++ compiler once.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import torch

from lorica.kernels.build import library


def install_pool() -> bool:
    """Let torch's CPU tensors live in the pool from now on, in the whole process; False where that cannot be.

    Tensors made before stay where they are. The pool takes no more than the machine's memory, and says so as torch's
    own allocator does.
    """
    built = _library()
    capacity = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return built is not None and bool(built.lorica_install_pool(ctypes.c_size_t(capacity)))


def pool_bytes() -> int:
    """Bytes of the pool that were ever in use: what it holds."""
    built = _library()
    return 0 if built is None else int(built.lorica_pool_bytes())


def has_pool() -> bool:
    """Whether `install_pool` can do its work here."""
    return _library() is not None


def _library() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    torch_folder = Path(torch.__file__).parent
    libraries = torch_folder / "lib"
    flags = ("-std=c++20", f"-I{torch_folder / 'include'}", f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lc10")
    # The version stands for the headers' contents, which the cache's key does not see.
    built = library("pool.cpp", (*flags, f'-DLORICA_TORCH="{torch.__version__}"'))
    if built is not None:
        built.lorica_pool_bytes.restype = ctypes.c_size_t
    return built
