"""Weights that 16 bits hold exactly, stored so: the same results bit for bit, and what is not exact left alone."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, T5Config, T5ForConditionalGeneration

import lorica
from lorica.evaluate import compact as compact_module
from lorica.evaluate.compact import compact
from lorica.evaluate.generation import generate
from lorica.kernels import rows
from lorica.kernels.linear import Conv1D, Linear
from lorica.models.load import equip
from tests.evaluate.test_decoding import MODELS, PROMPTS, TOKENIZER, by_transformers, causal, lively
from tests.interop import small_models
from tests.interop.small_models import SMALL, randomise

pytestmark = pytest.mark.skipif(rows.compiled() is None, reason="without a compiler nothing is stored so")


def rounded(model: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Frozen, in float32, with numbers that `dtype` holds: as a published checkpoint is loaded here."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
    return model.requires_grad_(False)


def tied() -> Any:
    return causal(LlamaConfig(**{**SMALL, "tie_word_embeddings": True}))


def logits(model: Any, *shape: int) -> torch.Tensor:
    ids = (torch.arange(shape[0] * shape[1]).view(shape) * 7 + 3) % 60
    with torch.inference_mode():
        found: torch.Tensor = model(ids, use_cache=False).logits
    return found


def weights(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, torch.dtype]:
    found = {name: m._parameters.get("weight") for name, m in model.named_modules() if isinstance(m, kinds)}
    return {name: weight.dtype for name, weight in found.items() if weight is not None}


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_nothing_changes_but_the_size(make: Callable[[], Any]) -> None:
    theirs = rounded(lively(make()))
    plain = equip(copy.deepcopy(theirs))
    ours = compact(copy.deepcopy(plain))
    held = weights(ours, (Linear, Conv1D, nn.Embedding))
    assert len(held) >= 10 and set(held.values()) == {torch.bfloat16}
    for shape in ((1, 1), (1, 3), (1, 20), (5, 16)):
        # GPT-2's sums of few rows were torch's before.
        exact = make is not small_models.gpt2 or shape == (5, 16)
        scale = float(logits(plain, *shape).abs().max())
        torch.testing.assert_close(
            logits(ours, *shape), logits(plain, *shape), rtol=0, atol=0 if exact else 1e-6 * scale
        )
    expected = by_transformers(theirs, (), 12)
    for batch_size in (1, 4):
        assert generate(ours, TOKENIZER, PROMPTS, max_new_tokens=12, stop_ids=(), batch_size=batch_size) == expected


def test_memory_is_halved_and_a_tied_table_is_one() -> None:
    model = equip(rounded(tied()))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = sum(p.nbytes for p in model.parameters())
    norms = sum(p.nbytes for p in model.parameters() if p.ndim == 1)
    compact(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert 2 * (sum(p.nbytes for p in model.parameters()) - norms) == before - norms


def test_each_wide_weight_is_given_back_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model = equip(rounded(tied()))
    wide = [weakref.ref(parameter) for parameter in model.parameters() if parameter.ndim == 2]
    alive: list[int] = []

    def narrow(weight: torch.Tensor) -> Any:
        alive.append(sum(found() is not None for found in wide))
        return own(weight)

    own = compact_module._narrow
    monkeypatch.setattr(compact_module, "_narrow", narrow)
    compact(model)
    assert alive == [*range(len(wide), 0, -1)]


def test_what_is_not_exact_or_is_trained_stays() -> None:
    model = equip(rounded(lively(tied())))
    layers = model.model.layers
    with torch.no_grad():
        layers[0].mlp.up_proj.weight[-1, -1] += 1e-6
        layers[1].mlp.up_proj.weight[0, 0] = float("nan")
        model.lm_head.weight[3, 3] = 1 + 2.0**-20
    layers[0].self_attn.q_proj.weight.requires_grad_()
    compact(model)
    wide = {name for name, dtype in weights(model, (Linear, nn.Embedding)).items() if dtype is torch.float32}
    inner = {"layers.0.mlp.up_proj", "layers.1.mlp.up_proj", "layers.0.self_attn.q_proj", "embed_tokens"}
    assert wide == {*(f"model.{name}" for name in inner), "lm_head"}


def test_float16_is_kept_where_bfloat16_is_too_coarse() -> None:
    plain = equip(rounded(lively(small_models.llama()), torch.float16))
    ours = compact(copy.deepcopy(plain))
    assert set(weights(ours, (Linear, nn.Embedding)).values()) == {torch.float16}
    assert torch.equal(logits(ours, 3, 9), logits(plain, 3, 9))


def test_nothing_is_done_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "compiled", lambda: None)
    model = compact(equip(rounded(small_models.llama())))
    assert set(weights(model, (Linear, nn.Embedding)).values()) == {torch.float32}


def test_a_model_that_asks_a_weight_for_its_dtype_is_left() -> None:
    """T5 rounds what goes into its last product of a layer to that weight's dtype."""
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, decoder_start_token_id=0)
    plain = equip(rounded(lively(T5ForConditionalGeneration(config)).eval()))
    ours = compact(copy.deepcopy(plain))
    ids = torch.arange(12)[None] + 3
    with torch.inference_mode():
        got, expected = (m(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits for m in (ours, plain))
    assert torch.equal(got, expected)
    assert sum(p.nbytes for p in ours.parameters()) == sum(p.nbytes for p in plain.parameters())


METHODS: dict[str, Any] = {
    "adalora": lorica.AdaLoRA(rank=4, target_rank=2),
    "bottleneck": lorica.Bottleneck(size=4),
    "dora": lorica.DoRA(rank=4),
    "full": lorica.FullFineTuning(targets="q_proj"),
    "hydra": lorica.HydraLoRA(rank=4),
    "ia3": lorica.IA3(),
    "lora": lorica.LoRA(rank=4, targets=("all-linear", "embed_tokens")),
    "lora and the head": lorica.LoRA(rank=4, modules_to_save=("lm_head",)),
    "prefix": lorica.PrefixTuning(),
    "prompt": lorica.PromptTuning(),
    "tokens": lorica.LoRA(rank=4, trainable_tokens=(3, 5)),
    "vera": lorica.VeRA(rank=4),
}


CASES = [(small_models.llama, options) for options in METHODS.values()] + [(small_models.gpt2, lorica.LoRA(rank=4))]


@pytest.mark.parametrize(("make", "options"), CASES, ids=[*METHODS, "lora on GPT-2"])
def test_an_adapted_model_gives_what_it_gave(make: Callable[[], Any], options: Any) -> None:
    model = lorica.adapt(equip(rounded(lively(make()))), options).eval()
    randomise(lorica.trainable_parameters(model).values(), 0.2)
    before = [logits(model, *shape) for shape in ((1, 3), (5, 16))]
    compact(model)
    assert torch.bfloat16 in weights(model, (Linear, Conv1D)).values()
    for expected, shape in zip(before, ((1, 3), (5, 16)), strict=True):
        torch.testing.assert_close(logits(model, *shape), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    adapters = lorica.adapters(model).values()
    assert all(set(weights(a, (Linear,)).values()) <= {torch.float32} for a in adapters if not a.leaves_base)
