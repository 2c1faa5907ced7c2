"""The roofline in closed form, and that the rates are measured at all."""

from __future__ import annotations

import pytest
import torch

from lorica.training import speed as speed_module
from lorica.training.ledger import Operation
from lorica.training.speed import Speed, measure_speed


def test_an_operation_takes_the_longer_of_its_work_and_its_traffic() -> None:
    speed = Speed({"matmul": 1e9}, bytes_per_second=1e8, call_seconds=1e-3)
    assert speed.seconds({Operation("matmul", 10**9, 10**6): 2}) == pytest.approx(2 * (1 + 1e-3))
    assert speed.seconds({Operation("matmul", 10**6, 10**8): 1}) == pytest.approx(1 + 1e-3)
    assert speed.seconds({Operation("memory", 0, 10**8): 3}) == pytest.approx(3 * (1 + 1e-3))
    assert speed.seconds({}) == 0


def test_measured_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_module, "_SECONDS_A_RATE", 0.01)
    before = torch.get_rng_state()
    speed = measure_speed(torch.float32, "cpu", tokens=64, hidden=32, heads=2, length=32)
    assert {"matmul", "narrow_matmul", "attention", "attention_backward"} == speed.flops_per_second.keys()
    assert all(rate > 1e6 for rate in speed.flops_per_second.values()) and speed.bytes_per_second > 1e6
    assert 0 < speed.call_seconds < 1e-2
    assert torch.equal(torch.get_rng_state(), before)
