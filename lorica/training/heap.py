"""What glibc's allocator makes of a step's tensors: bytes resident, against bytes alive.

On a CPU torch takes tensors from `posix_memalign(64)`. glibc looks for 96 bytes more than asked, puts the block on its
boundary, and leaves a gap of 48 bytes before it. Two things follow. A freed block is too short for the next one of the
same size unless a neighbour is free as well; and the program's small objects, of which a step makes hundreds of
thousands, settle in the gaps and keep neighbours apart. So a step of equal tensors needs far more than is alive at
once: 1.4 to 3.2 times, measured. No formula in live bytes alone predicted it; replaying the births and deaths on a
model of the heap does.

The model: best fit, neighbours joined, blocks from a threshold mapped on their own, the threshold growing with what is
unmapped (up to 32 MiB), the top given back. Small objects are not followed. They take a share of the gaps until the
step ends, and some for good; the two shares are the only fitted numbers (15 runs of four models with glibc 2.36). The
draw is seeded.

What it gives up: other C libraries (see `is_glibc`), and what threads beside the main
one allocate.
"""

from __future__ import annotations

import platform
import random
from bisect import bisect_left, insort
from collections.abc import Sequence

GAPS_TAKEN_FOR_THE_STEP = 0.75
GAPS_TAKEN_FOR_GOOD = 0.03
RUNTIME_BYTES = 48 << 20
"""What the first step brings in besides tensors: kernels, their scratch and caches, autograd's nodes."""

_HEADER, _ALIGNMENT, _SMALLEST = 16, 64, 32
_FIRST_THRESHOLD, _LAST_THRESHOLD = 128 << 10, 32 << 20
_PAGE, _TOP_PAD = 4096, 128 << 10
_NUM_STEPS, _NUM_DRAWS = 3, 8

Block = tuple[int, int]
"""(address, bytes); the address is -1 for a block that is mapped on its own."""


class Heap:
    """One arena. `peak` is the most that was resident so far, in bytes."""

    def __init__(self, seed: int = 0) -> None:
        self.peak = 0
        self._random = random.Random(seed)
        self._free: list[Block] = []  # (bytes, address), sorted
        self._begins: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._taken_gaps: list[Block] = []
        self._top = self._break = self._mapped = 0
        self._threshold = _FIRST_THRESHOLD

    def allocate(self, num_bytes: int) -> Block:
        """A block for `num_bytes`, aligned to 64 bytes as torch asks for it."""
        size = max(_SMALLEST, (num_bytes + 8 + 15) & ~15)
        if size >= self._threshold:
            block = (-1, (size + 2 * _PAGE - 1) & ~(_PAGE - 1))
            self._mapped += block[1]
        else:
            block = self._aligned(size)
        self.peak = max(self.peak, self._break + self._mapped)
        return block

    def free(self, block: Block) -> None:
        address, size = block
        if address >= 0:
            self._give_back(address, size)
            return
        self._mapped -= size
        self._threshold = max(self._threshold, size) if size <= _LAST_THRESHOLD else self._threshold

    def end_step(self) -> None:
        """Drop the small objects that live as long as a step."""
        for gap in self._taken_gaps:
            self._give_back(*gap)
        self._taken_gaps.clear()

    def _aligned(self, size: int) -> Block:
        address, found = self._take(size + _ALIGNMENT + _SMALLEST)
        gap = -(address + _HEADER) % _ALIGNMENT
        if 0 < gap < _SMALLEST:
            gap += _ALIGNMENT
        rest = found - gap - size
        if rest > _SMALLEST:
            self._give_back(address + gap + size, rest)
            found -= rest
        if gap:
            self._settle(address, gap)
        return address + gap, found - gap

    def _settle(self, address: int, gap: int) -> None:
        draw = self._random.random() - GAPS_TAKEN_FOR_GOOD
        if draw >= GAPS_TAKEN_FOR_THE_STEP:
            self._give_back(address, gap)
        elif draw >= 0:
            self._taken_gaps.append((address, gap))

    def _take(self, size: int) -> Block:
        index = bisect_left(self._free, (size, -1))
        if index == len(self._free):
            address, self._top = self._top, self._top + size
            self._break = max(self._break, self._top + _TOP_PAD)
            return address, size
        found, address = self._free[index]
        self._forget(address)
        if found - size < _SMALLEST:
            return address, found
        self._give_back(address + size, found - size)
        return address, size

    def _give_back(self, address: int, size: int) -> None:
        if address in self._ends:
            before = self._ends[address]
            size += self._forget(before)
            address = before
        if address + size in self._begins:
            size += self._forget(address + size)
        if address + size == self._top:
            self._top = address
            if self._break - self._top >= 2 * self._threshold:
                self._break = self._top + _TOP_PAD
            return
        self._begins[address] = size
        self._ends[address + size] = address
        insort(self._free, (size, address))

    def _forget(self, address: int) -> int:
        size = self._begins.pop(address)
        del self._ends[address + size]
        self._free.pop(bisect_left(self._free, (size, address)))
        return size


def resident_peak(sizes: Sequence[int], events: Sequence[tuple[int, int]], begin: int) -> int:
    """Most bytes resident over several equal steps, for storages of `sizes` bytes; the mean over a few draws.

    Args:
        events: (storage, +1 for its birth or -1 for its death) in order.
        begin: index of the event with which a step begins; what is alive then stays.
    """
    return sum(_one_run(Heap(seed), sizes, events, begin) for seed in range(_NUM_DRAWS)) // _NUM_DRAWS


def _one_run(heap: Heap, sizes: Sequence[int], events: Sequence[tuple[int, int]], begin: int) -> int:
    blocks = dict[int, Block]()
    _replay(heap, blocks, sizes, events[:begin])
    heap.end_step()
    for _ in range(_NUM_STEPS):
        held = set(blocks)
        _replay(heap, blocks, sizes, [event for event in events[begin:] if event[0] not in held])
        for number in blocks.keys() - held:
            heap.free(blocks.pop(number))
        heap.end_step()
    return heap.peak


def is_glibc() -> bool:
    """Whether this process allocates as modelled here."""
    return platform.libc_ver()[0] == "glibc"


def _replay(heap: Heap, blocks: dict[int, Block], sizes: Sequence[int], events: Sequence[tuple[int, int]]) -> None:
    for number, change in events:
        if change > 0:
            blocks[number] = heap.allocate(sizes[number])
        elif number in blocks:
            heap.free(blocks.pop(number))
