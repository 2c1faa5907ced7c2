"""AdaLoRA folders go both ways between PEFT and us and give equal logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorica
from lorica.errors import AdapterError

from .small_models import IDS, check_peft_reads_ours, gpt2, llama, outputs, randomise

peft = pytest.importorskip("peft", reason="needs peft, the oracle")

TARGETS = {llama: ["q_proj", "down_proj"], gpt2: ["c_attn", "mlp.c_proj"]}


@pytest.mark.parametrize("make", TARGETS)
def test_peft_loads_what_we_save(make: Callable[[], Any], tmp_path: Path) -> None:
    check_peft_reads_ours(make, lorica.AdaLoRA(rank=4, target_rank=2, targets=TARGETS[make]), tmp_path / "adapter")


def saved_by_peft(make: Callable[[], Any], folder: Path, steps: int) -> torch.Tensor:
    fields = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "total_step": 2, "fan_in_fan_out": make is gpt2}
    theirs = peft.get_peft_model(make(), peft.AdaLoraConfig(target_modules=TARGETS[make], **fields))
    randomise(p for name, p in theirs.named_parameters() if "lora_" in name)
    for step in range(1, steps + 1):
        theirs(IDS, labels=IDS).loss.backward()
        theirs.base_model.update_and_allocate(step)
    theirs.save_pretrained(folder)
    return outputs(theirs.eval())


@pytest.mark.parametrize("make", TARGETS)
def test_we_load_what_peft_saves(make: Callable[[], Any], tmp_path: Path) -> None:
    want = saved_by_peft(make, tmp_path, steps=0)
    torch.testing.assert_close(outputs(lorica.load_adapter(make(), tmp_path)), want, atol=1e-5, rtol=1e-5)


def test_layers_cut_to_their_ranks_are_refused(tmp_path: Path) -> None:
    saved_by_peft(llama, tmp_path, steps=2)
    with pytest.raises(AdapterError, match="rank_pattern"):
        lorica.load_adapter(llama(), tmp_path)
