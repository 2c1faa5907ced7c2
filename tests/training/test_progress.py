from __future__ import annotations

import io
import sys

import pytest

from lorica.training import progress
from lorica.training.progress import show_progress

ROW = {"step": 1, "loss": 2.34567, "lr": 1e-4, "tokens_per_second": 1234.5, "peak_memory_bytes": 3 << 29}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with show_progress(100, 0) as display:
        display.step(ROW)
        display.say("[not markup]")
    return screen.getvalue()


def test_off_a_terminal_lines_go_to_stderr_and_only_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(100, 0) as display:
        for step in range(1, 51):
            display.step({**ROW, "step": step})
        display.evaluation({"step": 50, "epoch": 0.5, "eval_loss": 2.25, "eval_perplexity": 9.4877})
        display.step({**ROW, "step": 100, "loss": None})
    captured = capsys.readouterr()
    assert captured.out == "" and "\x1b" not in captured.err
    first, evaluation, last = captured.err.splitlines()
    assert first.startswith("step 1/100  loss 2.3457  lr 1.00e-04  1,234 tokens/s  1.50 GiB  ETA ")
    assert evaluation == "step 50  eval_loss 2.25  eval_perplexity 9.488"
    assert last.startswith("step 100/100  loss -")


def test_on_a_terminal_there_is_a_live_line_in_colour(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = on_terminal(monkeypatch)
    assert "1/100" in shown and "loss 2.3457" in shown and "[not markup]" in shown and "ETA" in shown
    assert "\x1b[38;" in shown and "\x1b[?25h" in shown
    assert capsys.readouterr().out == ""


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = on_terminal(monkeypatch)
    assert "loss 2.3457" in shown and "\x1b[3" not in shown.replace("\x1b[39m", "")


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in on_terminal(monkeypatch)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3600, "1:00:00"), (90061, "25:01:01")])
def test_durations_read_like_a_clock(seconds: float, text: str) -> None:
    assert progress._duration(seconds) == text
