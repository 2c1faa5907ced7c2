"""IA3 against its own equation in float64, and which layers it scales by default."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import ConfigError, TargetError
from lorica.methods.ia3 import IA3, IA3Linear


@pytest.mark.parametrize("scales_input", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_it_follows_the_equation_in_float64(kind: type[nn.Module], scales_input: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(12, 20) if kind is nn.Linear else Conv1D(20, 12)
    adapter = IA3Linear(base, IA3(), scales_input)
    nn.init.normal_(adapter.ia3_l)
    nn.init.normal_(base.bias)
    x = torch.randn(3, 5, 12, requires_grad=True)
    y = adapter(x)
    g = torch.randn_like(y)
    y.backward(g)

    w, b, factors, x64, g64 = (t.detach().double() for t in (base.weight, base.bias, adapter.ia3_l.flatten(), x, g))
    w = w if kind is nn.Linear else w.T
    if scales_input:
        want, grad = (factors * x64) @ w.T + b, (g64 @ w * x64).sum((0, 1))
        grad_x = g64 @ w * factors
    else:
        want, grad = factors * (x64 @ w.T + b), (g64 * (x64 @ w.T + b)).sum((0, 1))
        grad_x = (g64 * factors) @ w
    assert x.grad is not None and adapter.ia3_l.grad is not None
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), grad_x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.ia3_l.grad.flatten().double(), grad, rtol=1e-5, atol=1e-4)


def test_a_factor_that_bfloat16_cannot_hold_is_still_seen() -> None:
    base = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    base.weight.data.fill_(1.0)
    adapter = IA3Linear(base, IA3(), scales_input=False)
    adapter.ia3_l.data.fill_(1.003)  # 1.0 in bfloat16, which has 1.0078 next
    x = torch.tensor([[1.9921875]], dtype=torch.bfloat16)  # times 1.003 is 1.998, nearer to the next number
    assert adapter(x).item() == 2.0


USUAL: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "LlamaConfig": ({}, {"self_attn.k_proj", "self_attn.v_proj"}, {"mlp.down_proj"}),
    "Gemma2Config": ({"head_dim": 8}, {"self_attn.k_proj", "self_attn.v_proj"}, {"mlp.down_proj"}),
    "Phi3Config": ({"pad_token_id": 0}, {"self_attn.qkv_proj"}, {"mlp.down_proj"}),
    "GPT2Config": ({}, {"attn.c_attn"}, {"mlp.c_proj"}),
    "GPTNeoXConfig": ({}, {"attention.query_key_value"}, {"mlp.dense_4h_to_h"}),
    "BertConfig": ({}, {"attention.self.key", "attention.self.value"}, {"output.dense"}),
    "DistilBertConfig": ({"dim": 32}, {"attention.k_lin", "attention.v_lin"}, {"ffn.lin2"}),
    "OPTConfig": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, {"self_attn.k_proj", "self_attn.v_proj"}, {"fc2"}),
}


@pytest.mark.parametrize("config", USUAL)
def test_keys_values_and_down_projections_are_the_default(config: str) -> None:
    changes, outputs, inputs = USUAL[config]
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(getattr(transformers, config)(**shape, vocab_size=64, **changes))
    found = lorica.adapters(lorica.adapt(model, IA3()))
    scaled: dict[bool, set[str]] = {False: set(), True: set()}
    for name, adapter in found.items():
        assert isinstance(adapter, IA3Linear)
        # The name behind the layer's number.
        scaled[adapter.scales_input].add(name.partition(".0.")[2])
    assert scaled == {False: outputs, True: inputs}


def test_the_papers_count_of_parameters(tiny_llama: Any) -> None:
    """(d_k + d_v + d_ff) for each layer: section 3.3."""
    model = lorica.adapt(tiny_llama(), IA3())
    assert sum(p.numel() for p in lorica.trainable_parameters(model).values()) == 2 * (16 + 16 + 48)


def test_feedforward_is_a_pattern_or_a_list() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3), "bb": nn.Linear(2, 3)})
    lorica.adapt(model, IA3(targets="all-linear", feedforward=("b", "x")))
    assert [a.scales_input for a in lorica.adapters(model).values()] == [False, True, False]  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="feedforward is '\\('"):
        IA3(feedforward="(")


def test_a_model_without_the_usual_names_must_name_its_targets() -> None:
    with pytest.raises(TargetError, match="has nothing of what"):
        lorica.adapt(nn.Sequential(nn.Linear(2, 2)), IA3())


@pytest.mark.parametrize("scales_input", [False, True])
@pytest.mark.parametrize("base", [nn.Conv2d(4, 6, 3, groups=2), nn.Conv3d(4, 6, 2, bias=False)], ids=str)
def test_a_convolution_has_a_factor_for_each_channel(base: Any, scales_input: bool) -> None:
    torch.manual_seed(0)
    adapter: Any = IA3(feedforward="x" if scales_input else "y").wrap(base, "x")
    dims = len(base.kernel_size)
    assert adapter.ia3_l.shape == (1, 4 if scales_input else 6, *(1,) * dims)
    nn.init.normal_(adapter.ia3_l)
    x, factors = torch.randn(2, 4, *(5,) * dims), adapter.ia3_l
    want = base(x * factors) if scales_input else base(x) * factors
    torch.testing.assert_close(adapter(x), want)
    torch.testing.assert_close(adapter(x[0]), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.merged()(x), want, rtol=1e-5, atol=1e-5)
