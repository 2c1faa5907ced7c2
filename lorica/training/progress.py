"""What a person sees of a run, on stderr: a live line on a terminal, plain lines now and then anywhere else."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PLAIN_SECONDS = 5.0


class Display(ABC):
    """Shows metrics rows as they come."""

    @abstractmethod
    def step(self, row: Mapping[str, Any]) -> None:
        """A training row."""

    @abstractmethod
    def say(self, text: str) -> None:
        """One line that stays."""

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """An evaluation row."""
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name.startswith("eval_"))
        self.say(f"step {row['step']}  {numbers}")


@contextmanager
def show_progress(num_steps: int, first_step: int) -> Iterator[Display]:
    """A display for a run of `num_steps` that stands at `first_step`. rich honours NO_COLOR by itself."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield _Lines(num_steps, first_step)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    # stdout carries data and must not be drawn into the live display.
    with Progress(*columns, console=console, redirect_stdout=False) as progress:
        yield _Live(progress, progress.add_task("", total=num_steps, completed=first_step))


class _Live(Display):
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def step(self, row: Mapping[str, Any]) -> None:
        self._progress.update(self._task, completed=row["step"], description=_numbers(row))

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)


class _Lines(Display):
    def __init__(self, num_steps: int, first_step: int) -> None:
        self._num_steps, self._first_step = num_steps, first_step
        self._started = time.monotonic()
        self._spoke = -PLAIN_SECONDS

    def step(self, row: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if now - self._spoke < PLAIN_SECONDS and row["step"] < self._num_steps:
            return
        self._spoke = now
        seconds_left = (now - self._started) / (row["step"] - self._first_step) * (self._num_steps - row["step"])
        self.say(f"step {row['step']}/{self._num_steps}  {_numbers(row)}  ETA {_duration(seconds_left)}")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def _numbers(row: Mapping[str, Any]) -> str:
    loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
    memory = row["peak_memory_bytes"] / 2**30
    return f"loss {loss}  lr {row['lr']:.2e}  {row['tokens_per_second']:,.0f} tokens/s  {memory:.2f} GiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
