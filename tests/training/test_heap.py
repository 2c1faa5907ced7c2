"""The pool's algorithm without its memory."""

from __future__ import annotations

import itertools
import random

from lorica.training.heap import Heap, filled_bytes


def test_the_smallest_hole_that_is_large_enough_is_taken() -> None:
    heap = Heap()
    for key, size in enumerate((640, 64, 320, 64, 192, 64)):
        heap.allocate(key, size)
    full = heap.top
    for key in (0, 2, 4):
        heap.free(key)
    heap.allocate(10, 320)
    heap.allocate(11, 192)
    heap.allocate(12, 640)
    assert heap.top == full == 1344


def test_neighbours_grow_together_whatever_their_order() -> None:
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2)):
        heap = Heap()
        for key in range(4):
            heap.allocate(key, 64)
        for key in order:
            heap.free(key)
        heap.allocate(9, 192)
        assert heap.top == 256


def test_the_last_hole_grows_upwards() -> None:
    heap = Heap()
    heap.allocate(0, 100)
    heap.allocate(1, 128)
    heap.free(1)
    heap.allocate(2, 1000)
    assert heap.top == 128 + 1024


def test_blocks_never_overlap() -> None:
    random.seed(0)
    heap = Heap()
    for key in range(2000):
        heap.allocate(key, random.randrange(1, 5000))
        if random.random() < 0.6:
            heap.free(random.choice(list(heap._taken)))
    blocks = sorted(heap._taken.values())
    assert all(begin + size <= after for (begin, size), (after, _) in itertools.pairwise(blocks))
    assert blocks[-1][0] + blocks[-1][1] <= heap.top


def test_a_step_is_repeated_from_where_it_began() -> None:
    # Block 0 stays, 1 is there before the step and leaves in it, 2 is born in it and stays till its end.
    sizes = [640, 64, 128]
    events = [(0, 1), (1, 1), (1, -1), (2, 1)]
    for repeats in (1, 2, 3):
        assert filled_bytes(sizes, events, 2, repeats) == 640 + 128
    # What the step leaves behind is gone before it comes again.
    assert filled_bytes([64], [(0, 1)], 0, repeats=5) == 64
