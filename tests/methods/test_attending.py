"""The modules that attend are found in whatever model has them, and a model that cannot be reached is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    FalconConfig,
    GPT2Config,
    MambaConfig,
    Qwen3Config,
    T5Config,
)

import lorica
from lorica.errors import TargetError
from lorica.kernels import attention
from lorica.methods import attending
from lorica.methods.attending import HeadShape, attention_modules
from lorica.methods.ptuning_v2 import PTuningV2

N = 3
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
}  # fmt: skip
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(5))


FOUND: dict[str, tuple[Any, Any, str, HeadShape]] = {
    "qwen3": (
        AutoModelForCausalLM, Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=8), "model.layers.{}.self_attn",
        HeadShape(2, 8, 8),
    ),
    "gpt2": (
        AutoModelForCausalLM, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64), "transformer.h.{}.attn",
        HeadShape(4, 8, 8),
    ),
    "bert": (AutoModel, BertConfig(**SHAPE), "encoder.layer.{}.attention.self", HeadShape(4, 8, 8)),
    "deepseek, whose keys are wider than its values": (
        AutoModelForCausalLM,
        DeepseekV3Config(
            **SHAPE, moe_intermediate_size=16, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
            first_k_dense_replace=2, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
            v_head_dim=8,
        ),
        "model.layers.{}.self_attn",
        HeadShape(4, 12, 8),
    ),
}  # fmt: skip


def make(name: str) -> Any:
    torch.manual_seed(0)
    auto, config, *_ = FOUND[name]
    return auto.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


@pytest.mark.parametrize("name", FOUND)
def test_the_modules_that_attend_are_found_by_running_the_model(name: str) -> None:
    _, _, path, shape = FOUND[name]
    model, want = make(name), make(name)(IDS)[0]
    before = model.config._attn_implementation
    assert attention_modules(model, "ptuning_v2") == {path.format(i): shape for i in range(2)}
    assert model.config._attn_implementation == before and not model.training
    lorica.adapt(model, PTuningV2(num_virtual_tokens=N))
    assert model.config._attn_implementation == attention.NAME
    assert all(a.num_parameters() == N * shape.width for a in lorica.adapters(model).values())
    assert not torch.allclose(model(IDS)[0], want, atol=1e-4)
    torch.testing.assert_close(lorica.detach(model)(IDS)[0], want, atol=1e-5, rtol=1e-5)


def test_a_model_is_asked_once_and_again_when_its_modules_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = make("qwen3"), []
    ask = attending._ask
    monkeypatch.setattr(attending, "_ask", lambda *args: asked.append(args) or ask(*args))
    first = attention_modules(model, "prefix")
    assert attention_modules(model, "prefix") == first and len(asked) == 1
    layer = model.model.layers[0]
    layer.self_attn = type(layer.self_attn)(model.config, 0)
    assert attention_modules(model, "prefix") == first and len(asked) == 2


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "t5": (AutoModelForSeq2SeqLM, T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2), "encoder-decoder"),
    "bloom": (AutoModelForCausalLM, BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64), "let its"),
    "falcon": (AutoModelForCausalLM, FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4), ""),
    "mamba": (AutoModelForCausalLM, MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64), "no layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_it_cannot_reach_are_refused_and_left_as_they_were(name: str) -> None:
    auto, config, words = REFUSED[name]
    model = auto.from_config(config)
    before = model.config._attn_implementation
    with pytest.raises(TargetError, match=f"ptuning_v2.*{words}"):
        lorica.adapt(model, PTuningV2())
    assert not lorica.adapters(model) and model.config._attn_implementation == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_plain_module_is_refused() -> None:
    with pytest.raises(TargetError, match="Sequential does not let its attention be chosen"):
        lorica.adapt(nn.Sequential(nn.Linear(2, 2)), PTuningV2())


def test_layers_that_keep_keywords_to_themselves_are_refused() -> None:
    model = make("qwen3")
    forward = model.model.layers[1].self_attn.forward
    model.model.layers[1].self_attn.forward = lambda *args, prefix_key=None, prefix_value=None, **kw: forward(
        *args, **kw
    )
    with pytest.raises(TargetError, match="do not hand a prefix on"):
        lorica.adapt(model, PTuningV2())
