"""Merging into quantised weights against its formula: quantise(dequantise(W) + s B A)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lorica
from lorica.errors import NotMergeableError
from lorica.methods.requantize import merge_requantized
from lorica.quant.blockwise import dequantize, quantize
from lorica.quant.linear import QuantizedLinear, layers


def adapted(model: Any, options: Any) -> Any:
    lorica.adapt(model, options)
    for parameter in lorica.trainable_parameters(model).values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("double_quant", [False, True])
def test_it_is_its_formula_and_the_drift_is_measured(double_quant: bool, tiny_llama: Callable[..., Any]) -> None:
    model = lorica.quantize(tiny_llama(), double_quant=double_quant)
    before = {name: layer.weight for name, layer in layers(model)}
    merged, drift = merge_requantized(adapted(model, lorica.LoRA(rank=4, alpha=8, targets=["q_proj", "up_proj"])))
    assert not lorica.adapters(merged) and len(lorica.adapters(model)) == 4
    weight, change, error, count = 0.0, 0.0, 0.0, 0
    for name, layer in layers(merged):
        exact = before[name]
        if name in lorica.adapters(model):
            lora = lorica.adapters(model)[name]
            delta = 2 * (lora.lora_b @ lora.lora_a).detach()
            exact = exact + delta
            weight, change = weight + float(exact.abs().sum()), change + float(delta.abs().sum())
            error, count = error + float((layer.weight - exact).abs().sum()), count + exact.numel()
            exact = dequantize(quantize(exact, "nf4", 64, double_quant))
        assert torch.equal(layer.weight, exact)
    assert (drift.weight, drift.change, drift.error) == pytest.approx((weight / count, change / count, error / count))


def test_plain_layers_are_merged_as_ever_and_the_impossible_is_refused(tiny_llama: Callable[..., Any]) -> None:
    model = lorica.quantize(tiny_llama(), skip=("lm_head", "q_proj"))
    adapted(model, lorica.DoRA(rank=4))
    merged, _ = merge_requantized(model)
    q_proj, k_proj = merged.model.layers[0].self_attn.q_proj, merged.model.layers[0].self_attn.k_proj
    assert type(q_proj) is nn.Linear and isinstance(k_proj, QuantizedLinear)
    expected = lorica.adapters(model)["model.layers.0.self_attn.q_proj"].merged()
    assert torch.equal(q_proj.weight, expected.weight)
    with pytest.raises(NotMergeableError, match="not linear"):
        merge_requantized(adapted(lorica.quantize(tiny_llama()), lorica.Bottleneck(size=4)))
