from __future__ import annotations

import os
import signal
import threading

import pytest

from lorica.training.signals import stop_requests

from .conftest import in_child


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_request_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert stop.signal_number is None
        os.kill(os.getpid(), number)
        assert stop.signal_number == number
    assert signal.getsignal(number) is before


def test_a_repeated_sigterm_still_waits_for_the_step() -> None:
    with stop_requests() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_sigint_after_a_request_leaves_at_once(first: signal.Signals) -> None:
    def work() -> None:
        with stop_requests():
            os.kill(os.getpid(), first)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("still here")

    assert in_child(work) == 130


def test_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with stop_requests() as stop:
            seen.extend([stop.signal_number, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [None, before]
