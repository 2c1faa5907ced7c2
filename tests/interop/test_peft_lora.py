"""PEFT as the oracle of LoRA's further forms: convolutions, slices, and the starts from the weight."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lorica
from lorica.methods.lora_kinds import LoraAdapter

from .small_models import IDS, gpt2, llama, outputs, randomise, read_by_peft

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


KINDS = ("volume", "plane", "point", "grouped")
IMAGES = torch.randn(2, 2, 3, 6, 7, generator=torch.Generator().manual_seed(5))


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IMAGES) if any(isinstance(m, Convolutions) for m in model.modules()) else outputs(model)


def randomise_pairs(model: Any) -> None:
    randomise((p for name, p in model.named_parameters() if "lora_" in name), scale=0.1)


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
    randomise_pairs(model)
    ours = run(model)
    assert (ours - run(make())).abs().max() > 1e-2
    lorica.save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(run(read_by_peft(make, tmp_path / "adapter")), ours, atol=1e-5, rtol=1e-5)
    again = lorica.load_adapter(make(), tmp_path / "adapter")
    assert torch.equal(run(again), ours), "bit for bit, as training proves its saving"
    assert all(isinstance(a, LoraAdapter) and a.start_a is None for a in lorica.adapters(again).values())


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
    torch.testing.assert_close(run(ours), run(theirs), atol=1e-5, rtol=1e-5)
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
    randomise_pairs(theirs)
    theirs.peft_config["default"].init_lora_weights = "pissa"
    want = run(copy.deepcopy(theirs))
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    got = run(lorica.load_adapter(tiny_llama(), tmp_path / "plain"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
