"""Generation against the model's own logits, step by step, and against itself in other batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from lorica.errors import DataError
from lorica.evaluate.generation import decode_pieces, generate, stream
from lorica.models.load import load_model, load_tokenizer

TEXTS = ["The", "Once upon a time there was a king who", "In economics, a market", "It is the year", "A nurse should"]
STOP = (2, 0)


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load_model("embedded", dtype="float32", device="cpu"), load_tokenizer("embedded")


@pytest.fixture(scope="module")
def prompts(embedded: tuple[Any, Any]) -> list[list[int]]:
    return [embedded[1](text).input_ids for text in TEXTS]


def by_hand(model: Any, prompt: list[int], num: int, stop: tuple[int, ...]) -> list[int]:
    """Greedy decoding without a cache: the most probable token, again and again."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num):
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token in stop:
                break
            ids.append(token)
    return ids[len(prompt) :]


def test_greedy_batches_equal_decoding_by_hand(embedded: tuple[Any, Any], prompts: list[list[int]]) -> None:
    model, tokenizer = embedded
    expected = [by_hand(model, prompt, 12, STOP) for prompt in prompts]
    for batch_size in (1, 2, 5):
        got = generate(model, tokenizer, prompts, max_new_tokens=12, stop_ids=STOP, batch_size=batch_size)
        assert got == expected


def test_answers_end_before_the_stop_id(embedded: tuple[Any, Any], prompts: list[list[int]]) -> None:
    model, tokenizer = embedded
    whole = generate(model, tokenizer, prompts, max_new_tokens=12, stop_ids=STOP, batch_size=5)
    stop = whole[1][4]
    cut = generate(model, tokenizer, prompts, max_new_tokens=12, stop_ids=(stop,), batch_size=5)
    assert len(cut[1]) <= 4
    for short, long in zip(cut, whole, strict=True):
        assert short == long[: long.index(stop) if stop in long else None]


def test_the_bases_own_defaults_do_not_leak_in(embedded: tuple[Any, Any], prompts: list[list[int]]) -> None:
    model, tokenizer = embedded
    expected = generate(model, tokenizer, prompts, max_new_tokens=8, stop_ids=STOP, batch_size=5)
    before = model.generation_config
    own = GenerationConfig(
        do_sample=True, temperature=1.7, repetition_penalty=3.0, min_new_tokens=8, suppress_tokens=[expected[0][0]]
    )
    model.generation_config = own
    try:
        assert generate(model, tokenizer, prompts, max_new_tokens=8, stop_ids=STOP, batch_size=5) == expected
        assert model.generation_config is own
    finally:
        model.generation_config = before


def test_sampling_follows_the_seed_alone(embedded: tuple[Any, Any], prompts: list[list[int]]) -> None:
    model, tokenizer = embedded

    def sample(seed: int, **how: float) -> list[list[int]]:
        return generate(model, tokenizer, prompts, max_new_tokens=8, stop_ids=STOP, batch_size=2, seed=seed, **how)

    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    first = sample(1, temperature=1.0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    assert sample(1, temperature=1.0) == first
    assert sample(2, temperature=1.0) != first
    greedy = sample(0)
    assert sample(5, temperature=1.0, top_p=1e-6) == greedy
    assert sample(5, temperature=1e-4) == greedy


def test_the_mode_is_restored(tiny_llama: Callable[..., Any], embedded: tuple[Any, Any]) -> None:
    model = tiny_llama().train()
    generate(model, embedded[1], [[5, 6]], max_new_tokens=2, stop_ids=(), batch_size=1)
    assert model.training


def test_prompts_that_do_not_fit_are_all_named(tiny_llama: Callable[..., Any], embedded: tuple[Any, Any]) -> None:
    model = tiny_llama()
    fitting = [5] * (128 - 10)
    assert len(generate(model, embedded[1], [fitting], max_new_tokens=10, stop_ids=(), batch_size=1)[0]) == 10
    with pytest.raises(DataError, match=r"prompt 2 has 119 tokens; prompt 3 is empty.*lower max_new_tokens"):
        generate(model, embedded[1], [fitting, [*fitting, 5], []], max_new_tokens=10, stop_ids=(), batch_size=2)
    with pytest.raises(DataError, match="prompt 1 has 119 tokens"):
        stream(model, embedded[1], [*fitting, 5], max_new_tokens=10, stop_ids=())


def test_no_prompts_give_no_answers(tiny_llama: Callable[..., Any], embedded: tuple[Any, Any]) -> None:
    assert generate(tiny_llama(), embedded[1], [], max_new_tokens=4, stop_ids=(), batch_size=2) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_is_the_same_text(embedded: tuple[Any, Any], prompts: list[list[int]], temperature: float) -> None:
    model, tokenizer = embedded
    how = {"max_new_tokens": 12, "stop_ids": STOP, "temperature": temperature, "seed": 3}
    ids = generate(model, tokenizer, prompts[1:2], batch_size=1, **how)[0]
    pieces = list(stream(model, tokenizer, prompts[1], **how))
    assert len(pieces) > 3
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_closed_stream_stops_the_model(embedded: tuple[Any, Any], prompts: list[list[int]]) -> None:
    model, tokenizer = embedded
    calls = []
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    try:
        pieces = stream(model, tokenizer, prompts[1], max_new_tokens=1500, stop_ids=())
        next(pieces)
        pieces.close()  # type: ignore[attr-defined]
    finally:
        hook.remove()
    assert len(calls) < 200


def test_an_error_in_the_model_reaches_the_reader(embedded: tuple[Any, Any], prompts: list[list[int]]) -> None:
    model, tokenizer = embedded

    def fail(*_: Any) -> None:
        raise RuntimeError("out of cheese")

    hook = model.lm_head.register_forward_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of cheese"):
            list(stream(model, tokenizer, prompts[1], max_new_tokens=5, stop_ids=()))
    finally:
        hook.remove()


@pytest.mark.parametrize("text", ["二十号仓库存放在四摄氏度。", "naïve café — 🙂 done", "plain words  and\nlines", ""])
def test_pieces_never_break_a_character(base: Path, text: str) -> None:
    tokenizer = load_tokenizer(base)
    ids = tokenizer(text).input_ids
    pieces = list(decode_pieces(tokenizer, ids))
    assert "".join(pieces) == text
    assert all(pieces)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_text_that_ends_inside_a_character_says_so(base: Path) -> None:
    tokenizer = load_tokenizer(base)
    ids = tokenizer("好").input_ids
    assert len(ids) > 1
    assert list(decode_pieces(tokenizer, ids[:-1])) == ["\N{REPLACEMENT CHARACTER}"]
