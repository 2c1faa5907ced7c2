"""DoRA folders go both ways between PEFT and us and give equal logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lorica
from lorica.errors import AdapterError
from lorica.methods.dora import DoraLinear
from lorica.methods.lora_kinds import LoraLinear

from .small_models import check_exchange, check_peft_reads_ours, gpt2, llama, outputs, randomise

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


def test_ranks_and_alphas_by_pattern_go_both_ways(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=TARGETS[llama], use_dora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"1.mlp.*": 3}
    )
    model = check_exchange(llama, config, tmp_path)
    ranks = {name: adapter.rank for name, adapter in lorica.adapters(model).items()}
    assert ranks["model.layers.0.self_attn.q_proj"] == 2 and ranks["model.layers.0.mlp.down_proj"] == 4


@pytest.mark.parametrize("field", [{"lora_bias": True}, {"target_parameters": ["mlp.up_proj.weight"]}])
def test_what_we_do_not_have_is_refused(field: dict[str, Any], tmp_path: Path) -> None:
    saved_by_peft(llama, tmp_path, use_dora=True)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | field))
    with pytest.raises(AdapterError, match=f"{next(iter(field))} together with use_dora"):
        lorica.load_adapter(llama(), tmp_path)
