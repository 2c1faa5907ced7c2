"""P-tuning v2 against transformers' own eager attention with the prefix in its KV cache; which models it takes."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
)

import lorica
from lorica.errors import ConfigError, NotMergeableError
from lorica.evaluate.generation import context_length, generate
from lorica.methods.attach import in_front
from lorica.methods.ptuning_v2 import PTuningV2

N = 3
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
}  # fmt: skip
GROUPED: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**GROUPED),
    "qwen3, which normalises keys": Qwen3Config(**GROUPED),
    "gpt2, with learned positions": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, initializer_range=0.3),
    "gemma2, soft-capped": Gemma2Config(**GROUPED, attn_logit_softcapping=2.0, sliding_window=64),
    "gpt-oss, with sinks": GptOssConfig(**GROUPED, num_local_experts=2, num_experts_per_tok=1, sliding_window=64),
    "opt": OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3),
}
IDS = torch.randint(3, 64, (2, 7), generator=torch.Generator().manual_seed(5))


def make(name: str, implementation: str | None = None) -> Any:
    torch.manual_seed(0)
    keywords = {} if implementation is None else {"attn_implementation": implementation}
    config = copy.deepcopy(CONFIGS[name])
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, **keywords).eval()


def adapted(name: str) -> Any:
    model = lorica.adapt(make(name), PTuningV2(num_virtual_tokens=N))
    torch.manual_seed(1)
    for parameter in lorica.trainable_parameters(model).values():
        nn.init.normal_(parameter)
    return model


def reference(name: str, ids: Tensor, model: Any, mask: Tensor | None = None) -> Tensor:
    """Logits of a plain eager model whose cache holds the prefix before it reads the first token."""
    cache = DynamicCache()
    for number, adapter in enumerate(lorica.adapters(model).values()):
        heads, size = adapter.shape.num_heads, adapter.shape.key_size
        # PEFT's layout: [n, (key or value, head, size)].
        table = adapter.prompt_embeddings.view(N, 2, heads, size).permute(1, 2, 0, 3)
        cache.update(*(t[None].expand(len(ids), -1, -1, -1) for t in table), number)
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0) + N
    whole = torch.cat([torch.ones(len(ids), N, dtype=torch.long), mask], 1)
    plain = make(name, "eager")
    return plain(ids, attention_mask=whole, position_ids=positions, past_key_values=cache).logits


def positions(ids: Tensor) -> Tensor:
    return (torch.arange(ids.shape[1]) + N).expand_as(ids)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_equals_a_prefix_in_the_cache_of_eager_attention(name: str) -> None:
    model = adapted(name)
    got = model(IDS, position_ids=positions(IDS), use_cache=False).logits
    torch.testing.assert_close(got, reference(name, IDS, model), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got, make(name)(IDS).logits, atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "gemma2, soft-capped", "gpt2, with learned positions"])
def test_gradients_reach_every_layers_prefix(name: str) -> None:
    model = adapted(name)
    parameters = list(lorica.trainable_parameters(model).values())
    ours = torch.autograd.grad(model(IDS, position_ids=positions(IDS)).logits.square().mean(), parameters)
    theirs = torch.autograd.grad(reference(name, IDS, model).square().mean(), parameters)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert float(wanted.abs().max()) > 0
        torch.testing.assert_close(mine, wanted, atol=1e-4 * float(wanted.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2, soft-capped", "gpt-oss, with sinks"])
def test_packed_equals_alone_and_checkpointing_changes_nothing(name: str) -> None:
    model = adapted(name)
    lengths = (5, 5, 1, 3)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    samples = [torch.randint(3, 64, (length,)) for length in lengths]
    packed = {
        "input_ids": torch.cat(samples)[None],
        "position_ids": torch.cat([torch.arange(length) + N for length in lengths])[None],
        "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 5, "max_length_k": 5,
    }  # fmt: skip
    got = model(**packed, use_cache=False).logits
    want = torch.cat([reference(name, sample[None], model)[0] for sample in samples])
    torch.testing.assert_close(got[0], want, atol=1e-4, rtol=1e-4)
    parameters = list(lorica.trainable_parameters(model).values())
    plainly = torch.autograd.grad(got.square().sum(), parameters)
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    again = torch.autograd.grad(model(**packed, use_cache=False).logits.square().sum(), parameters)
    assert all(torch.equal(one, other) for one, other in zip(plainly, again, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2, with learned positions"])
def test_generation_with_a_cache_in_batches_equals_one_by_one_without(name: str) -> None:
    model = adapted(name)
    prompts = [[5, 6, 7, 8, 9], [10, 11], [12]]
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    settings: dict[str, Any] = {"max_new_tokens": 6, "stop_ids": ()}
    got = generate(model, tokenizer, prompts, batch_size=3, **settings)
    assert got == generate(model, tokenizer, prompts, batch_size=1, **settings)
    for prompt, answer in zip(prompts, got, strict=True):
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(reference(name, torch.tensor([ids]), model)[0, -1].argmax()))
        assert ids[len(prompt) :] == answer


def test_the_prefix_takes_its_share_of_the_context() -> None:
    model = make("llama")
    whole = context_length(model)
    assert whole is not None and context_length(lorica.adapt(model, PTuningV2(num_virtual_tokens=N))) == whole - N
    assert in_front(model) == (range(0), N)


def test_encoders_see_it_in_both_directions() -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(BertConfig(**SHAPE), dtype=torch.float32).eval()
    lorica.adapt(model, PTuningV2(num_virtual_tokens=N))
    layer = model.encoder.layer[0].attention.self
    (key, value), x = layer.prefix().detach().double().view(N, 2, 4, 8).permute(1, 2, 0, 3), torch.randn(1, 6, 32)
    with torch.no_grad():
        got = layer(x)[0]
    projections = (layer.base.query, layer.base.key, layer.base.value)
    q, k, v = (
        (x.double() @ p.weight.double().T + p.bias.double())[0].view(6, 4, 8).transpose(0, 1) for p in projections
    )
    weights = (q @ torch.cat([key, k], 1).transpose(1, 2) / 8**0.5).softmax(-1)
    want = (weights @ torch.cat([value, v], 1)).transpose(0, 1).reshape(1, 6, 32)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_attention_that_knows_no_prefix_is_an_error_and_not_a_plain_model() -> None:
    model = adapted("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="changed to 'eager' after it was adapted"):
        model(IDS)


def test_the_base_has_its_own_attention_again_afterwards() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.arange(3, 12)[None]
    before = model(ids).logits
    lorica.detach(lorica.adapt(model, PTuningV2(num_virtual_tokens=3)))
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(ids).logits, before)


def test_it_cannot_be_merged_and_says_why() -> None:
    with pytest.raises(NotMergeableError, match="keys and values"):
        lorica.merge(adapted("llama"))
