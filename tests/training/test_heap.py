"""The model of glibc's heap against glibc itself, and the property that makes it worth having."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from lorica.training import heap as heap_module
from lorica.training.heap import Heap, is_glibc, resident_peak

# (size, block that is freed before or -1): 3000 allocations of about 300 alive at once, below the mapping threshold.
_REPLAY = """
import ctypes, sys
class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "arena a b c mapped d e used free top".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
pointers = (ctypes.c_void_p * 4000)()
plan = [tuple(map(int, line.split())) for line in sys.stdin]
address = ctypes.addressof(pointers)
libc.free.argtypes = [ctypes.c_void_p]
libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
before = libc.mallinfo2()
for i, (size, drop) in enumerate(plan):
    if drop >= 0:
        libc.free(pointers[drop])
    libc.posix_memalign(address + 8 * i, 64, size)
after = libc.mallinfo2()
print(after.arena - before.arena + after.mapped - before.mapped, before.free)
"""


@pytest.mark.skipif(not is_glibc(), reason="the C library is not glibc")
def test_against_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap_module, "GAPS_TAKEN_FOR_THE_STEP", 0.0)
    monkeypatch.setattr(heap_module, "GAPS_TAKEN_FOR_GOOD", 0.0)
    draw, alive, plan = random.Random(0), list[int](), list[tuple[int, int]]()
    for index in range(3000):
        drop = alive.pop(draw.randrange(len(alive))) if len(alive) >= 300 else -1
        plan.append((64 * draw.randrange(64, 1900), drop))
        alive.append(index)
    lines = "\n".join(f"{size} {drop}" for size, drop in plan)
    child = subprocess.run([sys.executable, "-c", _REPLAY], input=lines, capture_output=True, text=True, check=True)
    grown, was_free = map(int, child.stdout.split())
    heap, blocks = Heap(), {}
    for index, (size, drop) in enumerate(plan):
        if drop >= 0:
            heap.free(blocks[drop])
        blocks[index] = heap.allocate(size)
    assert heap.peak == pytest.approx(grown + was_free, rel=0.1)


def test_a_freed_block_is_too_short_for_its_own_size() -> None:
    heap = Heap()
    heap.free(heap.allocate(200_000))  # raises the threshold: nothing below is mapped from here on
    first, second = heap.allocate(100_032), heap.allocate(100_032)
    heap.free(first)
    again = heap.allocate(100_032)
    assert again[0] > second[0], "it went to the top, not into the hole"
    smaller = heap.allocate(50_048)
    assert smaller[0] < second[0], "a smaller one takes the hole"


def test_large_blocks_are_mapped_and_go_back() -> None:
    heap = Heap()
    block = heap.allocate(64 << 20)
    assert block[0] == -1 and 64 << 20 < heap.peak <= (64 << 20) + 8192
    heap.free(block)
    heap.allocate(64 << 20)
    assert heap.peak <= (64 << 20) + 8192


def test_resident_peak_is_at_least_what_lives() -> None:
    sizes = [1 << 20] * 40
    step = [(n, 1) for n in range(10, 40)] + [(n, -1) for n in range(39, 9, -1)]
    events = [(n, 1) for n in range(10)] + step
    peak = resident_peak(sizes, events, begin=10)
    assert 40 << 20 <= peak < 60 << 20
    assert peak == resident_peak(sizes, events, begin=10), "seeded"
