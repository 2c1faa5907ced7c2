"""HydraLoRA's folders: ours, and those of the authors' code, whose layer is written here anew from its description."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import lorica
from lorica.errors import AdapterError
from lorica.methods.hydra import HydraLoRA

from .small_models import IDS, llama, outputs, randomise

TARGETS = ("gate_proj", "up_proj", "down_proj")
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 32, "lora_nums": 3, "blc_alpha": 0.0,
    "blc_weight": 0.0, "lora_dropout": 0.05, "target_modules": list(TARGETS), "bias": "none", "enable_lora": None,
    "fan_in_fan_out": False, "merge_weights": False, "modules_to_save": None, "inference_mode": True,
    "base_model_name_or_path": None,
}  # fmt: skip


class AuthorsLinear(nn.Module):
    """Their layer in evaluation mode: a sum over heads, each with the gate of its token."""

    def __init__(self, base: nn.Linear, rank: int, alpha: int, num_heads: int) -> None:
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_route = nn.Linear(base.in_features, num_heads, bias=False)
        self.heads = nn.ModuleList(nn.Linear(rank, base.out_features, bias=False) for _ in range(num_heads))

    def forward(self, x: Tensor) -> Tensor:
        gates = F.softmax(self.lora_route(x), dim=-1)
        result = self.base(x)
        for i, head in enumerate(self.heads):
            result = result + gates[:, :, i, None] * head(self.lora_A(x)) * self.scaling
        return result

    def tensors(self) -> dict[str, Tensor]:
        own = {"lora_A.weight": self.lora_A.weight, "lora_route.weight": self.lora_route.weight}
        return own | {f"lora_B{i}.weight": head.weight for i, head in enumerate(self.heads)}


def authors_folder(folder: Path, num_heads: int = 3, **fields: Any) -> Any:
    """A model with their layers, saved as they save it; the model."""
    model = llama()
    tensors = {}
    for name, module in list(model.named_modules()):
        if name.endswith(TARGETS):
            layer = AuthorsLinear(module, 4, 32, num_heads)
            randomise(p for p in layer.parameters() if p is not module.weight)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            tensors |= {f"base_model.model.{name}.{key}": t.detach().clone() for key, t in layer.tensors().items()}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, "lora_nums": num_heads, **fields}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return model


@pytest.mark.parametrize("num_heads", [3, 1])
def test_the_authors_folders_give_their_logits(tmp_path: Path, num_heads: int) -> None:
    want = outputs(authors_folder(tmp_path / "theirs", num_heads))
    model = lorica.load_adapter(llama(), tmp_path / "theirs")
    assert (want - outputs(llama())).abs().max() > 1e-2
    torch.testing.assert_close(outputs(model), want, rtol=1e-4, atol=1e-5)
    options = next(iter(lorica.adapters(model).values())).options
    assert isinstance(options, HydraLoRA) and options.num_heads == num_heads and options.dropout == 0.05
    # Saved again it is ours.
    lorica.save_adapter(model, tmp_path / "ours")
    assert torch.equal(outputs(lorica.load_adapter(llama(), tmp_path / "ours")), outputs(model))


def without(tensors: dict[str, Tensor], end: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(end)}


def added(tensors: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return tensors | {key.replace(old, new): t.clone() for key, t in tensors.items() if key.endswith(old)}


def reshaped(tensors: dict[str, Tensor], end: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return {key: change(t).contiguous() if key.endswith(end) else t for key, t in tensors.items()}


@pytest.mark.parametrize(
    "fields, change, said",
    [
        ({"lora_nums": 4}, None, r"has the heads \[0, 1, 2\], and lora_nums is 4"),
        ({"lora_nums": 2}, None, "lora_nums is 2"),
        ({"lora_nums": 10**9}, None, "num_heads"),
        ({"lora_nums": "3"}, None, "lora_nums is '3'"),
        ({"lora_nums": None}, None, "lora_nums is None"),
        ({"r": "many"}, None, "adapter_config.json"),
        ({"bias": "lora_only"}, None, "bias"),
        ({"fan_in_fan_out": True}, None, "fan_in_fan_out"),
        ({"enable_lora": [True]}, None, "enable_lora"),
        ({"r": 8}, None, r"lora_a is \[4, 32\], expected \[8, 32\]"),
        ({}, lambda t: without(t, "layers.0.mlp.up_proj.lora_route.weight"), "up_proj.router is missing"),
        ({}, lambda t: without(t, "layers.0.mlp.up_proj.lora_A.weight"), "up_proj.lora_a is missing"),
        ({}, lambda t: without(t, "lora_B1.weight"), r"has the heads \[0, 2\]"),
        ({}, lambda t: added(t, "lora_B0.weight", "lora_B00.weight"), "has the heads"),
        ({}, lambda t: added(t, "lora_B0.weight", "lora_B7.weight"), r"has the heads \[0, 1, 2, 7\]"),
        ({}, lambda t: added(t, "lora_A.weight", "lora_C.weight"), "lora_C.weight"),
        ({}, lambda t: reshaped(t, "lora_B1.weight", lambda b: b[:-1]), "heads of shapes"),
        ({}, lambda t: reshaped(t, "lora_B1.weight", lambda b: b[..., None]), "heads of shapes"),
        ({}, lambda t: reshaped(t, "lora_route.weight", lambda w: w[:2]), "router is"),
        ({}, lambda t: reshaped(t, "lora_B2.weight", lambda b: b * float("nan")), "NaN"),
        ({}, lambda t: added(t, "layers.0.mlp.up_proj.lora_B0.weight", "layers.9.mlp.up_proj.lora_B0.weight"), "9"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_meant_change_nothing(tmp_path: Path, fields: Any, change: Any, said: str) -> None:
    from safetensors.torch import load_file

    authors_folder(tmp_path / "theirs", **fields)
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    if change is not None:
        save_file(change(load_file(file)), file)
    model = llama()
    before = outputs(model)
    with pytest.raises(AdapterError, match=said):
        lorica.load_adapter(model, tmp_path / "theirs")
    assert not lorica.adapters(model) and torch.equal(outputs(model), before)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"router_input": "ax", "temperature": 0.5, "balance_loss": 0.01},
        {"routing": "sequence", "init": "random"},
        {"gate": "frozen", "rank_pattern": {"q_proj": 2}},
        {"gate": "uniform", "rslora": True},
    ],
    ids=str,
)
def test_ours_comes_back_as_it_was(tmp_path: Path, fields: dict[str, Any]) -> None:
    options = HydraLoRA(rank=4, num_heads=3, modules_to_save=("norm",), **fields)
    model = lorica.adapt(llama(), options)
    randomise(lorica.trainable_parameters(model).values())
    lorica.save_adapter(model, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORICA_HYDRA"
    again = lorica.load_adapter(llama(), tmp_path / "ours")
    assert torch.equal(outputs(again, IDS), outputs(model, IDS))
    assert {n: p.shape for n, p in lorica.trainable_parameters(again).items()} == {
        n: p.shape for n, p in lorica.trainable_parameters(model).items()
    }
