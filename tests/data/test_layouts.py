"""Batches of classes and pairs against what transformers' own tokenizers and collators make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from task_bases import make_tokenizer
from transformers import DataCollatorForSeq2Seq, T5Config, T5ForConditionalGeneration

from lorica.data.layouts import PACKED, classes, pair_batch, pairs, source_length
from lorica.data.render_labels import LabelRenderer, class_names
from lorica.data.render_pairs import PairRenderer
from lorica.data.rows import Example, Message, RowError
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import DataError

TEXTS = ["the film was great", "dull", "it is a very very fine story", "i hate the cast of it"]


def text(first: str, label: str | None = None, second: str | None = None) -> Example:
    return Example((), first, (), (), None, "", second, label)


def chat(*contents: str) -> Example:
    roles = ["user", "assistant"] * len(contents)
    return Example(tuple(map(Message, roles, contents)), None, (), (), None, "")


def dataset_of(renderer: Any, examples: list[Example]) -> TokenizedDataset:
    samples = list(renderer.render_all(examples))
    assert not any(isinstance(sample, RowError) for sample in samples), samples
    return TokenizedDataset.from_samples(samples)


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("paired", [False, True])
def test_a_batch_of_classes_is_what_the_tokenizer_pads(kind: str, paired: bool) -> None:
    tokenizer = make_tokenizer(kind)
    seconds = [f"and {t}" for t in reversed(TEXTS)] if paired else [None] * len(TEXTS)
    examples = [text(t, "ab"[i % 2], s) for i, (t, s) in enumerate(zip(TEXTS, seconds, strict=True))]
    dataset = dataset_of(LabelRenderer(tokenizer), examples)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token
    batch = classes(tokenizer.pad_token_id, kind == "bert").make(dataset, np.array([2, 0, 3, 1]))
    order = [2, 0, 3, 1]
    other = [seconds[i] for i in order] if paired else None
    wanted = tokenizer([TEXTS[i] for i in order], other, padding=True, padding_side="right", return_tensors="pt")
    inputs: Any = batch.model_inputs()
    assert inputs.keys() == wanted.keys() and all(torch.equal(inputs[key], wanted[key]) for key in wanted)
    assert batch.targets.tolist() == [0, 0, 1, 1]
    assert (batch.num_targets, batch.num_samples, batch.num_tokens) == (4, 4, int(wanted["attention_mask"].sum()))
    assert dataset.num_trained_tokens == 4


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_packed_batch_of_classes_holds_what_the_tokenizer_makes_of_each(kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    seconds = [None, "the cast", "dull", None]
    examples = [text(t, "ab"[i % 2], s) for i, (t, s) in enumerate(zip(TEXTS, seconds, strict=True))]
    dataset = dataset_of(LabelRenderer(tokenizer), examples)
    order, start = [2, 0, 3, 1], 0 if kind == "bert" else tokenizer.pad_token_id + 1
    layout = classes(tokenizer.pad_token_id, kind == "bert", start, packing=True)
    batch = layout.make(dataset, np.array(order))
    each = [tokenizer(TEXTS[i], seconds[i]) for i in order]
    wanted = {key: [number for one in each for number in one[key]] for key in each[0]}
    num_tokens = len(wanted["input_ids"])
    borders = np.cumsum([0, *(len(one["input_ids"]) for one in each)]).tolist()
    assert (batch.num_targets, batch.num_samples, batch.num_tokens) == (4, 4, num_tokens)
    assert batch.targets.tolist() == [0, 0, 1, 1] and batch.attention_mask is None and not layout.padded
    assert batch.input_ids.shape == (1, 64) and batch.input_ids[0, :num_tokens].tolist() == wanted["input_ids"]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [*borders, 64]
    # RoBERTa counts on from its padding token.
    positions = [start + place for one in each for place in range(len(one["input_ids"]))]
    assert batch.position_ids is not None and batch.position_ids[0, :num_tokens].tolist() == positions
    if kind == "bert":
        assert batch.token_type_ids is not None and batch.token_type_ids.shape == (1, 64)
        assert batch.token_type_ids[0, :num_tokens].tolist() == wanted["token_type_ids"]
    else:
        assert batch.token_type_ids is None
    bare = layout.without_filler().make(dataset, np.array(order))
    assert bare.input_ids.shape == (1, num_tokens) and bare.num_tokens == num_tokens


def test_pairs_are_what_the_collator_of_transformers_makes() -> None:
    tokenizer = make_tokenizer("t5")
    config = T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    config.decoder_start_token_id = tokenizer.pad_token_id
    answers = ["fine", "it was poor and dull", "great", "not"]
    renderer = PairRenderer(tokenizer)
    dataset = dataset_of(renderer, [chat(*pair) for pair in zip(TEXTS, answers, strict=True)])
    rows = [
        {"input_ids": tokenizer(t).input_ids, "labels": tokenizer(text_target=a).input_ids}
        for t, a in zip(TEXTS, answers, strict=True)
    ]
    wanted = DataCollatorForSeq2Seq(tokenizer, model=T5ForConditionalGeneration(config))(rows)
    batch = pairs(tokenizer.pad_token_id, tokenizer.pad_token_id).make(dataset, np.arange(4))
    assert torch.equal(batch.targets, wanted["labels"]) and batch.num_targets == int((wanted["labels"] != -100).sum())
    for key in ("input_ids", "attention_mask"):
        assert torch.equal(getattr(batch, key), wanted[key]), key
    # Where nothing is to be said, what the decoder reads does not matter.
    real = batch.targets != -100
    assert batch.decoder_input_ids is not None
    assert torch.equal(batch.decoder_input_ids[real], wanted["decoder_input_ids"][real])
    assert [source_length(dataset[i][1]) for i in range(4)] == [len(row["input_ids"]) for row in rows]


def test_batches_hold_every_sample_once_within_the_budget() -> None:
    tokenizer = make_tokenizer("bert")
    dataset = dataset_of(LabelRenderer(tokenizer), [text(t, str(i % 3)) for i, t in enumerate(TEXTS * 5)])
    batches = classes(0, True).batches(dataset, np.arange(20), 24)
    assert sum(batch.num_samples for batch in batches) == 20
    assert all(batch.input_ids.numel() <= 24 for batch in batches)
    assert not PACKED.padded and PACKED.batches(dataset, np.arange(20), 24)[0].attention_mask is None
    both = pair_batch(TokenizedDataset.from_samples([([5, 1, 6, 1], [-100, -100, 6, 1])]), [0], 0, 9)
    assert both.decoder_input_ids is not None and both.decoder_input_ids.tolist() == [[9, 6]]


def test_names_of_classes() -> None:
    assert class_names([text("x", label) for label in ("10", "9", "-1", "9")]) == ("-1", "9", "10")
    assert class_names([text("x", label) for label in ("b", "a", "10")]) == ("10", "a", "b")
    with pytest.raises(DataError, match=r"all have the label 'a'; a classifier needs at least two"):
        class_names([text("x", "a")] * 3)
    with pytest.raises(DataError, match="20 different labels in 20 rows are no classes"):
        class_names([text("x", str(index)) for index in range(20)])


def test_the_first_rows_name_the_classes_and_later_ones_may_not_add_any() -> None:
    tokenizer = make_tokenizer("bert")
    renderer = LabelRenderer(tokenizer, known=("no", "yes", "maybe"))
    dataset_of(renderer, [text("good", "yes"), text("bad", "no")])
    assert renderer.labels == ("no", "yes", "maybe"), "the base's own classes stand where they hold those of the rows"
    (refused,) = renderer.render_all([text("fine", "perhaps")])
    assert isinstance(refused, RowError) and "'perhaps' is none of the training rows'" in refused.reason
    other = LabelRenderer(tokenizer, known=("no", "yes"))
    dataset_of(other, [text("good", "1"), text("bad", "0")])
    assert other.labels == ("0", "1")


def test_long_texts_are_dropped_or_cut() -> None:
    tokenizer = make_tokenizer("bert")
    rows = [text(TEXTS[2], "a"), text("dull", "b")]
    long, short = LabelRenderer(tokenizer, max_length=5).render_all(rows)
    assert isinstance(long, RowError) and long.rule == "too_long" and not isinstance(short, RowError)
    cut, _ = LabelRenderer(tokenizer, max_length=5, too_long="truncate").render_all(rows)
    assert not isinstance(cut, RowError)
    assert cut[0].tolist() == tokenizer(TEXTS[2], truncation=True, max_length=5).input_ids


def test_a_source_is_cut_for_its_target() -> None:
    tokenizer = make_tokenizer("t5")
    example = chat(TEXTS[2], "it was fine")
    (dropped,) = PairRenderer(tokenizer, max_length=8).render_all([example])
    assert isinstance(dropped, RowError) and dropped.rule == "too_long"
    (cut,) = PairRenderer(tokenizer, max_length=8, too_long="truncate").render_all([example])
    assert not isinstance(cut, RowError)
    source, end = tokenizer(TEXTS[2]).input_ids, tokenizer.eos_token_id
    assert cut[0].tolist() == [*source[:3], end, *tokenizer("it was fine").input_ids]
    (none,) = PairRenderer(tokenizer, max_length=4, too_long="truncate").render_all([example])
    assert isinstance(none, RowError) and "no source is left" in none.reason


def test_history_and_templates_of_sources() -> None:
    tokenizer = make_tokenizer("t5")
    example = chat("what is it", "a film", "good", "not bad")
    plain = PairRenderer(tokenizer)
    assert plain.prompt_ids(example) == tokenizer("what is it\na film\ngood").input_ids and plain.template is None
    assert plain.reference(example) == "not bad" and plain.stop_ids == (tokenizer.eos_token_id,)
    assert plain.chat_prompt_ids(example.messages[:3]) == plain.prompt_ids(example)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} plus {% endfor %}"
    templated = PairRenderer(tokenizer)
    wanted = tokenizer("what is it plus a film plus good plus", add_special_tokens=False).input_ids
    assert templated.prompt_ids(example) == wanted and templated.template == tokenizer.chat_template
    for bare, reason in ((text("dull"), "no answer to write"), (chat(), "no answer")):
        (refused,) = plain.render_all([bare])
        assert isinstance(refused, RowError) and reason in refused.reason
