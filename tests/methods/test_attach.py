"""Which modules are chosen, what refuses, and what merging and detaching leave."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM, Llama4ForCausalLM, Llama4TextConfig

import lorica
from lorica.errors import ConfigError, TargetError
from lorica.methods.attach import resolve_targets
from lorica.methods.lora import LoRA
from lorica.methods.method import Adapter, Targets, method_options

Make = Callable[..., Any]


def targets(model: nn.Module, *patterns: str) -> list[str]:
    return resolve_targets(model, LoRA(targets=patterns if len(patterns) > 1 else patterns[0]))


def test_all_linear_takes_every_linear_but_the_head(tiny_llama: Make) -> None:
    model = tiny_llama()
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(targets(model, "all-linear")) == linears - {"lm_head"} and len(linears) == 15


def test_a_pattern_matches_a_whole_name_or_a_tail_of_it(tiny_llama: Make) -> None:
    model = tiny_llama()
    assert targets(model, "q_proj") == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert targets(model, r"layers\.1\.mlp\.(up|gate)_proj") == [f"model.layers.1.mlp.{k}_proj" for k in ("gate", "up")]
    assert targets(model, "lm_head", "model.embed_tokens") == ["model.embed_tokens", "lm_head"]
    with pytest.raises(TargetError):
        targets(model, "proj")


def test_every_pattern_that_matches_nothing_is_named_with_what_is_near(tiny_llama: Make) -> None:
    model = tiny_llama()
    with pytest.raises(TargetError) as caught:
        lorica.adapt(model, LoRA(targets=("q_prj", "v_proj", "norm", "wte")))
    text = str(caught.value)
    assert "'q_prj' matches no module" in text and "q_proj" in text
    assert "'norm' matches model.norm, but a LlamaRMSNorm" in text and "'wte'" in text and "'v_proj'" not in text
    assert not lorica.adapters(model) and all(p.requires_grad for p in model.parameters())


def test_a_broken_regular_expression_is_a_configuration_error(tiny_llama: Make) -> None:
    with pytest.raises(ConfigError, match="no valid regular expression"):
        targets(tiny_llama(), "q_proj(")


def test_an_adapter_that_would_never_run_is_refused() -> None:
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "ffn": nn.Linear(8, 8)})
    assert targets(attention, "all-linear") == ["ffn"]
    with pytest.raises(TargetError, match="out_proj"):
        targets(attention, "out_proj")


def test_a_layer_that_evaluation_reads_without_calling_is_refused() -> None:
    """nn.TransformerEncoderLayer's fast path reads linear1.weight: trained adapters would not count in evaluation."""
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8))
    assert targets(model, "all-linear") == ["1"]
    with pytest.raises(TargetError, match="linear1"):
        targets(model, "linear1")


@pytest.mark.parametrize("method", ["lora", "dora", "hydra", "ia3", "bottleneck"])
def test_a_router_made_from_a_linear_layer_is_left_alone(method: str) -> None:
    """Llama 4's gives scores and logits: an adapter has nothing to add to a tuple."""
    model = llama4()
    options = method_options(method)(targets="all-linear")
    chosen = resolve_targets(model, options)
    assert "model.layers.0.self_attn.q_proj" in chosen and not any("router" in name for name in chosen)
    before = model(torch.arange(8)[None]).logits
    after = lorica.adapt(model, options)(torch.arange(8)[None]).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    with pytest.raises(TargetError, match=r"router, but a Llama4Router there cannot be wrapped"):
        targets(llama4(), "router")


def test_full_fine_tuning_trains_such_a_router_too() -> None:
    chosen = resolve_targets(llama4(), lorica.FullFineTuning())
    assert "model.layers.0.feed_forward.router" in chosen


def test_a_linear_layer_with_a_forward_of_its_own_is_one_still() -> None:
    config = FalconConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    assert "transformer.h.0.mlp.dense_4h_to_h" in targets(FalconForCausalLM(config), "all-linear")


def llama4() -> nn.Module:
    torch.manual_seed(0)
    config = Llama4TextConfig(
        hidden_size=16, intermediate_size=16, intermediate_size_mlp=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, vocab_size=20, num_local_experts=2, num_experts_per_tok=1,
        interleave_moe_layer_step=1, pad_token_id=0,
    )  # fmt: skip
    return Llama4ForCausalLM(config).eval()


def test_a_model_that_is_one_layer_is_refused() -> None:
    with pytest.raises(TargetError, match="Linear holds no linear layer"):
        lorica.adapt(nn.Linear(4, 4), LoRA())


def test_adapting_twice_is_refused(tiny_llama: Make) -> None:
    model = lorica.adapt(tiny_llama(), LoRA())
    with pytest.raises(ConfigError, match="already carries 14 adapters"):
        lorica.adapt(model, LoRA())


def test_merging_shares_what_no_adapter_touched(tiny_llama: Make) -> None:
    model = lorica.adapt(tiny_llama(), LoRA(targets="q_proj"))
    plain = lorica.merge(model)
    assert plain.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight
    assert plain.model.layers[0].self_attn.q_proj.weight is not model.model.layers[0].self_attn.q_proj.weight
    assert plain.model.layers[0] is not model.model.layers[0]


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_one_of_a_tied_pair_unties_it(target: str, tiny_llama: Make, tmp_path: Any) -> None:
    model = lorica.adapt(tiny_llama(tie_word_embeddings=True), LoRA(targets=target))
    for parameter in lorica.trainable_parameters(model).values():
        nn.init.normal_(parameter, std=0.3)
    plain = lorica.merge(model)
    ids = torch.randint(0, 64, (2, 7))
    want = model(ids).logits
    torch.testing.assert_close(plain(ids).logits, want, atol=1e-5, rtol=1e-5)
    assert model.config.tie_word_embeddings and not plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    again = type(plain).from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, want, atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Small(LoRA):
    """A method with a keyword of its own that wraps layers of at most 32 outputs."""

    targets: Targets = "attention"

    def patterns(self) -> str | tuple[str, ...]:
        return ("k_proj", "o_proj") if self.targets == "attention" else self.targets

    def takes(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.out_features <= 32


def test_a_method_may_have_keywords_of_its_own_and_choose_by_more_than_the_kind(tiny_llama: Make) -> None:
    model = tiny_llama()
    ends = {name.rsplit(".", 1)[-1] for name in resolve_targets(model, Small())}
    assert ends == {"k_proj", "o_proj"}
    ends = {name.rsplit(".", 1)[-1] for name in resolve_targets(model, Small(targets="all-linear"))}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    with pytest.raises(TargetError, match=r"'up_proj' matches .* cannot be wrapped by this method"):
        resolve_targets(model, Small(targets="up_proj"))


class PlusOne(Adapter):
    """Adds one to every weight."""

    def merged(self) -> nn.Module:
        plain = copy.deepcopy(self.base)
        plain.weight.data += 1
        return plain


class AddOne(LoRA):
    def wrap(self, module: nn.Module, name: str) -> Adapter:
        return PlusOne(module, self)


def test_merging_both_of_a_tied_pair_alike_ties_them_again(tiny_llama: Make) -> None:
    model = lorica.adapt(tiny_llama(tie_word_embeddings=True), AddOne(targets=("embed_tokens", "lm_head")))
    plain = lorica.merge(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and plain.config.tie_word_embeddings
    assert plain.lm_head.weight is not model.lm_head.base.weight


def test_new_adapters_take_the_models_mode(tiny_llama: Make) -> None:
    model = tiny_llama().train()
    lorica.adapt(model, LoRA())
    assert all(a.training for a in lorica.adapters(model).values())
    lorica.detach(model.eval())
    lorica.adapt(model, LoRA())
    assert not any(a.training for a in lorica.adapters(model).values())


def test_a_method_is_found_by_its_file_name() -> None:
    assert method_options("lora") is LoRA
    for name in ("lara", "method", "..", "os"):
        with pytest.raises(ConfigError, match=r"method\.name"):
            method_options(name)
