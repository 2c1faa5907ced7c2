"""The learning rate of each step: linear warm-up, then cosine, linear or constant, as a pure function of the step.

A function of the step needs no state in a checkpoint and can be plotted before a run. What it gives up: schedules that
look at the loss.
"""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate(
    step: int,
    *,
    num_steps: int,
    peak: float,
    schedule: str,
    warmup_steps: int,
    min_fraction: float,
    restart_every: int | None = None,
    rewarm_steps: int = 0,
) -> float:
    """The learning rate of optimizer step `step`.

    Warm-up rises by `peak / (warmup_steps + 1)` a step, so the first step already learns and step `warmup_steps` is the
    first at `peak`. Cosine and linear then fall to `min_fraction * peak`, which the last step uses.

    After each restart the rate rises anew to where the schedule stands: ReLoRA's jagged cosine (arXiv 2307.05695).

    Args:
        step: 0-based, below `num_steps`.
        schedule: one of `SCHEDULES`.
        min_fraction: in 0..1; constant ignores it.
        restart_every: steps between restarts; None: there are none.
        rewarm_steps: how long the rate rises after a restart.
    """
    assert schedule in SCHEDULES, schedule
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    rate = peak
    if schedule != "constant":
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
        rate = peak * (min_fraction + (1.0 - min_fraction) * remaining)
    if restart_every is not None and step >= restart_every:
        rate *= min(1.0, (step % restart_every + 1) / (rewarm_steps + 1))
    return rate


def num_warmup_steps(warmup: float, num_steps: int) -> int:
    """Warm-up in steps: `warmup` below 1 is a fraction of the run, from 1 on it is a number of steps."""
    return round(warmup * num_steps) if warmup < 1 else int(warmup)
