"""How far `kernels/pool.py` fills up under a sequence of allocations: its algorithm, without the memory.

Tensors that come and go between others leave holes, so a step holds more than what is alive; how much follows from the
sizes and their order alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

_ALIGNMENT = 64


class Heap:
    """Best fit, with neighbours that grow together. `top` is the end of what was ever in use, in bytes.

    Holes are kept by size and by both ends, so that taking one and growing together take no search.
    """

    def __init__(self) -> None:
        self.top = 0
        self._taken: dict[int, tuple[int, int]] = {}
        self._holes: list[tuple[int, int]] = []
        self._size_at: dict[int, int] = {}
        self._begin_before: dict[int, int] = {}

    def allocate(self, key: int, num_bytes: int) -> None:
        """Take a block, to be freed by `key`."""
        size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        at = bisect_left(self._holes, (size, -1))
        if at < len(self._holes):
            hole, begin = self._holes[at]
            self._remove(begin)
            if hole > size:
                self._insert(begin + size, hole - size)
        else:
            # A hole at the very top grows upwards.
            begin = self._begin_before.get(self.top, self.top)
            if begin < self.top:
                self._remove(begin)
            self.top = begin + size
        self._taken[key] = (begin, size)

    def free(self, key: int) -> None:
        """Give a block back."""
        begin, size = self._taken.pop(key)
        if (before := self._begin_before.get(begin)) is not None:
            size += self._size_at[before]
            self._remove(before)
            begin = before
        if (after := self._size_at.get(begin + size)) is not None:
            self._remove(begin + size)
            size += after
        self._insert(begin, size)

    def _insert(self, begin: int, size: int) -> None:
        insort(self._holes, (size, begin))
        self._size_at[begin] = size
        self._begin_before[begin + size] = begin

    def _remove(self, begin: int) -> None:
        size = self._size_at.pop(begin)
        del self._begin_before[begin + size]
        del self._holes[bisect_left(self._holes, (size, begin))]


def filled_bytes(sizes: Sequence[int], events: Sequence[tuple[int, int]], repeat_from: int, repeats: int) -> int:
    """How far the pool fills up under `events`, those from `repeat_from` on taking place `repeats` times.

    `events` are (number, +1) where the block of `sizes[number]` bytes is born and (number, -1) where it dies; a block
    that is born in the repeated part and never dies does so before the next repetition.
    """
    heap = Heap()

    def play(part: Iterable[tuple[int, int]]) -> None:
        for number, change in part:
            if sizes[number] == 0:
                continue
            if change > 0:
                heap.allocate(number, sizes[number])
            else:
                heap.free(number)

    play(events[:repeat_from])
    step = events[repeat_from:]
    born = [number for number, change in step if change > 0]
    died = {number for number, change in step if change < 0}
    # What was there before and left in the step comes back, so that each repetition begins as the first.
    returned = sorted(died - set(born))
    for i in range(repeats):
        if i:
            play((number, 1) for number in returned)
        play(step)
        play((number, -1) for number in born if number not in died)
    return heap.top
