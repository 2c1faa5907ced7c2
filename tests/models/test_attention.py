"""Packed equals separate, padded equals alone, and the probe says who can pack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)

from lorica.kernels import attention
from lorica.models.attention import packing_support

TINY: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 99, "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 99}
PACKS = {
    "llama": LlamaConfig(**TINY),
    "qwen2": Qwen2Config(**TINY),
    "qwen3": Qwen3Config(**TINY),
    "qwen3 moe": Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "mistral with a window": MistralConfig(**TINY, sliding_window=4),
    "gemma2 with soft-capping and a window": Gemma2Config(**TINY, sliding_window=4, attn_logit_softcapping=2.0),
    "gemma3 with a window": Gemma3TextConfig(**TINY, sliding_window=4),
    "gpt-oss with sinks and a window": GptOssConfig(
        **TINY, sliding_window=4, num_local_experts=2, num_experts_per_tok=1
    ),
    "phi3": Phi3Config(**TINY, pad_token_id=0),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=99, initializer_range=0.3, bos_token_id=0, eos_token_id=1
    ),
    "neox": GPTNeoXConfig(**TINY),
    # Its code looks into the positions, so a probe that had none would refuse it.
    "modernbert decoder with a window": ModernBertDecoderConfig(**TINY, local_attention=4, pad_token_id=0),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
}
DOES_NOT = {
    "falcon": (FalconConfig(**SMALL), "custom attention function"),
    "stablelm": (StableLmConfig(**TINY), "borders of packed samples"),
    "bloom": (BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=99), "0 of its 3 layers"),
    "llama4": (
        Llama4TextConfig(**TINY, intermediate_size_mlp=48, num_local_experts=4, attention_chunk_size=5),
        "attends in chunks",
    ),
    "mamba": (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99), "0 of its 2 layers"),
}


def pair(config: Any) -> tuple[Any, Any]:
    """The same weights with our attention, and with transformers' own eager one."""
    attention.register()
    torch.manual_seed(0)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    ours = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ours.load_state_dict(reference.state_dict())
    ours.set_attn_implementation(attention.NAME)
    return ours, reference


def packed_inputs(samples: list[torch.Tensor]) -> dict[str, Any]:
    lengths = [len(sample) for sample in samples]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return {
        "input_ids": torch.cat(samples)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@pytest.mark.parametrize("name", PACKS)
def test_packed_samples_give_what_each_gives_alone(name: str) -> None:
    config = PACKS[name]
    assert packing_support(config) is None
    ours, reference = pair(config)
    # Equal neighbours (one batch), a single token, and lengths above and below the windows.
    samples = [torch.randint(2, 99, (n,)) for n in (9, 5, 5, 1, 12, 3)]
    got = ours(**packed_inputs(samples), use_cache=False).logits[0]
    want = torch.cat([reference(sample[None], use_cache=False).logits[0] for sample in samples])
    torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


WITH_GRADIENTS = [
    "llama", "mistral with a window", "gemma2 with soft-capping and a window", "gpt-oss with sinks and a window", "gpt2"
]  # fmt: skip


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_packed_gradients_equal_those_of_each_alone(name: str) -> None:
    ours, reference = pair(PACKS[name])
    samples = [torch.randint(2, 99, (n,)) for n in (6, 6, 9)]
    ours(**packed_inputs(samples), use_cache=False).logits.square().sum().backward()
    for sample in samples:
        reference(sample[None], use_cache=False).logits.square().sum().backward()
    for (key, mine), theirs in zip(ours.named_parameters(), reference.parameters(), strict=True):
        scale = float(theirs.grad.abs().max()) if theirs.grad is not None else 1.0
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4 * max(scale, 1e-3), rtol=1e-3, msg=key)


def test_a_later_sample_never_reaches_an_earlier_one() -> None:
    ours, _ = pair(PACKS["llama"])
    first, second = torch.randint(2, 99, (7,)), torch.randint(2, 99, (5,))
    one = ours(**packed_inputs([first, second]), use_cache=False).logits[0, :7]
    other = ours(**packed_inputs([first, second.flip(0)]), use_cache=False).logits[0, :7]
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", ["llama", "mistral with a window", "gemma2 with soft-capping and a window", "opt"])
def test_padding_on_either_side_changes_nothing(name: str) -> None:
    ours, reference = pair(PACKS[name])
    short, long = torch.randint(2, 99, (5,)), torch.randint(2, 99, (9,))
    want = reference(short[None], use_cache=False).logits[0]
    for left in (True, False):
        fill = torch.zeros(4, dtype=torch.long)
        row = torch.cat([fill, short] if left else [short, fill])
        mask = torch.stack([row != 0, torch.ones(9, dtype=torch.bool)]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ids = torch.stack([row, long])
        got = ours(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[0][mask[0].bool()]
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "config",
    [PACKS["llama"], PACKS["mistral with a window"], PACKS["gemma3 with a window"], DOES_NOT["llama4"][0]],
    ids=lambda config: config.model_type,
)
def test_one_row_longer_than_windows_and_chunks(config: Any) -> None:
    ours, reference = pair(config)
    ids = torch.randint(2, 99, (1, 14))
    want = reference(ids, use_cache=False).logits
    torch.testing.assert_close(ours(ids, use_cache=False).logits, want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3 with a window", "gpt2"])
def test_decoding_with_a_cache_equals_decoding_without(name: str) -> None:
    ours, reference = pair(PACKS[name])
    ids = torch.randint(2, 99, (2, 7))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), reference.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("name", DOES_NOT)
def test_the_probe_says_why_a_model_cannot_pack(name: str) -> None:
    config, words = DOES_NOT[name]
    reason = packing_support(config)
    assert reason is not None and words in reason


def test_the_probe_leaves_the_configuration_as_it_was() -> None:
    config = LlamaConfig(**TINY)
    before = config.to_dict()
    packing_support(config)
    assert config.to_dict() == before


def test_borders_that_do_not_cover_the_batch_are_an_error() -> None:
    ours, _ = pair(PACKS["llama"])
    inputs = packed_inputs([torch.randint(2, 99, (5,))])
    inputs["cu_seq_lens_q"] = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cover 4 tokens"):
        ours(**inputs, use_cache=False)
