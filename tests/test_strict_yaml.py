"""Our YAML by itself; how a configuration reads it is in test_config.py."""

from __future__ import annotations

import math

import pytest

from lorica.strict_yaml import dump_value, parse


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e-5, -0.0, 3, True, None, [math.inf, {"a": -math.inf}]])
def test_values_come_back(value: object) -> None:
    document = parse(f"key: {dump_value(value)}\n")
    assert (document.faults, document.value) == ([], {"key": value})


def test_not_a_number_comes_back() -> None:
    assert math.isnan(parse(f"key: {dump_value(math.nan)}\n").value["key"])
