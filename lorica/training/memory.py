"""Give freed tensors back to the system at once, so that the process holds what is alive and little more.

glibc keeps freed blocks of up to 32 MiB for later, and torch's alignment makes most of them unfit for the next tensor
of the same size: a training step then holds 1.4 to 3 times what is alive. With a fixed threshold every large tensor is
mapped on its own and leaves when it is freed. That saves a fifth to a half of the memory and makes the peak something
that can be predicted by adding up what is alive. It costs page faults: little for small models, but at 135 million
parameters more than half of a step's time on a virtual machine (docs/log.md). `train.return_memory: false` turns it
off.
"""

from __future__ import annotations

import ctypes
import platform

MAPPED_FROM_BYTES = 1 << 20
_M_MMAP_THRESHOLD = -3


def return_freed_memory() -> bool:
    """Map each block of 1 MiB or more on its own from now on, in the whole process. False where libc is no glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM_BYTES))
