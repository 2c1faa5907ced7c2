"""Prompt tuning against the same vectors given as `inputs_embeds`, and how the vectors start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    RobertaConfig,
    T5Config,
)

import lorica
from lorica.errors import ConfigError, NotMergeableError, TargetError
from lorica.methods.attach import in_front
from lorica.methods.prompt import PromptEmbedding, PromptTuning

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
}  # fmt: skip
CONFIGS: dict[str, tuple[Any, Any]] = {
    "llama": (AutoModelForCausalLM, LlamaConfig(**SHAPE, num_key_value_heads=2)),
    "gpt2": (AutoModelForCausalLM, GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)),
    "gemma3, which scales": (AutoModelForCausalLM, Gemma3TextConfig(**SHAPE, num_key_value_heads=2, head_dim=8)),
    "bert": (AutoModel, BertConfig(**SHAPE)),
    "roberta": (AutoModel, RobertaConfig(**SHAPE, max_position_embeddings=40)),
}
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))
N = 5


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    auto, config = CONFIGS[name]
    return auto.from_config(config, dtype=dtype).eval()


def behind_virtual(ids: Tensor) -> Tensor:
    return torch.cat([torch.arange(64, 64 + N).expand(len(ids), -1), ids], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_virtual_ids_equal_the_same_vectors_as_inputs_embeds_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    plain, embeddings = model(IDS)[0], model.get_input_embeddings()(IDS)
    lorica.adapt(model, PromptTuning(num_virtual_tokens=N))
    (adapter,) = lorica.adapters(model).values()
    prompt = torch.randn(N, 32)
    with torch.no_grad():
        adapter.prompt_embeddings.copy_(prompt)
    assert torch.equal(model(IDS)[0], plain)
    want = model(inputs_embeds=torch.cat([prompt.to(dtype).expand(2, -1, -1), embeddings], 1))[0]
    assert torch.equal(model(behind_virtual(IDS))[0], want)
    assert not torch.allclose(want[:, N:], plain, atol=1e-3)


def test_only_the_prompt_is_trained_and_its_gradient_is_that_of_the_vectors() -> None:
    model = lorica.adapt(make("llama"), PromptTuning(num_virtual_tokens=N))
    (name,), (adapter,) = lorica.trainable_parameters(model), lorica.adapters(model).values()
    assert name == "model.embed_tokens.prompt_embeddings" and adapter.num_parameters() == N * 32
    model(behind_virtual(IDS)).logits.square().sum().backward()
    given = adapter.prompt_embeddings.detach().clone().requires_grad_()
    embeddings = adapter.base(IDS)
    model(inputs_embeds=torch.cat([given.expand(2, -1, -1), embeddings], 1)).logits.square().sum().backward()
    torch.testing.assert_close(adapter.prompt_embeddings.grad, given.grad, atol=1e-4, rtol=1e-4)
    assert adapter.weight is adapter.base.weight and adapter.prompt_embeddings.dtype is torch.float32


def test_an_adapted_model_says_what_stands_in_front() -> None:
    model = make("llama")
    assert in_front(model) == (range(0), 0)
    lorica.adapt(model, PromptTuning(num_virtual_tokens=N))
    assert in_front(model) == (range(64, 64 + N), 0)


def test_random_vectors_have_the_spread_of_the_vocabularys() -> None:
    model = make("gemma3, which scales")
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    start = lorica.adapt(model, PromptTuning(num_virtual_tokens=64, init="random")).get_input_embeddings().prompt()
    assert float(start.detach().std()) == pytest.approx(0.3 * 32**0.5, rel=0.1)


def test_a_start_from_the_vocabulary_takes_the_embeddings_as_the_layers_see_them() -> None:
    model = make("gemma3, which scales")
    table = model.get_input_embeddings().weight.detach() * 32**0.5
    start = lorica.adapt(model, PromptTuning(num_virtual_tokens=6)).get_input_embeddings().prompt()
    distance, nearest = (start.detach()[:, None] - table).abs().amax(-1).min(1)
    assert float(distance.max()) < 1e-5 and len(set(nearest.tolist())) > 1


def test_a_start_from_a_text_repeats_or_cuts_it(base: Path) -> None:
    model, tokenizer = lorica.load_model(base, dtype="float32", device="cpu"), lorica.load_tokenizer(base)
    ids = tokenizer("Answer in one word:", add_special_tokens=False).input_ids
    for count in (2, len(ids), 2 * len(ids) + 1):
        options = PromptTuning(num_virtual_tokens=count, init="text", init_text="Answer in one word:")
        wanted = torch.tensor((ids * 3)[:count])
        start = lorica.adapt(model, options).get_input_embeddings().prompt()
        assert torch.equal(start, lorica.detach(model).get_input_embeddings()(wanted))


def test_a_text_needs_a_tokenizer_beside_the_base() -> None:
    with pytest.raises(ConfigError, match="tokenizer cannot be loaded from ''"):
        lorica.adapt(make("llama"), PromptTuning(init="text", init_text="Say"))


@pytest.mark.parametrize("options", [{"init": "text"}, {"init_text": "Say"}, {"init": "random", "init_text": "Say"}])
def test_text_and_its_start_belong_together(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="init_text"):
        PromptTuning(**options)


@pytest.mark.parametrize("options", [{"num_virtual_tokens": 0}, {"init": "zero"}, {"targets": "q_proj"}])
def test_options_that_cannot_be_meant_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        PromptTuning(**options)


def test_models_without_one_input_embedding_are_refused() -> None:
    seq2seq = AutoModelForSeq2SeqLM.from_config(T5Config(d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    for model, words in ((seq2seq, "encoder-decoder"), (nn.Sequential(nn.Embedding(4, 4)), "input embedding")):
        with pytest.raises(TargetError, match=words):
            lorica.adapt(model, PromptTuning())
        assert not lorica.adapters(model)


def test_it_cannot_be_merged_and_says_why() -> None:
    with pytest.raises(NotMergeableError, match="in front of the text"):
        lorica.merge(lorica.adapt(make("llama"), PromptTuning()))


def test_shapes_are_foretold_without_memory() -> None:
    embedding = make("llama").get_input_embeddings()
    assert PromptTuning(num_virtual_tokens=3).shapes(embedding, "e") == {"prompt_embeddings": (3, 32)}


def test_ids_beyond_the_prompt_are_an_error() -> None:
    adapter = PromptEmbedding(nn.Embedding(4, 2), PromptTuning(num_virtual_tokens=2), torch.zeros(2, 2))
    with pytest.raises(IndexError):
        adapter(torch.tensor([6]))


def test_a_repetition_penalty_passes_over_ids_that_cannot_be_said() -> None:
    model = lorica.adapt(make("llama"), PromptTuning(num_virtual_tokens=N))
    ids = behind_virtual(IDS)
    got = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, repetition_penalty=1.3, pad_token_id=0
    )
    for _ in range(4):
        logits = model(ids).logits[:, -1]
        seen = torch.zeros(2, 64 + N).scatter(1, ids, 1.0)[:, :64] > 0
        ids = torch.cat(
            [ids, torch.where(seen, logits * torch.where(logits < 0, 1.3, 1 / 1.3), logits).argmax(-1)[:, None]], 1
        )
    assert torch.equal(got, ids)
