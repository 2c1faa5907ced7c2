from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from lorica.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from lorica.methods.full import FullFineTuning
from lorica.models.tasks import CAUSAL
from lorica.recipes import fitting
from lorica.recipes.rehearsing import Setting

SETTING = Setting(LlamaConfig(), CAUSAL, torch.device("cpu"), False, 1.0, None, None, None, None)
GIB = 1 << 30


def make_config(**changes: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(base="none", dtype="float32"),
        method=FullFineTuning(),
        data=DataConfig(train="none", max_length=64),
        train=TrainConfig(batch_tokens=64, **changes),
    )


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (9 * GIB, ["train.activation_checkpointing=true"]),
        (5 * GIB, ["train.activation_checkpointing=true", "train.optimizer_memory=67108864"]),
        (
            3 * GIB,
            ["train.activation_checkpointing=true", "train.optimizer_memory=67108864", "model.dtype=bfloat16"],
        ),
    ],
)
def test_paging_is_offered_before_what_changes_the_result(
    room: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 GiB, of which 4 are moments; checkpointing saves one, half precision two."""

    def rehearse_run(config: RunConfig, setting: Setting) -> Any:
        optimizer = 4 * GIB if config.train.optimizer_memory is None else config.train.optimizer_memory
        rest = 6 * GIB - GIB * config.train.activation_checkpointing - 2 * GIB * (config.model.dtype == "bfloat16")
        return SimpleNamespace(parts=SimpleNamespace(optimizer=optimizer), peak_bytes=optimizer + rest - (64 << 20))

    monkeypatch.setattr(fitting, "rehearse_run", rehearse_run)
    assert fitting.find_alternatives(make_config(), SETTING, room)[0].overrides == expected


def test_moments_that_are_few_are_not_paged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "rehearse_run", lambda *_: SimpleNamespace(parts=SimpleNamespace(optimizer=1 << 20)))
    assert all(key != "train.optimizer_memory" for key, _, _ in fitting._harmful(make_config(), SETTING))
