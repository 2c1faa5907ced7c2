"""A classifier's packed rows have the logits and gradients of the rows padded, by transformers' own forward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AlbertConfig,
    AttentionInterface,
    AutoModelForSequenceClassification,
    BertConfig,
    CamembertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PretrainedConfig,
    Qwen3Config,
    RobertaConfig,
)

from lorica.data.layouts import classes
from lorica.data.tokenized import IGNORE, TokenizedDataset
from lorica.kernels import attention, cpu_attention, torch_attention
from lorica.models import classifier
from lorica.models.attention import packing_support
from lorica.models.classifier import row_logits
from lorica.models.loss import class_loss
from lorica.models.tasks import CLASSIFICATION, padding_id, start_position

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99,
    "initializer_range": 0.3, "num_labels": 3, "pad_token_id": 0, "max_position_embeddings": 40,
}  # fmt: skip
OFF = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PACKS: dict[str, PretrainedConfig] = {
    "bert": BertConfig(**SMALL, **OFF),
    "roberta": RobertaConfig(**{**SMALL, "pad_token_id": 1}, **OFF),
    "camembert": CamembertConfig(**{**SMALL, "pad_token_id": 1}, **OFF),
    "electra": ElectraConfig(**SMALL, **OFF, embedding_size=16),
    "distilbert": DistilBertConfig(
        dim=32, hidden_dim=48, n_layers=2, n_heads=4, vocab_size=99, num_labels=3, initializer_range=0.3,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, max_position_embeddings=40,
    ),
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
    "gpt2": GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, num_labels=3, pad_token_id=0, initializer_range=0.3,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    ),
}  # fmt: skip
DOES_NOT = {
    "albert": (AlbertConfig(**SMALL, embedding_size=16), "calls of attention come from"),
    "modernbert": (ModernBertConfig(**SMALL), "through a window"),
    "gemma3 both ways": (
        Gemma3TextConfig(**SMALL, use_bidirectional_attention=True, sliding_window=4),
        "both ways through a window",
    ),
    "deberta": (DebertaV2Config(**SMALL), "0 of its 2 layers"),
}


def model_of(config: PretrainedConfig) -> Any:
    attention.register()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.set_attn_implementation(attention.NAME)
    return model


def rows(lengths: tuple[int, ...] = (9, 5, 5, 1, 12), second_at: int = 3) -> TokenizedDataset:
    """Rows of which the long ones have a second text."""
    generator, samples = np.random.default_rng(0), []
    for number, length in enumerate(lengths):
        labels = np.full(length, IGNORE, np.int32)
        labels[second_at if length > 8 else -1] = number % 3
        samples.append((generator.integers(2, 99, length).tolist(), labels.tolist()))
    return TokenizedDataset.from_samples(samples)


def batches(config: PretrainedConfig, dataset: TokenizedDataset) -> list[Any]:
    """The same samples in rows, and in one row."""
    types, start = config.model_type == "bert", start_position(config)
    layouts = [classes(padding_id(config), types, start, packing=packing) for packing in (False, True)]
    return [layout.make(dataset, np.array([2, 0, 4, 3, 1])) for layout in layouts]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", PACKS)
def test_packed_rows_have_the_loss_and_gradients_of_padded_ones(name: str, checkpointing: bool) -> None:
    config = PACKS[name]
    assert packing_support(config, CLASSIFICATION) is None
    model = model_of(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    padded, packed = batches(config, rows())
    assert packed.input_ids.shape == (1, 64) and packed.num_tokens == padded.num_tokens == 32
    assert torch.equal(packed.targets, padded.targets)
    found = []
    for batch in (padded, packed):
        loss = class_loss(model, batch.model_inputs(), batch.targets)
        found.append((loss, torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))
    assert classifier.packed_exit(model) is not None, "the layers were given the packed row"
    (want, wanted), (got, grads) = found
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    # Of the keys' biases it is zero but for rounding.
    largest = max(float(grad.abs().max()) for grad in wanted if grad is not None)
    for (key, _), mine, theirs in zip(model.named_parameters(), grads, wanted, strict=True):
        assert (mine is None) == (theirs is None), key
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-5 * largest, rtol=1e-3, msg=key)


@pytest.mark.skipif(cpu_attention.compiled() is None, reason="no C compiler")
def test_dropout_of_attention_weights_stays_in_the_kernel_and_a_checkpoint_repeats_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(BertConfig(**SMALL, **{**OFF, "attention_probs_dropout_prob": 0.1})).train()
    _, batch = batches(model.config, rows())
    row_logits(model, batch.model_inputs(), 5)  # at first beside padded rows, which have a mask
    monkeypatch.setattr(torch_attention, "attend", None)

    def step() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        loss = class_loss(model, batch.model_inputs(), batch.targets)
        return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    plain = step()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(plain, step(), strict=True))
    assert not torch.equal(plain[0], class_loss(model.eval(), batch.model_inputs(), batch.targets))
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-3)
    for _ in range(15):
        optimizer.zero_grad()
        loss = class_loss(model, batch.model_inputs(), batch.targets)
        loss.backward()
        optimizer.step()
    assert loss < 0.3 * plain[0]


@pytest.mark.parametrize("name", DOES_NOT)
def test_the_probe_says_who_cannot(name: str) -> None:
    config, reason = DOES_NOT[name]
    assert reason in str(packing_support(config, CLASSIFICATION))


def test_no_layer_computes_padding_and_no_hook_stays() -> None:
    model = model_of(PACKS["bert"]).eval()
    _, packed = batches(model.config, rows())
    seen: list[tuple[int, ...]] = []
    layer = model.bert.encoder.layer[1]
    row_logits(model, packed.model_inputs(), 5)
    layer.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    assert row_logits(model, packed.model_inputs(), 5).shape == (5, 3) and seen == [(1, 64, 32)]
    assert not model.bert._forward_pre_hooks and not layer._forward_hooks
    assert model(input_ids=packed.input_ids[:, :32]).logits.shape == (1, 3)


def test_prefixes_move_the_positions_of_both_alike() -> None:
    model = model_of(PACKS["roberta"]).eval()
    padded, packed = batches(model.config, rows().behind((), 4))
    assert padded.position_ids is not None and padded.position_ids[0, 0] == packed.position_ids[0, 0] == 2 + 4
    want = model(**padded.model_inputs()).logits
    torch.testing.assert_close(row_logits(model, packed.model_inputs(), 5), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moved", [0, 4])
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_model_that_turns_out_not_to_pack_is_given_rows(
    name: str, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(PACKS[name]).eval()
    # Attention across the borders of samples, as of a model that does not hand them over.
    monkeypatch.setitem(
        AttentionInterface._global_mapping,
        attention.NAME,
        lambda *args, **kwargs: attention.attention(*args, **{**kwargs, "cu_seq_lens_q": None}),
    )
    padded, packed = batches(model.config, rows().behind((), moved))
    want = model(**padded.model_inputs()).logits
    torch.testing.assert_close(row_logits(model, packed.model_inputs(), 5), want, rtol=1e-5, atol=1e-5)
    assert classifier.packed_exit(model) is None
