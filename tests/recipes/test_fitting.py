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
        (8 * GIB, ["train.activation_checkpointing=offload"]),
        (4 * GIB, ["train.activation_checkpointing=offload", "train.optimizer_memory=67108864"]),
        (
            2 * GIB,
            ["train.activation_checkpointing=offload", "train.optimizer_memory=67108864", "model.dtype=bfloat16"],
        ),
    ],
)
def test_moving_things_elsewhere_is_offered_before_what_changes_the_result(
    room: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 GiB, of which 4 are moments; checkpointing saves one, offloading another one, half precision two."""

    def rehearse_run(config: RunConfig, setting: Setting) -> Any:
        optimizer = 4 * GIB if config.train.optimizer_memory is None else config.train.optimizer_memory
        saved = GIB * (False, True, "offload").index(config.train.activation_checkpointing)
        rest = 6 * GIB - saved - 2 * GIB * (config.model.dtype == "bfloat16")
        return SimpleNamespace(
            parts=SimpleNamespace(optimizer=optimizer),
            peak_bytes=optimizer + rest - (64 << 20),
            offloaded_bytes=GIB if config.train.activation_checkpointing == "offload" else 0,
        )

    monkeypatch.setattr(fitting, "rehearse_run", rehearse_run)
    assert fitting.find_alternatives(make_config(), SETTING, room)[0].overrides == expected


def test_what_is_little_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    little = SimpleNamespace(parts=SimpleNamespace(optimizer=1 << 20), offloaded_bytes=1 << 20)
    monkeypatch.setattr(fitting, "rehearse_run", lambda *_: little)
    offered = {key for key, _, _ in fitting._harmful(make_config(), SETTING)}
    assert not offered & {"train.optimizer_memory", "train.activation_checkpointing"}
