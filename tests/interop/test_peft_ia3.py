"""IA3 folders go both ways between PEFT and us and give equal logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig

import lorica

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


def bert() -> Any:
    torch.manual_seed(0)
    return AutoModel.from_config(BertConfig(**SMALL, pad_token_id=0), dtype=torch.float32).eval()


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result = model(IDS)
    return result.logits if "logits" in result else result.last_hidden_state


def randomise(parameters: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_peft_loads_what_we_save(make: Callable[[], Any], tmp_path: Path) -> None:
    model = lorica.adapt(make(), lorica.IA3())
    randomise(lorica.trainable_parameters(model).values())
    ours = outputs(model)
    lorica.save_adapter(model, tmp_path / "adapter")
    theirs = outputs(peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").eval())
    assert (ours - outputs(make())).abs().max() > 1e-2
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert torch.equal(outputs(lorica.load_adapter(make(), tmp_path / "adapter")), ours)


CONFIGS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama, PEFT's defaults": (llama, {}),
    "gpt2, PEFT's defaults": (gpt2, {"fan_in_fan_out": True}),
    "bert, PEFT's defaults": (bert, {}),
    "an expression": (llama, {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": r".*\.1\..*up_proj"}),
    "no feed-forward layer": (llama, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": []}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_we_load_what_peft_saves(case: str, tmp_path: Path) -> None:
    make, fields = CONFIGS[case]
    theirs = peft.get_peft_model(make(), peft.IA3Config(**fields)).eval()
    randomise(p for name, p in theirs.named_parameters() if "ia3_l" in name)
    want = outputs(theirs)
    theirs.save_pretrained(tmp_path)
    torch.testing.assert_close(outputs(lorica.load_adapter(make(), tmp_path)), want, atol=1e-5, rtol=1e-5)
