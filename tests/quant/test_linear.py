"""The quantised layer against the formula in float64, against bitsandbytes, and under every method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import ConfigError, NotMergeableError, TargetError
from lorica.methods.method import MethodOptions, method_names, method_options
from lorica.models.load import base_fingerprint
from lorica.quant.codebooks import codebook
from lorica.quant.linear import QuantizedLinear, format_of, layers, num_parameters

OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"rank": 4, "target_rank": 2},
    "bottleneck": {"size": 4},
    "dora": {"rank": 4},
    "full": {"parameters": "bias"},
    "lora": {"rank": 4},
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
    "ptuning": {"num_virtual_tokens": 3},
    "ptuning_v2": {"num_virtual_tokens": 3},
    "vera": {"rank": 8},
}
NOT_THERE = {"full": "no bias in a Llama"}


def method(name: str, **more: Any) -> MethodOptions:
    return method_options(name)(**{**OPTIONS.get(name, {}), **more})


def dense(model: nn.Module) -> nn.Module:
    """A copy of a quantised model with plain layers of the very numbers that its codes stand for."""
    plain = copy.deepcopy(model)
    for name, layer in list(layers(plain)):
        made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        made.weight = nn.Parameter(layer.weight)
        made.bias = layer.bias
        plain.set_submodule(name, made)
    return plain


def one(in_features: int = 70, out_features: int = 33, bias: bool = True, **settings: Any) -> QuantizedLinear:
    torch.manual_seed(0)
    model = lorica.quantize(nn.Sequential(nn.Linear(in_features, out_features, bias)), **settings)
    return model[0]  # type: ignore[return-value]


@pytest.mark.parametrize("double_quant", [False, True])
def test_the_weight_is_bitsandbytes_own(double_quant: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    plain = nn.Linear(96, 48)
    with torch.compiler.set_stance("force_eager"):
        codes, state = bitsandbytes.quantize_4bit(
            plain.weight.data, quant_type="nf4", compress_statistics=double_quant, blocksize=64
        )
        expected = bitsandbytes.dequantize_4bit(codes, state)
    layer = lorica.quantize(nn.Sequential(plain), double_quant=double_quant)[0]
    assert isinstance(layer, QuantizedLinear)
    assert torch.equal(layer.weight, expected)
    ours, theirs = layer.stored(), {"weight": codes, **{f"weight.{k}": v for k, v in state.as_dict(True).items()}}
    assert ours.keys() == theirs.keys()
    told = [key for key in ours if ".quant_state." in key]
    assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() - set(told))


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("num_rows", [1, 90])
def test_it_computes_the_product_and_its_gradient(scheme: str, num_rows: int) -> None:
    layer = one(scheme=scheme)
    x = torch.randn(num_rows, 70, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    wide = x.detach().double().requires_grad_()
    assert layer.bias is not None
    expected = wide @ layer.weight.double().t() + layer.bias.double()
    expected.square().sum().backward()
    assert wide.grad is not None and x.grad is not None
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("double_quant", [False, True])
def test_nothing_is_kept_for_backward_but_what_is_there_anyway(double_quant: bool) -> None:
    layer, kept = one(double_quant=double_quant), []
    tables = [codebook("nf4"), codebook("dynamic")]
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *tables)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(90, 70, requires_grad=True))
    assert kept and all(t.untyped_storage().data_ptr() in own for t in kept)


def test_a_conv1d_becomes_a_linear_layer_of_the_transposed_weight() -> None:
    torch.manual_seed(0)
    conv = Conv1D(33, 70)
    flipped = nn.Linear(70, 33)
    flipped.weight.data, flipped.bias.data = conv.weight.data.t().contiguous(), conv.bias.data + 1
    conv.bias.data += 1
    ours, expected = (lorica.quantize(nn.Sequential(m))[0] for m in (conv, flipped))
    x = torch.randn(5, 70)
    assert torch.equal(ours(x), expected(x))
    assert base_fingerprint(nn.Sequential(ours)) == base_fingerprint(nn.Sequential(conv))


def test_a_cast_of_the_model_leaves_the_bytes_alone() -> None:
    layer = one(double_quant=False)
    before, weight = {n: p.clone() for n, p in layer.named_parameters()}, layer.weight
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert all(torch.equal(p, before[n]) for n, p in layer.named_parameters() if n != "bias")
    assert torch.equal(layer.float().weight, weight)
    assert not any(p.requires_grad for n, p in layer.named_parameters() if n != "bias")


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_state_dict_comes_back(double_quant: bool) -> None:
    layer, other = one(double_quant=double_quant), one(double_quant=not double_quant)
    nn.init.zeros_(other.bias)  # type: ignore[arg-type]
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight) and torch.equal(other.bias, layer.bias)  # type: ignore[arg-type]
    plain = nn.Linear(70, 33)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(other.weight, lorica.quantize(nn.Sequential(plain), double_quant=double_quant)[0].weight)


def test_what_is_no_weight_of_the_layer_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"shape \[33, 64\] stands where one of \[33, 70\] is expected"):
        one().load_state_dict(nn.Linear(64, 33).state_dict())
    with pytest.raises(RuntimeError, match="stands where one of"):
        one().load_state_dict(one(64).state_dict())
    broken = {key: tensor for key, tensor in one().state_dict().items() if "absmax" not in key}
    with pytest.raises(RuntimeError, match="not quantised as bitsandbytes does"):
        one().load_state_dict(broken)
    with pytest.raises(RuntimeError, match="Missing key"):
        one().load_state_dict({})


def test_quantize_says_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="no quantisation scheme 'nf5'; there are"):
        lorica.quantize(nn.Sequential(nn.Linear(4, 4)), "nf5")
    with pytest.raises(ConfigError, match="no linear layer to quantise"):
        lorica.quantize(nn.Sequential(nn.Embedding(4, 4)))
    with pytest.raises(ConfigError, match="0 carries an adapter"):
        lorica.quantize(lorica.adapt(nn.Sequential(nn.Linear(4, 4)), lorica.Bottleneck(size=2, targets=["0"])))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match=r"^1: .*NaN"):
        lorica.quantize(model)
    assert type(model[0]) is nn.Linear, "nothing is changed where something is wrong"


def test_heads_and_shared_weights_stay(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    count, kinds = num_parameters(model), sum(isinstance(m, nn.Linear) for m in model.modules())
    lorica.quantize(model)
    assert type(model.lm_head) is nn.Linear and len(list(layers(model))) == kinds - 1
    assert num_parameters(model) == count and format_of(model) == "nf4, double_quant"
    tied = lorica.quantize(tiny_llama(tie_word_embeddings=True), skip=())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    some = lorica.quantize(tiny_llama(), skip=("model.layers.0", "down_proj"))
    assert {name.rpartition(".")[2] for name, _ in layers(some)} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "lm_head",
    }  # fmt: skip
    assert not any(name.startswith("model.layers.0") for name, _ in layers(some))


def test_the_fingerprint_is_that_of_the_original(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama()
    expected = base_fingerprint(model)
    quantised = lorica.quantize(tiny_llama())
    assert base_fingerprint(quantised) == expected == base_fingerprint(lorica.adapt(quantised, method("lora")))
    other = tiny_llama()
    other.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    assert base_fingerprint(lorica.quantize(other)) != expected


@pytest.mark.parametrize("name", [name for name in method_names() if name not in NOT_THERE])
def test_every_method_computes_and_learns_as_over_the_dense_weight(name: str, tiny_llama: Callable[..., Any]) -> None:
    quantised = lorica.quantize(tiny_llama())
    plain = dense(quantised)
    gradients: list[dict[str, Tensor]] = []
    for model in (quantised, plain):
        torch.manual_seed(1)
        lorica.adapt(model, method(name))
        for parameter in lorica.trainable_parameters(model).values():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
        model.eval()
        ids = torch.arange(5, 25).view(2, 10)
        model(ids).logits.square().mean().backward()
        found = {n: p.grad for n, p in lorica.trainable_parameters(model).items() if p.grad is not None}
        assert found
        gradients.append(found)
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][key], rtol=1e-4, atol=1e-6)
    before = {n: p.clone() for n, p in quantised.named_parameters() if p.dtype is torch.uint8}
    assert before
    lorica.detach(quantised)
    assert len(list(layers(quantised))) == 14


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_starts_from_a_weight_leave_the_output_alone(init: str, tiny_llama: Callable[..., Any]) -> None:
    model, ids = lorica.quantize(tiny_llama()), torch.arange(5, 25)[None]
    expected = model(ids).logits
    adapted = lorica.adapt(model, lorica.LoRA(rank=4, init=init))
    torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_refuses_what_is_quantised(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(TargetError, match="has no floating-point weights"):
        lorica.adapt(lorica.quantize(tiny_llama()), lorica.FullFineTuning())
    biased = lorica.quantize(tiny_llama(attention_bias=True))
    trained = lorica.trainable_parameters(lorica.adapt(biased, lorica.FullFineTuning(parameters="bias")))
    assert len(trained) == 8


@pytest.mark.parametrize("name", ["lora", "dora", "ia3", "vera", "adalora"])
def test_merging_is_refused_with_the_way(name: str, tiny_llama: Callable[..., Any]) -> None:
    model = lorica.adapt(lorica.quantize(tiny_llama()), method(name))
    with pytest.raises(NotMergeableError, match=r"is quantised \(nf4, double_quant\).*without quant"):
        lorica.merge(model)


def test_an_adapter_goes_from_the_quantised_base_to_the_original_and_merges(
    tiny_llama: Callable[..., Any], tmp_path: Any
) -> None:
    model = lorica.adapt(lorica.quantize(tiny_llama()), method("lora"))
    for parameter in lorica.trainable_parameters(model).values():
        parameter.data += 0.02
    lorica.save_adapter(model, tmp_path / "adapter")
    original = lorica.load_adapter(tiny_llama(), tmp_path / "adapter")
    merged, ids = lorica.merge(original), torch.arange(5, 25)[None]
    torch.testing.assert_close(merged(ids).logits, original(ids).logits, rtol=1e-4, atol=1e-5)
    again = lorica.load_adapter(lorica.quantize(tiny_llama()), tmp_path / "adapter")
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
