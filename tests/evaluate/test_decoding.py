"""The loop that decodes, and its cache, against transformers' `generate` and against a model called without a cache."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    MambaConfig,
    Phi3Config,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicLayer

import lorica
from lorica.evaluate import generation
from lorica.evaluate.cache import RoomyLayer, plain_cache
from lorica.evaluate.generation import generate, stream
from lorica.methods.attach import in_front
from lorica.models.load import equip
from tests.interop import small_models
from tests.interop.small_models import SMALL, randomise

TOKENIZER: Any = types.SimpleNamespace(pad_token_id=0)
PROMPTS = [[5, 9, 13, 3], [7], [21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31], [40, 41, 42, 43, 44, 45]]
WINDOWED: dict[str, Any] = {
    **SMALL, "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip


def gemma() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return causal(Gemma3TextConfig(**WINDOWED, sliding_window=6, layer_types=kinds))


def gemma2() -> Any:
    return causal(Gemma2Config(**WINDOWED, sliding_window=6, attn_logit_softcapping=1.0, final_logit_softcapping=5.0))


def phi3() -> Any:
    return causal(Phi3Config(**SMALL, num_key_value_heads=2, pad_token_id=0))


def causal(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "llama": small_models.llama,
    "qwen3": small_models.qwen3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gpt2": small_models.gpt2,
    "phi3": phi3,
}


def lively(model: Any) -> Any:
    """With weights so large that the answers vary."""
    randomise(model.parameters(), 0.3)
    return model


def by_transformers(model: Any, stop_ids: tuple[int, ...], count: int) -> list[list[int]]:
    """What transformers' own loop, cache and eager attention answer to all prompts at once, before a stop id."""
    model.set_attn_implementation("eager")
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    config = GenerationConfig(max_new_tokens=count, eos_token_id=list(stop_ids) or None, pad_token_id=0)
    model.generation_config = GenerationConfig()
    rows = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, width:].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in stop_ids), None)] for row in rows]


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_answers_are_those_of_transformers(make: Callable[[], Any]) -> None:
    theirs = lively(make())
    ours = equip(copy.deepcopy(theirs))
    whole = by_transformers(theirs, (), 16)
    assert len({token for row in whole for token in row}) > 8
    # Stops that end one row early, and another in the middle.
    for stop_ids in ((), (whole[1][2], whole[2][7])):
        expected = by_transformers(theirs, stop_ids, 16)
        for batch_size in (1, 4):
            how: dict[str, Any] = {"max_new_tokens": 16, "stop_ids": stop_ids, "batch_size": batch_size}
            assert generate(ours, TOKENIZER, PROMPTS, **how) == expected


def without_a_cache(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedily, by calling the model on everything so far, outside of the mode in which it is decoded."""
    front, position = in_front(model)
    ids = [*front, *prompt]
    with torch.no_grad():
        for _ in range(count):
            places = torch.arange(len(ids))[None] + position
            logits = model(input_ids=torch.tensor([ids]), position_ids=places, use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(front) + len(prompt) :]


METHODS: dict[str, Any] = {
    "lora": lorica.LoRA(rank=4),
    "routed by token": lorica.HydraLoRA(rank=4),
    "routed by sequence": lorica.HydraLoRA(rank=4, routing="sequence"),
    "prefix": lorica.PrefixTuning(),
    "prompt": lorica.PromptTuning(),
    "ia3": lorica.IA3(),
}


@pytest.mark.parametrize("make", [small_models.llama, gemma], ids=["llama", "gemma"])
@pytest.mark.parametrize("options", METHODS.values(), ids=list(METHODS))
def test_an_adapted_model_answers_as_without_a_cache(make: Callable[[], Any], options: Any) -> None:
    model = lorica.adapt(equip(lively(make())), options).eval()
    randomise(lorica.trainable_parameters(model).values(), 0.2)
    expected = [without_a_cache(model, prompt, 12) for prompt in PROMPTS]
    for batch_size in (1, 4):
        how: dict[str, Any] = {"max_new_tokens": 12, "stop_ids": (), "batch_size": batch_size}
        assert generate(model, TOKENIZER, PROMPTS, **how) == expected


def test_rows_that_have_ended_leave_the_batch() -> None:
    model = equip(lively(small_models.llama()))
    whole = generate(model, TOKENIZER, PROMPTS, max_new_tokens=16, stop_ids=(), batch_size=4)
    stops = {row[1] for row in whole[:3]} - set(whole[3])
    assert stops
    sizes: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    try:
        generate(model, TOKENIZER, PROMPTS, max_new_tokens=16, stop_ids=tuple(stops), batch_size=4)
    finally:
        hook.remove()
    assert sizes[0] == 4 and sizes[-1] < 4 and len(sizes) == 16


def test_nothing_of_the_loop_outlives_it() -> None:
    model = equip(lively(small_models.llama())).train()
    pieces = generation._tokens(model, generation._inputs(model, [[5, 6]], 0), 9, (), 0, lambda x: x.argmax(-1))
    assert isinstance(next(pieces), tuple) and not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
    assert not model.training
    pieces.close()
    assert model.training


def test_a_roomy_layer_holds_what_transformers_holds() -> None:
    torch.manual_seed(0)
    ours, theirs = RoomyLayer(room=9), DynamicLayer()
    for length in (5, 1, 2):
        keys, values = torch.randn(3, 2, length, 4), torch.randn(3, 2, length, 6)
        for mine, other in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
            assert torch.equal(mine, other)
    places = torch.tensor([2, 0])
    ours.batch_select_indices(places)
    theirs.batch_select_indices(places)
    keys, values = torch.randn(2, 2, 1, 4), torch.randn(2, 2, 1, 6)
    for mine, other in zip(ours.update(keys, values), theirs.update(keys, values), strict=True):
        assert torch.equal(mine, other)
    assert ours.get_seq_length() == 9 and ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)


def test_models_of_other_ways_are_left_to_transformers() -> None:
    config = T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, vocab_size=64)
    mamba = MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=64)
    models = [T5ForConditionalGeneration(config), phi3(), causal(mamba)]
    assert [plain_cache(model, 4) for model in models] == [None] * 3
    for model in models:
        lively(model.eval())
        how: dict[str, Any] = {"max_new_tokens": 6, "stop_ids": (), "batch_size": 4, "temperature": 1.5}
        drawn = generate(model, TOKENIZER, PROMPTS, **how)
        assert drawn == generate(model, TOKENIZER, PROMPTS, **how) and drawn != generate(
            model, TOKENIZER, PROMPTS, **how, seed=1
        )
    text = types.SimpleNamespace(pad_token_id=0, decode=lambda ids, **_: "".join(chr(97 + i % 26) for i in ids))
    pieces: Any = text
    streamed = "".join(stream(phi3(), pieces, [5, 6], max_new_tokens=4, stop_ids=()))
    assert len(streamed) == 4


@pytest.mark.parametrize("make", [small_models.llama, small_models.gpt2], ids=["llama", "gpt2"])
def test_logits_in_bfloat16_are_as_near_as_transformers(make: Callable[[], Any]) -> None:
    """To those of the same weights in float32: the loop's, at every step, beside transformers' without a cache."""
    theirs = lively(make()).to(torch.bfloat16)
    exact, ours = copy.deepcopy(theirs).float(), equip(copy.deepcopy(theirs))
    ids, errors = [5, 9, 13], []

    def choose(logits: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            want, peer = (model(torch.tensor([ids]), use_cache=False).logits[:, -1] for model in (exact, theirs))
        errors.append([float((found.float() - want).norm() / want.norm()) for found in (logits, peer)])
        ids.append(int(want.argmax()))
        return torch.tensor(ids[-1:])

    list(generation._tokens(ours, generation._inputs(ours, [ids[:]], 0), 12, (), 0, choose))
    mine, peers = torch.tensor(errors).mean(0).tolist()
    assert len(errors) == 12 and mine <= 1.2 * peers
