"""VeRA folders go both ways between PEFT and us and give equal logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorica
from lorica.errors import AdapterError

from .small_models import check_peft_reads_ours, gpt2, llama, outputs, randomise, read_by_peft

peft = pytest.importorskip("peft", reason="needs peft, the oracle")

# Modules of several shapes, so that the shared pair is larger than each.
TARGETS = {llama: ["q_proj", "k_proj", "down_proj"], gpt2: ["c_attn", "mlp.c_proj"]}


@pytest.mark.parametrize("make", TARGETS)
def test_peft_loads_what_we_save(make: Callable[[], Any], tmp_path: Path) -> None:
    check_peft_reads_ours(make, lorica.VeRA(rank=16, seed=7, targets=TARGETS[make]), tmp_path / "adapter", scale=1.0)


def saved_by_peft(make: Callable[[], Any], folder: Path, **fields: Any) -> torch.Tensor:
    config = peft.VeraConfig(
        r=16, projection_prng_key=7, target_modules=TARGETS[make], fan_in_fan_out=make is gpt2, **fields
    )
    theirs = peft.get_peft_model(make(), config).eval()
    randomise((p for name, p in theirs.named_parameters() if "vera_lambda" in name), scale=1.0)
    theirs.save_pretrained(folder)
    return outputs(theirs)


@pytest.mark.parametrize("make", TARGETS)
def test_we_load_what_peft_saves(make: Callable[[], Any], tmp_path: Path) -> None:
    want = saved_by_peft(make, tmp_path, save_projection=False)
    torch.testing.assert_close(outputs(lorica.load_adapter(make(), tmp_path)), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", TARGETS)
def test_the_pair_is_read_from_a_folder_that_holds_it(make: Callable[[], Any], tmp_path: Path) -> None:
    saved_by_peft(make, tmp_path, save_projection=True)
    # Another pair than the seed's.
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key in ("base_model.vera_A", "base_model.vera_B"):
        tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    want = outputs(read_by_peft(make, tmp_path))
    model = lorica.load_adapter(make(), tmp_path)
    torch.testing.assert_close(outputs(model), want, atol=1e-5, rtol=1e-5)
    lorica.save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(outputs(read_by_peft(make, tmp_path / "ours")), want, atol=1e-5, rtol=1e-5)


def test_a_pair_of_another_shape_is_refused(tmp_path: Path) -> None:
    saved_by_peft(llama, tmp_path, save_projection=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.vera_A"] = torch.zeros(16, 47)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"vera_A is \[16, 47\], expected \[16, 48\]"):
        lorica.load_adapter(llama(), tmp_path)


def test_vectors_of_a_layer_that_is_not_linear_are_refused(tmp_path: Path) -> None:
    saved_by_peft(llama, tmp_path, save_projection=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if key.startswith("base_model.vera")}
    save_file(
        {**kept, "base_model.model.model.norm.vera_lambda_b": torch.zeros(32)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(AdapterError, match="norm is a LlamaRMSNorm, which vera cannot wrap"):
        lorica.load_adapter(llama(), tmp_path)


def test_trained_biases_are_refused(tmp_path: Path) -> None:
    saved_by_peft(llama, tmp_path, save_projection=False, bias="vera_only")
    with pytest.raises(AdapterError, match="bias is 'vera_only'"):
        lorica.load_adapter(llama(), tmp_path)
