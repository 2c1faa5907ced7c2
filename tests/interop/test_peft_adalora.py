"""AdaLoRA folders go both ways between PEFT and us and give equal logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorica
from lorica.errors import AdapterError

from .small_models import IDS, check_peft_reads_ours, gpt2, llama, outputs, randomise, read_by_peft

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


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_layers_cut_to_their_ranks_go_both_ways(tmp_path: Path) -> None:
    want = saved_by_peft(llama, tmp_path / "theirs", steps=2)
    model = lorica.load_adapter(llama(), tmp_path / "theirs")
    torch.testing.assert_close(outputs(model), want, atol=1e-5, rtol=1e-5)
    ranks = [adapter.lora_e.numel() for adapter in lorica.adapters(model).values()]
    assert sum(ranks) == 2 * len(ranks) and min(ranks) == 0, "PEFT has cut one layer away"
    lorica.save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(outputs(read_by_peft(llama, tmp_path / "ours")), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs(lorica.merge(model)), want, atol=1e-5, rtol=1e-5)


def test_masks_that_are_none_are_refused(tmp_path: Path) -> None:
    saved_by_peft(llama, tmp_path, steps=0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["rank_pattern"] = {"model.layers.0.self_attn.q_proj.lora_E": [2, 2]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="true or false for each triplet"):
        lorica.load_adapter(llama(), tmp_path)
