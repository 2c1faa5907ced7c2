"""What `prepare` hands to the verbs that begin with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lorica
from lorica.config import RunConfig
from lorica.models.attention import packing_support
from lorica.recipes.preparing import base_config, prepare, why_padded


def test_a_run_asks_the_architecture_once_whether_it_packs(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is built and run for it on fake tensors, which takes longer than a step of a small one."""
    asked: list[Any] = []

    def counting(*arguments: Any) -> str | None:
        asked.append(arguments)
        return packing_support(*arguments)

    monkeypatch.setattr("lorica.recipes.tasks.packing_support", counting)
    lorica.train(make_config(tmp_path / "run", max_steps=1))
    assert len(asked) == 1


@pytest.mark.parametrize("packing", [True, False])
def test_the_reason_for_padding_goes_with_the_layout(make_config: Callable[..., RunConfig], packing: bool) -> None:
    config = make_config("nowhere", data={"packing": packing})
    data = prepare(config)
    assert data.layout.padded is not packing
    assert data.padding == why_padded(config, base_config(config.model))
    assert (data.padding is None) is packing
