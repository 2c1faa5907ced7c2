"""Deep models from shallow ones: every number equals that of the whole rehearsal, and unlike layers are told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config

from lorica.errors import TargetError
from lorica.methods.full import FullFineTuning
from lorica.methods.lora import LoRA
from lorica.methods.method import MethodOptions
from lorica.training import deep
from lorica.training.deep import are_alike, rehearse_deep
from lorica.training.rehearsal import Rehearsal, rehearse

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
                         "vocab_size": 50, "tie_word_embeddings": False}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "step"),
    [
        (LoRA(rank=8), {"quant": "nf4", "activation_checkpointing": True}),
        (LoRA(rank=2), {"device": "cuda", "num_micro_batches": 2}),
        (FullFineTuning(), {}),
        (LoRA(rank=2), {"activation_checkpointing": "offload"}),
    ],
    ids=["nf4-checkpointed", "lora", "full", "offloaded"],
)
def test_it_equals_the_whole_rehearsal(
    options: MethodOptions, step: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deep, "_LEAST", 6)
    config = LlamaConfig(**SIZES)
    arguments: dict[str, Any] = {"dtype": torch.float32, "lengths": [32, 32], **step}
    found, whole = rehearse_deep(config, options, **arguments), rehearse(config, options, **arguments)
    assert found.parts == whole.parts and amounts(found) == amounts(whole)
    for name, parts in found.moments.items():
        assert parts == whole.moments[name], name
    assert (found.num_parameters, found.num_trainable) == (whole.num_parameters, whole.num_trainable)
    assert (found.loading, found.offloaded_bytes) == (whole.loading, whole.offloaded_bytes)
    assert config.num_hidden_layers == 6


def amounts(rehearsal: Rehearsal) -> tuple[int, int]:
    """All floating-point operations, and all bytes moved."""
    work = rehearsal.work.items()
    return sum(o.flops * count for o, count in work), sum(o.moved_bytes * count for o, count in work)


def test_pages_that_do_not_fit_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep, "_LEAST", 6)
    arguments: dict[str, Any] = {"dtype": torch.float32, "lengths": [32], "optimizer_memory": 300_000}
    config = LlamaConfig(**SIZES)
    found, whole = (run(config, FullFineTuning(), **arguments) for run in (rehearse_deep, rehearse))
    assert whole.paged_bytes > 0
    # To within a page of 4,096 elements on either side.
    assert abs(found.paged_bytes - whole.paged_bytes) <= 2 * 8 * 4096
    assert abs(found.parts.optimizer - whole.parts.optimizer) <= 2 * 8 * 4096


def test_layers_that_differ_are_seen() -> None:
    config = LlamaConfig(**SIZES)
    assert are_alike(config, LoRA()) and are_alike(config, LoRA(rank_pattern={"q_proj": 2}))
    assert not are_alike(config, LoRA(targets=(r"layers\.[0-2]\..*q_proj",)))
    assert not are_alike(config, LoRA(rank_pattern={"layers.1.mlp.up_proj": 2}))
    assert not are_alike(config, LoRA(modules_to_save=("layers.3.mlp.up_proj",), targets=("q_proj",)))
    windows = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=3)
    assert not are_alike(windows, LoRA())


def test_targets_that_match_nothing_are_told_at_once() -> None:
    with pytest.raises(TargetError, match="no_such"):
        are_alike(LlamaConfig(**SIZES), LoRA(targets=("no_such",)))
