"""What tests of several methods ask alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def check_dropout() -> Callable[[Any, Tensor, Callable[[], Tensor]], None]:
    """Whether an adapter drops nothing in evaluation, and in training computes `wanted`, which draws as it does."""

    def check(adapter: Any, x: Tensor, wanted: Callable[[], Tensor]) -> None:
        adapter.eval()
        assert torch.equal(adapter(x), adapter(x))
        adapter.train()
        torch.manual_seed(1)
        got = adapter(x)
        torch.manual_seed(1)
        torch.testing.assert_close(got, wanted(), rtol=1e-4, atol=1e-4)

    return check
