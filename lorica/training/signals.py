"""SIGINT and SIGTERM as a request: the loop looks between two steps, saves and leaves. SIGINT again leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Attributes: signal_number: the first signal that came, or None."""

    signal_number: int | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch SIGINT and SIGTERM while inside, and give the previous handlers back.

    SIGINT after any of the two exits the process with 130 on the spot, without clean-up: a finished checkpoint is a
    renamed folder and cannot be half. Outside the main thread Python allows no handlers, and nothing is caught.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.signal_number is None:
            request.signal_number = number
            # os.write: print may be interrupted inside itself by this very handler.
            os.write(2, b"\nStopping after this step, with a checkpoint. Ctrl-C again stops at once.\n")
        elif number == signal.SIGINT:
            if os.isatty(2):
                # The live display hid the cursor, and nothing after this line will show it again.
                os.write(2, b"\x1b[?25h")
            os._exit(130)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            # None stands for a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
