"""DoRA folders go both ways between PEFT and us and give equal logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorica
from lorica.errors import AdapterError
from lorica.methods.dora import DoraLinear
from lorica.methods.lora import LoraLinear

from .small_models import check_peft_reads_ours, gpt2, llama, outputs, randomise

peft = pytest.importorskip("peft", reason="needs peft, the oracle")

TARGETS = {llama: ["q_proj", "down_proj"], gpt2: ["c_attn", "mlp.c_proj"]}


@pytest.mark.parametrize("make", TARGETS)
def test_peft_loads_what_we_save(make: Callable[[], Any], tmp_path: Path) -> None:
    check_peft_reads_ours(make, lorica.DoRA(rank=4, alpha=8, rslora=True, targets=TARGETS[make]), tmp_path / "adapter")


def saved_by_peft(make: Callable[[], Any], folder: Path, **fields: Any) -> torch.Tensor:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[make], fan_in_fan_out=make is gpt2, **fields)
    theirs = peft.get_peft_model(make(), config).eval()
    randomise(p for name, p in theirs.named_parameters() if "lora_" in name)
    theirs.save_pretrained(folder)
    return outputs(theirs)


@pytest.mark.parametrize("use_dora", [True, False])
@pytest.mark.parametrize("make", TARGETS)
def test_we_load_what_peft_saves_and_tell_it_from_lora(make: Callable[[], Any], use_dora: bool, tmp_path: Path) -> None:
    want = saved_by_peft(make, tmp_path, use_dora=use_dora)
    model = lorica.load_adapter(make(), tmp_path)
    kind = DoraLinear if use_dora else LoraLinear
    assert all(isinstance(adapter, kind) for adapter in lorica.adapters(model).values())
    torch.testing.assert_close(outputs(model), want, atol=1e-5, rtol=1e-5)


def test_ranks_by_pattern_are_refused(tmp_path: Path) -> None:
    saved_by_peft(llama, tmp_path, use_dora=True, rank_pattern={"q_proj": 2})
    with pytest.raises(AdapterError, match="rank_pattern"):
        lorica.load_adapter(llama(), tmp_path)
