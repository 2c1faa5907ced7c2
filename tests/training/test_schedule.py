from __future__ import annotations

import math
from typing import Any

import pytest

from lorica.training.schedule import SCHEDULES, learning_rate, num_warmup_steps


def rates(schedule: str, num_steps: int = 11, warmup_steps: int = 0, min_fraction: float = 0.0) -> list[float]:
    return [
        learning_rate(
            step,
            num_steps=num_steps,
            peak=2.0,
            schedule=schedule,
            warmup_steps=warmup_steps,
            min_fraction=min_fraction,
        )
        for step in range(num_steps)
    ]


def test_cosine_is_half_a_cosine_from_peak_to_minimum() -> None:
    expected = [2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * i / 10)) / 2) for i in range(11)]
    assert rates("cosine", min_fraction=0.1) == pytest.approx(expected)
    assert rates("cosine", min_fraction=0.1)[-1] == pytest.approx(0.2)


def test_linear_falls_by_equal_parts() -> None:
    assert rates("linear") == pytest.approx([2.0 - 0.2 * i for i in range(11)])


def test_constant_stays_at_peak_after_warmup() -> None:
    assert rates("constant", warmup_steps=4) == pytest.approx([0.4, 0.8, 1.2, 1.6] + [2.0] * 7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_starts_above_zero_and_the_peak_is_reached_once(schedule: str) -> None:
    values = rates(schedule, warmup_steps=3)
    assert values[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert max(values) == values[3]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_one_step_learns(schedule: str) -> None:
    assert rates(schedule, num_steps=1) == [2.0]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_longer_than_the_run_only_rises(schedule: str) -> None:
    values = rates(schedule, num_steps=5, warmup_steps=50)
    assert values == sorted(values) and values[-1] < 2.0


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 0), (0.03, 6), (0.5, 100), (1, 1), (12, 12)])
def test_warmup_below_one_is_a_fraction(warmup: float, steps: int) -> None:
    assert num_warmup_steps(warmup, 200) == steps


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_each_restart_the_rate_rises_to_where_the_schedule_stands(schedule: str) -> None:
    """The jagged cosine of ReLoRA's figure 2: the smooth one, times a ramp."""
    arguments: dict[str, Any] = {"num_steps": 14, "peak": 2.0, "schedule": schedule, "warmup_steps": 3}
    smooth, jagged = (
        [learning_rate(step, min_fraction=0.1, **arguments, **restarts) for step in range(14)]
        for restarts in ({}, {"restart_every": 5, "rewarm_steps": 2})
    )
    ramp = [1.0] * 5 + 2 * [1 / 3, 2 / 3, 1.0, 1.0, 1.0]
    assert jagged == pytest.approx([rate * factor for rate, factor in zip(smooth, ramp, strict=False)])
