"""CUDA streams that put everything off for as long as they may, on a CPU: what is not waited for is not done.

A queue's work runs when somebody waits for the stream, or another stream's work waits for an event in it. So a copy
that the real device might still be busy with has, here, certainly not happened.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

_LOCK = threading.RLock()


class LazyEvent:
    """The moment when all that stood in `stream` before it is done."""

    def __init__(self, stream: LazyStream) -> None:
        self.stream, self.is_done = stream, False

    def finish(self) -> None:
        self.is_done = True


class LazyStream:
    def __init__(self, device: object = None) -> None:
        self._queue: deque[Callable[[], None]] = deque()

    def enqueue(self, work: Callable[[], None]) -> None:
        with _LOCK:
            self._queue.append(work)

    def record_event(self) -> LazyEvent:
        event = LazyEvent(self)
        self.enqueue(event.finish)
        return event

    def wait_event(self, event: LazyEvent) -> None:
        self.enqueue(lambda: event.stream.run_until(event))

    def run_until(self, event: LazyEvent) -> None:
        with _LOCK:
            while not event.is_done:
                self._queue.popleft()()

    def synchronize(self) -> None:
        with _LOCK:
            while self._queue:
                self._queue.popleft()()
