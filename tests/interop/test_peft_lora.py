"""PEFT as the oracle of LoRA's further forms: convolutions, slices, and the starts from the weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import lorica
from lorica.methods.lora import LoraAdapter

peft = pytest.importorskip("peft", reason="needs peft, the oracle")


class Convolutions(nn.Module):
    """One of each kind, one of them pointwise and one with groups; PEFT knows no dilation and pads with zeros only."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1), bias=False)
        self.plane = nn.Conv2d(4, 6, 3, stride=(1, 2), padding="valid")
        self.point = nn.Conv2d(6, 8, 1)
        self.grouped = nn.Conv1d(8, 4, 3, padding=1, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.volume(x).mean(2).tanh()
        return self.grouped(self.point(self.plane(x)).tanh().mean(2))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions().eval()


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


KINDS = ("volume", "plane", "point", "grouped")
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))
IMAGES = torch.randn(2, 2, 3, 6, 7, generator=torch.Generator().manual_seed(5))


def outputs(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES) if any(isinstance(m, Convolutions) for m in model.modules()) else model(IDS).logits


def randomise(model: Any, marker: str = "lora_") -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if marker in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "convolutions": (convolutions, {"targets": KINDS}),
    "convolutions pissa": (convolutions, {"targets": KINDS[:2], "init": "pissa", "rank_pattern": {"plane": 3}}),
    "gpt2 slices": (
        gpt2,
        {"targets": ("c_attn", "c_fc"), "slices": {"c_attn": {"sizes": [1, 1, 1], "train": [0, 2]}}, "rslora": True},
    ),
    "gpt2 slices of unequal sizes": (
        gpt2,
        {"targets": "c_attn", "slices": {r"0\.attn\.c_attn": {"sizes": [4, 1, 3], "train": [1, 2]}}},
    ),
    "gpt2 pissa and embedding": (gpt2, {"targets": ("c_attn", "wte"), "init": "pissa"}),
    "llama pissa": (llama, {"targets": "all-linear", "init": "pissa", "svd_niter": 4}),
    "llama olora rslora": (llama, {"targets": "all-linear", "init": "olora", "rslora": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_plain_lora_for_peft_and_for_us(case: str, tmp_path: Path) -> None:
    make, options = CASES[case]
    model = lorica.adapt(make(), lorica.LoRA(rank=4, alpha=6, **options))
    randomise(model)
    ours = outputs(model)
    assert (ours - outputs(make())).abs().max() > 1e-2
    lorica.save_adapter(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter").eval()
    torch.testing.assert_close(outputs(theirs), ours, atol=1e-5, rtol=1e-5)
    again = lorica.load_adapter(make(), tmp_path / "adapter")
    assert torch.equal(outputs(again), ours), "bit for bit, as training proves its saving"
    assert all(isinstance(a, LoraAdapter) and a.start_a is None for a in lorica.adapters(again).values())


def test_we_load_peft_s_convolutions(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(KINDS), rank_pattern={"plane": 3})
    theirs = peft.get_peft_model(convolutions(), config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    got = lorica.load_adapter(convolutions(), tmp_path)
    torch.testing.assert_close(outputs(got), outputs(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_starts_and_what_is_trained_from_them_are_peft_s(init: str, tiny_llama: Callable[[], Any]) -> None:
    options = lorica.LoRA(rank=4, alpha=6, targets=("q_proj", "down_proj"), init=init)
    ours = lorica.adapt(tiny_llama(), options)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=init)
    theirs = peft.get_peft_model(tiny_llama(), config).eval()
    for name, adapter in lorica.adapters(ours).items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        for mine, other in ((adapter.lora_a, layer.lora_A), (adapter.lora_b, layer.lora_B)):
            torch.testing.assert_close(mine, other["default"].weight, atol=1e-6, rtol=1e-5)
            change = 0.1 * torch.randn(mine.shape, generator=torch.Generator().manual_seed(mine.numel()))
            mine.data += change
            other["default"].weight.data += change
    torch.testing.assert_close(outputs(ours), outputs(theirs), atol=1e-5, rtol=1e-5)
    for model in (ours, theirs):
        model(input_ids=IDS, labels=IDS).loss.backward()
    for name, adapter in lorica.adapters(ours).items():
        layer = theirs.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(adapter.lora_a.grad, layer.lora_A["default"].weight.grad, atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(adapter.lora_b.grad, layer.lora_B["default"].weight.grad, atol=1e-5, rtol=1e-3)


def test_we_load_what_peft_converted_from_pissa(tmp_path: Path, tiny_llama: Callable[[], Any]) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa")
    theirs = peft.get_peft_model(tiny_llama(), config).eval()
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    randomise(theirs)
    theirs.peft_config["default"].init_lora_weights = "pissa"
    want = outputs(copy.deepcopy(theirs))
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    got = outputs(lorica.load_adapter(tiny_llama(), tmp_path / "plain"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
