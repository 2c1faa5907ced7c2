"""What is trained beside the adapters: whole modules and single tokens, against plain training of the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig, RobertaConfig, RobertaForSequenceClassification

import lorica
from lorica.errors import ConfigError, TargetError
from lorica.methods.attach import trained_state
from lorica.methods.bottleneck import Bottleneck
from lorica.methods.full import FullFineTuning
from lorica.methods.lora import LoRA
from lorica.methods.method import Adapter

Make = Callable[..., Any]
# Token 3 is the padding token of `tiny_llama`, 60 stands before 5 and occurs twice, 7 does not occur.
TOKENS = (60, 5, 3, 7)
IDS = torch.tensor([[1, 60, 3, 9, 5, 60], [2, 5, 11, 3, 3, 63]])


def classifier() -> RobertaForSequenceClassification:
    """Its head is a module of two linear layers."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = RobertaConfig(**shape, num_attention_heads=4, max_position_embeddings=40, pad_token_id=1, num_labels=3)
    return RobertaForSequenceClassification(config).eval()


def randomise(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lorica.trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.3)


def beside(model: nn.Module) -> dict[str, Adapter]:
    return {name: adapter for name, adapter in lorica.adapters(model).items() if adapter.is_beside}


def step(model: nn.Module, parameters: list[nn.Parameter], labels: torch.Tensor, mask: Any = None) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        model(input_ids=IDS, labels=labels).loss.backward()
        if mask is not None:
            mask()
        optimizer.step()
        optimizer.zero_grad()


def test_a_head_is_trained_as_it_would_be_without_an_adapter() -> None:
    labels = torch.tensor([2, 0])
    plain = classifier().requires_grad_(False)
    plain.classifier.requires_grad_(True)
    step(plain, list(plain.classifier.parameters()), labels)
    model = lorica.adapt(classifier(), LoRA(rank=2, targets="query", modules_to_save="classifier"))
    assert list(beside(model)) == ["classifier.dense", "classifier.out_proj"]
    trained = lorica.trainable_parameters(model)
    assert sum(p.numel() for n, p in trained.items() if "lora" not in n) == 32 * 33 + 3 * 33
    # The adapter stays where it starts, so that the head alone is compared.
    step(model, [p for name, p in trained.items() if "lora" not in name], labels)
    merged = lorica.merge(model)
    assert all(torch.equal(p, q) for p, q in zip(merged.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_are_trained_as_rows_of_a_whole_embedding(tied: bool, tiny_llama: Make) -> None:
    plain = tiny_llama(tie_word_embeddings=tied).requires_grad_(False)
    embedding = plain.model.embed_tokens.weight.requires_grad_(True)
    start = embedding.detach().clone()
    others = [i for i in range(64) if i not in TOKENS]

    def mask() -> None:
        embedding.grad[others] = 0

    # The layer itself keeps the padding token's vector from being trained; a token that is named is trained.
    plain.model.embed_tokens.padding_idx = None
    step(plain, [embedding], IDS, mask)
    model = lorica.adapt(tiny_llama(tie_word_embeddings=tied), LoRA(rank=2, trainable_tokens=TOKENS))
    assert list(beside(model)) == ["model.embed_tokens", *["lm_head"] * tied]
    rows = lorica.trainable_parameters(model)["model.embed_tokens.rows"]
    assert rows.shape == (4, 32) and torch.equal(rows, start[list(TOKENS)])
    step(model, [rows], IDS)
    torch.testing.assert_close(rows, embedding[list(TOKENS)], atol=1e-6, rtol=1e-6)
    assert (rows - start[list(TOKENS)]).abs().amax(1).gt(1e-3).tolist() == [True, True, True, tied]
    merged = lorica.merge(model)
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-6, rtol=1e-5)
    assert torch.equal(merged.model.embed_tokens.weight[others], start[others])
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied == merged.config.tie_word_embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        LoRA(rank=2, modules_to_save=("lm_head", ".*norm"), trainable_tokens=TOKENS),
        LoRA(rank=2, trainable_tokens={"embed_tokens": TOKENS, "lm_head": (9,)}),
        Bottleneck(size=2, modules_to_save=r"layers\.1\.self_attn", targets="down_proj"),
    ],
)
def test_the_promises_of_the_contract(options: Any, dtype: torch.dtype, tiny_llama: Make) -> None:
    model = tiny_llama().to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = model(IDS).logits
    lorica.adapt(model, options)
    exact = {} if dtype is torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(model(IDS).logits, start, **exact)
    trained = lorica.trainable_parameters(model)
    assert all(p.dtype is torch.float32 for p in trained.values()) and trained.keys() <= trained_state(model).keys()
    randomise(model)
    changed = model(IDS).logits
    assert changed.dtype is dtype and not torch.allclose(changed, start, atol=1e-2)
    changed.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in trained.values())
    if isinstance(options, LoRA):
        # Merged, an adapter's update is rounded to 16 bits with the weight.
        close = {"atol": 1e-4, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.3, "rtol": 0.1}
        torch.testing.assert_close(lorica.merge(model)(IDS).logits, changed, **close)
    lorica.detach(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(IDS).logits, start)


@pytest.mark.parametrize("named", ["embed_tokens", "lm_head", ("embed_tokens", "lm_head")])
def test_a_tied_pair_is_one_weight_whichever_is_named(named: Any, tiny_llama: Make) -> None:
    model = lorica.adapt(tiny_llama(tie_word_embeddings=True), LoRA(rank=2, modules_to_save=named))
    assert list(beside(model)) == ["model.embed_tokens", "lm_head"]
    assert model.lm_head.masters["weight"] is model.model.embed_tokens.masters["weight"]
    assert [n for n in lorica.trainable_parameters(model) if "masters" in n] == ["model.embed_tokens.masters.weight"]
    randomise(model)
    merged = lorica.merge(model)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight and merged.config.tie_word_embeddings
    torch.testing.assert_close(merged(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


def test_an_embedding_that_multiplies_what_it_looks_up() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    config = GemmaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    lorica.adapt(model, LoRA(rank=2, trainable_tokens=TOKENS))
    model.model.embed_tokens.rows.data.normal_()
    merged = lorica.merge(model)
    assert torch.equal(merged.model.embed_tokens(IDS), model.model.embed_tokens(IDS))
    assert not torch.equal(model.model.embed_tokens(IDS), model.model.embed_tokens.base(IDS))


def test_all_linear_and_keywords_leave_out_what_is_trained_whole(tiny_llama: Make) -> None:
    model = lorica.adapt(tiny_llama(), LoRA(rank=2, modules_to_save=("lm_head", r"layers\.0\.mlp")))
    own = lorica.adapters(model).keys() - beside(model).keys()
    assert len(own) == 14 - 3 and not any("layers.0.mlp" in name for name in own)
    head = lorica.adapt(classifier(), FullFineTuning(parameters="bias", modules_to_save="classifier"))
    assert set(head.classifier.dense.masters) == {"weight", "bias"}
    assert set(head.roberta.encoder.layer[0].output.dense.masters) == {"bias"}
    assert all(adapter.options.modules_to_save for adapter in lorica.adapters(head).values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"modules_to_save": ("lm_hed", "score")}, ["'lm_hed' matches no module", "lm_head", "'score'"]),
        ({"modules_to_save": "rotary_emb"}, ["modules_to_save: 'rotary_emb' matches", "cannot be trained by it"]),
        ({"modules_to_save": "lm_head", "targets": "lm_head"}, ["targets: 'lm_head' matches lm_head"]),
        ({"modules_to_save": "lm_head", "targets": "embed_tokens"}, ["matches model.embed_tokens", "tie"]),
        ({"trainable_tokens": [5], "targets": "lm_head|q_proj"}, ["matches lm_head", "tie"]),
        ({"trainable_tokens": [5], "modules_to_save": "lm_head"}, ["model.embed_tokens is trained whole"]),
        ({"trainable_tokens": [5, 64, 99]}, ["64, 99 are beyond the 64 rows of model.embed_tokens", "resize"]),
        ({"trainable_tokens": {"embed_token": [5]}}, ["'embed_token' matches no module", "embed_tokens"]),
        ({"trainable_tokens": {"norm": [5]}}, ["'norm' matches model.norm"]),
        ({"trainable_tokens": {"lm_head": [5], ".*head": [6]}}, ["lm_head is matched by '.*head' and an earlier"]),
        ({"trainable_tokens": {"embed_tokens": [5], "lm_head": [6]}}, ["share one weight"]),
        ({"targets": "q_proj", "modules_to_save": "q_proj"}, ["A module is adapted or trained beside that, not both"]),
        ({"modules_to_save": ".*_proj"}, ["what is trained beside the adapters left out"]),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_and_nothing_changed(options: Any, words: list[str], tiny_llama: Make) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    with pytest.raises(TargetError) as caught:
        lorica.adapt(model, LoRA(**options))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not lorica.adapters(model) and all(p.requires_grad for p in model.parameters())


def test_all_faults_come_at_once(tiny_llama: Make) -> None:
    with pytest.raises(TargetError) as caught:
        lorica.adapt(tiny_llama(), LoRA(modules_to_save=("scores", "clasifier"), trainable_tokens=[70]))
    assert len(str(caught.value).splitlines()) == 3


def test_modules_that_cannot_be_wrapped_whole() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "ffn": nn.Linear(8, 8), "x": nn.Linear(8, 8)})
    with pytest.raises(TargetError, match="means attention, a MultiheadAttention, which cannot be trained whole"):
        lorica.adapt(model, LoRA(targets="ffn", modules_to_save="attention"))
    with pytest.raises(TargetError, match="ModuleDict does not say which layer embeds its tokens"):
        lorica.adapt(model, LoRA(targets="ffn", trainable_tokens=[1]))
    lorica.adapt(model, LoRA(targets="ffn", trainable_tokens={"x": [1]}))
    assert list(beside(model)) == ["x"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trainable_tokens": [5, 7, 5]}, "names 5 twice"),
        ({"trainable_tokens": [-1]}, "list of token ids"),
        ({"trainable_tokens": [True]}, "list of token ids"),
        ({"trainable_tokens": ["<new>"]}, "list of token ids"),
        ({"trainable_tokens": {"embed_tokens": [5, 5]}}, "names 5 twice"),
        ({"modules_to_save": "("}, "no valid regular expression"),
        ({"modules_to_save": ["lm_head", "("]}, "no valid regular expression"),
        ({"modules_to_save": [3]}, "list of module names"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LoRA(**options)
