"""DoRA folders go both ways between PEFT and us and give equal logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import lorica
from lorica.errors import AdapterError
from lorica.methods.dora import DoraLinear
from lorica.methods.lora import LoraLinear

peft = pytest.importorskip("peft", reason="needs peft, the oracle")

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))
SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, num_key_value_heads=2), dtype=torch.float32).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def randomise(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            change = torch.randn(parameter.shape, generator=generator) * 0.1
            # A pair is drawn anew, a magnitude moves from where it starts.
            parameter.copy_(change if parameter.ndim == 2 else parameter + change)


TARGETS = {llama: ["q_proj", "down_proj"], gpt2: ["c_attn", "mlp.c_proj"]}


@pytest.mark.parametrize("make", TARGETS)
def test_peft_loads_what_we_save(make: Callable[[], Any], tmp_path: Path) -> None:
    model = lorica.adapt(make(), lorica.DoRA(rank=4, alpha=8, rslora=True, targets=TARGETS[make]))
    randomise(lorica.trainable_parameters(model).values())
    ours = outputs(model)
    lorica.save_adapter(model, tmp_path / "adapter")
    theirs = outputs(peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").eval())
    assert (ours - outputs(make())).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs(lorica.load_adapter(make(), tmp_path / "adapter")), ours)


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
