"""Bottleneck adapters against their equation in float64, and where they are put in the architectures there are."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModel,
    BartConfig,
    BertConfig,
    BloomConfig,
    DistilBertConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import ConfigError, NotMergeableError, TargetError
from lorica.methods.attach import resolve_targets
from lorica.methods.bottleneck import Bottleneck, BottleneckAdapter

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "silu": lambda z: z / (1 + torch.exp(-z)),
}

# Endings of the layers behind the attention and behind the MLP, as the models' own source has them.
PLACES: dict[str, tuple[PretrainedConfig, set[str], set[str]]] = {
    "Llama": (LlamaConfig(num_hidden_layers=1), {"self_attn.o_proj"}, {"mlp.down_proj"}),
    "Phi-3": (Phi3Config(num_hidden_layers=1), {"self_attn.o_proj"}, {"mlp.down_proj"}),
    "Gemma 2": (Gemma2Config(num_hidden_layers=1), {"self_attn.o_proj"}, {"mlp.down_proj"}),
    "GPT-2": (GPT2Config(n_layer=1), {"attn.c_proj"}, {"mlp.c_proj"}),
    "GPT-J": (GPTJConfig(n_layer=1), {"attn.out_proj"}, {"mlp.fc_out"}),
    "GPT-NeoX": (GPTNeoXConfig(num_hidden_layers=1), {"attention.dense"}, {"mlp.dense_4h_to_h"}),
    "Bloom": (BloomConfig(n_layer=1), {"self_attention.dense"}, {"mlp.dense_4h_to_h"}),
    "Falcon": (FalconConfig(num_hidden_layers=1), {"self_attention.dense"}, {"mlp.dense_4h_to_h"}),
    "Phi": (PhiConfig(num_hidden_layers=1), {"self_attn.dense"}, {"mlp.fc2"}),
    "OPT": (OPTConfig(num_hidden_layers=1), {"self_attn.out_proj"}, {"layers.0.fc2"}),
    "BERT": (BertConfig(num_hidden_layers=1), {"attention.output.dense"}, {"layer.0.output.dense"}),
    "DistilBERT": (DistilBertConfig(n_layers=1), {"attention.out_lin"}, {"ffn.lin2"}),
    "ALBERT": (AlbertConfig(num_hidden_layers=1), {"attention.dense"}, {"ffn_output"}),
    "ModernBERT": (ModernBertConfig(num_hidden_layers=1), {"attn.Wo"}, {"mlp.Wo"}),
    "T5": (T5Config(num_layers=1), {"SelfAttention.o", "EncDecAttention.o"}, {"DenseReluDense.wo"}),
    "BART": (
        BartConfig(encoder_layers=1, decoder_layers=1),
        {"self_attn.out_proj", "encoder_attn.out_proj"},
        {"layers.0.fc2"},
    ),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_follows_the_equation_in_float64(activation: Any) -> None:
    torch.manual_seed(0)
    adapter = BottleneckAdapter(nn.Linear(12, 20), Bottleneck(size=5, activation=activation))
    for parameter in (*adapter.down.parameters(), *adapter.up.parameters()):
        nn.init.normal_(parameter)
    x = torch.randn(3, 7, 12, requires_grad=True)
    y = adapter(x)
    g = torch.randn_like(y)
    y.backward(g)

    ours = (adapter.down.weight, adapter.down.bias, adapter.up.weight, adapter.up.bias)
    d, db, u, ub = (p.detach().double().requires_grad_() for p in ours)
    x64 = x.detach().double().requires_grad_()
    h = x64 @ adapter.base.weight.double().T + adapter.base.bias.double()
    want = h + ACTIVATIONS[activation](h @ d.T + db) @ u.T + ub
    want.backward(g.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-4)
    for mine, theirs in zip((x, *ours), (x64, d, db, u, ub), strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=1e-4, atol=1e-4)


def test_conv1d_has_as_many_outputs_as_its_weight_has_columns() -> None:
    adapter = BottleneckAdapter(Conv1D(20, 12), Bottleneck(size=5))
    assert (adapter.down.in_features, adapter.up.out_features) == (20, 20)
    assert adapter.num_parameters() == 2 * 20 * 5 + 5 + 20


@pytest.mark.parametrize("name", PLACES)
def test_placement_finds_its_layers(name: str) -> None:
    config, attention, mlp = PLACES[name]
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    for placement, ends in (("houlsby", attention | mlp), ("pfeiffer", mlp)):
        found = resolve_targets(model, Bottleneck(placement=placement))  # type: ignore[arg-type]
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        want = [n for n in linears if any(n.endswith(f".{end}") for end in ends)]
        if placement == "pfeiffer" and name == "BERT":
            want = [n for n in want if ".attention." not in n]
        assert found == want and all(any(n.endswith(f".{end}") for n in found) for end in ends)


def test_targets_that_are_named_overrule_placement(tiny_llama: Callable[..., Any]) -> None:
    model = lorica.adapt(tiny_llama(), Bottleneck(targets=("q_proj",), placement="pfeiffer"))
    assert {re.sub(r".*\.", "", name) for name in lorica.adapters(model)} == {"q_proj"}


def test_a_model_of_other_names_needs_targets() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(TargetError, match=r"Sequential has nothing of what 'auto' stands for\. .* given: 0, 1\."):
        lorica.adapt(model, Bottleneck())
    assert list(lorica.adapters(lorica.adapt(model, Bottleneck(targets="all-linear")))) == ["0", "1"]


def test_faults_come_at_once_and_merging_says_why_not(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"placement is 'both'.*size is 0.*activation is 'tanh'"):
        Bottleneck(placement="both", size=0, activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(NotMergeableError, match="not linear"):
        lorica.merge(lorica.adapt(tiny_llama(), Bottleneck()))


def test_a_saved_adapter_reads_back_the_same(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = lorica.adapt(tiny_llama(), Bottleneck(size=8, activation="silu", placement="pfeiffer"))
    for parameter in lorica.trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.2)
    again = lorica.load_adapter(tiny_llama(), lorica.save_adapter(model, tmp_path / "a")).eval()
    ids = torch.arange(9)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not torch.allclose(again(ids).logits, tiny_llama()(ids).logits, atol=1e-2)
    options = lorica.adapters(again)["model.layers.0.mlp.down_proj"].options
    assert isinstance(options, Bottleneck) and (options.size, options.activation) == (8, "silu")
