"""Tokens and labels against masks built by hand, piece by piece, for templates of several kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorica.data.check import preview
from lorica.data.render import Renderer, build_dataset, load_dataset
from lorica.data.rows import Example, Message, RowError
from lorica.data.sources import load_examples
from lorica.errors import DataError

from .templates import TEMPLATES, make_tokenizer

Piece = tuple[str, bool]


def example(*pairs: tuple[str, str] | Message, tools: Any = (), origin: str = "rows.jsonl:1") -> Example:
    messages = tuple(pair if isinstance(pair, Message) else Message(*pair) for pair in pairs)
    return Example(messages, None, tools, (), None, origin)


def text_example(text: str) -> Example:
    return Example((), text, (), (), None, "rows.jsonl:1")


def by_hand(tokenizer: Any, pieces: list[Piece], *, bos: bool = False) -> tuple[list[int], list[int]]:
    """Ids and labels of pieces tokenised one by one; a piece begins and ends where the whole is cut anyway."""
    ids = [tokenizer.bos_token_id] if bos else []
    labels = [-100] if bos else []
    for text, trained in pieces:
        piece = tokenizer(text, add_special_tokens=False).input_ids
        ids += piece
        labels += piece if trained else [-100] * len(piece)
    return ids, labels


def assert_rendered(renderer: Renderer, row: Example, pieces: list[Piece], *, bos: bool = False) -> None:
    tokenized = renderer.render(row)
    ids, labels = by_hand(renderer.tokenizer, pieces, bos=bos)
    assert tokenized.input_ids == ids
    assert tokenized.labels == labels


THREE = (
    ("system", "Be brief."),
    ("user", "One?"),
    ("assistant", "First 一。"),
    ("user", "Two?"),
    ("assistant", "Second."),
)


@pytest.mark.parametrize("loss_on", ["response", "assistant", "all"])
def test_chatml(base: Path, loss_on: str) -> None:
    every, first = loss_on == "all", loss_on in ("assistant", "all")
    pieces = [
        ("<|im_start|>", False),
        ("system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", every),
        ("First 一。<|im_end|>", first),
        ("\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n", every),
        ("Second.<|im_end|>", True),
        ("\n", every),
    ]
    renderer = Renderer(make_tokenizer(base, TEMPLATES["chatml"]), loss_on=loss_on)
    assert_rendered(renderer, example(*THREE), pieces)


@pytest.mark.parametrize("loss_on", ["response", "assistant"])
def test_headers_with_a_start_token(base: Path, loss_on: str) -> None:
    tokenizer = make_tokenizer(base, TEMPLATES["headers"], bos=True)

    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    pieces = [
        (header("system") + "Be brief.<|eot_id|>" + header("user") + "One?<|eot_id|>" + header("assistant"), False),
        ("First 一。<|eot_id|>", loss_on == "assistant"),
        (header("user") + "Two?<|eot_id|>" + header("assistant"), False),
        ("Second.<|eot_id|>", True),
    ]
    if loss_on == "response":
        pieces = [("".join(text for text, _ in pieces[:-1]), False), pieces[-1]]
    renderer = Renderer(tokenizer, loss_on=loss_on)
    assert_rendered(renderer, example(*THREE), pieces, bos=True)
    spaced = [Message(role, f"  {content} \n") for role, content in THREE]
    assert_rendered(renderer, example(*spaced), pieces, bos=True)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert renderer.stop_ids == tuple(sorted([eot, tokenizer.eos_token_id]))


@pytest.mark.parametrize("loss_on", ["response", "assistant"])
def test_thinking_is_stripped_from_history_and_learned_at_the_end(base: Path, loss_on: str) -> None:
    row = example(
        ("user", "One?"),
        ("assistant", "<think>\nhm\n</think>\n\nFirst."),
        ("user", "Two?"),
        ("assistant", "<think>\nso\n</think>\n\nSecond."),
    )
    pieces = [
        ("<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", False),
        ("First.<|im_end|>", loss_on == "assistant"),
        ("\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\nso\n</think>\n\nSecond.<|im_end|>", True),
        ("\n", False),
    ]
    renderer = Renderer(make_tokenizer(base, TEMPLATES["thinking"]), loss_on=loss_on)
    assert_rendered(renderer, row, pieces)


def test_a_generation_prompt_that_history_does_not_have(base: Path) -> None:
    row = example(
        ("user", "One?"), ("assistant", "<think>\nhm\n</think>\n\nFirst."), ("user", "Two?"), ("assistant", "B.")
    )
    pieces = [
        ("<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n", False),
        ("First.<|im_end|>", True),
        ("\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n", False),
        ("B.<|im_end|>", True),
        ("\n", False),
    ]
    assert_rendered(Renderer(make_tokenizer(base, TEMPLATES["forced"]), loss_on="assistant"), row, pieces)


def test_a_template_that_refuses_system_turns_gets_them_in_the_users(base: Path) -> None:
    pieces = [
        ("<|im_start|>user\nBe brief.\n\nOne?<|im_end|>\n<|im_start|>model\n", False),
        ("First 一。<|im_end|>", True),
        ("\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>model\n", False),
        ("Second.<|im_end|>", True),
        ("\n", False),
    ]
    renderer = Renderer(make_tokenizer(base, TEMPLATES["strict"]), loss_on="assistant")
    ids, labels = by_hand(renderer.tokenizer, pieces)
    tokenized = renderer.render(example(*THREE))
    assert tokenized.input_ids == [renderer.tokenizer.bos_token_id, *ids]
    assert tokenized.labels == [-100, *labels]
    with pytest.raises(RowError, match="Roles must alternate"):
        renderer.render(example(("user", "a"), ("user", "b"), ("assistant", "c")))


def test_a_template_without_prompt_and_end_gets_both(base: Path) -> None:
    renderer = Renderer(make_tokenizer(base, TEMPLATES["bare"]), loss_on="assistant")
    pieces = [
        ("SYSTEM: Be brief.\nUSER: One?\nASSISTANT: ", False),
        ("First 一。", True),
        ("\nUSER: Two?\nASSISTANT: ", False),
        ("Second.<|im_end|>", True),
    ]
    assert_rendered(renderer, example(*THREE), pieces)
    prompt = renderer.tokenizer("USER: Two?\nASSISTANT: ", add_special_tokens=False).input_ids
    assert renderer.chat_prompt_ids([Message("user", "Two?")]) == prompt


def test_an_untraceable_template_is_refused(base: Path) -> None:
    twice = "{% for m in messages %}{{ m.content + m.content }}{% endfor %}"
    twice += "{% if add_generation_prompt %}{{ 'now' }}{% endif %}"
    with pytest.raises(RowError, match=r"rewrites turn 2 \(assistant\)"):
        Renderer(make_tokenizer(base, twice)).render(example(("user", "q"), ("assistant", "a")))
    silent = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}"
    with pytest.raises(RowError, match=r"does not show turn 1 \(user\)"):
        Renderer(make_tokenizer(base, silent)).render(example(("user", "q"), ("assistant", "a")))


# What is trained begins where generation begins.


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answer", ["Second.", "\nA line.", "  indented", "中文。", "<think>\nx\n</think>\n\ny"])
def test_the_prompt_is_what_precedes_the_trained_tokens(base: Path, name: str, answer: str) -> None:
    renderer = Renderer(make_tokenizer(base, TEMPLATES[name], bos=True))
    row = example(("user", "One?"), ("assistant", "First."), ("user", "Two?"), ("assistant", answer))
    tokenized = renderer.render(row)
    first = next(index for index, label in enumerate(tokenized.labels) if label != -100)
    assert renderer.prompt_ids(row) == tokenized.input_ids[:first]
    if name != "forced":
        assert renderer.chat_prompt_ids(row.messages[:-1]) == tokenized.input_ids[:first]
    trained = renderer.tokenizer.decode([label for label in tokenized.labels if label != -100])
    expected = answer.strip() if name in ("headers", "strict") else answer
    assert expected.split("</think>")[-1].strip() in trained
    assert renderer.reference(row) == answer


def test_own_loss_weights_override(base: Path) -> None:
    tokenizer = make_tokenizer(base, TEMPLATES["chatml"])
    row = example(
        Message("user", "One?", train=True),
        Message("assistant", "First.", train=True),
        Message("user", "Two?"),
        Message("assistant", "Second.", train=False),
    )
    pieces = [
        ("<|im_start|>user\n", False),
        ("One?<|im_end|>", True),
        ("\n<|im_start|>assistant\n", False),
        ("First.<|im_end|>", True),
        ("\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\nSecond.<|im_end|>\n", False),
    ]
    for loss_on in ("response", "assistant"):
        assert_rendered(Renderer(tokenizer, loss_on=loss_on), row, pieces)
    with pytest.raises(RowError, match="every loss weight is 0"):
        Renderer(tokenizer).render(example(("user", "q"), Message("assistant", "a", train=False)))


# Start and end tokens


@pytest.mark.parametrize("name", ["headers", "chatml"])
def test_exactly_one_start_token(base: Path, name: str) -> None:
    tokenizer = make_tokenizer(base, TEMPLATES[name], bos=True)
    renderer = Renderer(tokenizer)
    row = example(("user", "q"), ("assistant", "a"))
    for ids in (
        renderer.render(row).input_ids,
        renderer.prompt_ids(row),
        renderer.chat_prompt_ids(row.messages[:1]),
        renderer.render(text_example("some text")).input_ids,
        renderer.render(text_example("<|endoftext|>some text")).input_ids,
    ):
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_no_start_token_where_the_tokenizer_adds_none(base: Path) -> None:
    tokenizer = make_tokenizer(base, TEMPLATES["chatml"])
    renderer = Renderer(tokenizer)
    row = example(("user", "q"), ("assistant", "a"))
    assert tokenizer.bos_token_id not in renderer.render(row).input_ids
    assert tokenizer.bos_token_id not in renderer.prompt_ids(row)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_is_learned_even_when_it_pads(base: Path, name: str) -> None:
    tokenizer = make_tokenizer(base, TEMPLATES[name])
    tokenizer.pad_token = tokenizer.eos_token
    renderer = Renderer(tokenizer)
    labels = renderer.render(example(("user", "q"), ("assistant", "a"))).labels
    last = [label for label in labels if label != -100][-1]
    assert last in renderer.stop_ids
    assert last == (tokenizer.convert_tokens_to_ids("<|eot_id|>") if name == "headers" else tokenizer.eos_token_id)


def test_plain_text_is_trained_whole_and_ended(base: Path) -> None:
    tokenizer = make_tokenizer(base, TEMPLATES["chatml"])
    for loss_on in ("response", "all"):
        tokenized = Renderer(tokenizer, loss_on=loss_on).render(text_example("Some text.\n"))
        ids = [*tokenizer("Some text.\n").input_ids, tokenizer.eos_token_id]
        assert tokenized.input_ids == ids and tokenized.labels == [-100, *ids[1:]]
    with pytest.raises(RowError, match="no prompt"):
        Renderer(tokenizer).prompt_ids(text_example("a"))


# Tools


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "é"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
WITH_TOOLS = example(
    ("user", "q"),
    Message("assistant", "", tool_calls=(CALL,)),
    ("tool", "2"),
    ("assistant", "a"),
    tools=(TOOL,),
)


def test_tools_go_structured_to_a_template_that_reads_them(base: Path) -> None:
    renderer = Renderer(make_tokenizer(base, TEMPLATES["thinking"]), loss_on="assistant")
    pieces = [
        (f"<|im_start|>system\n# Tools\n{json.dumps(TOOL)}\n<|im_end|>\n<|im_start|>user\nq<|im_end|>\n", False),
        ("<|im_start|>assistant\n", False),
        ('<think>\n\n</think>\n\n\n<tool_call>{"name": "f", "arguments": {"x": "é"}}</tool_call><|im_end|>', True),
        ("\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n", False),
        ("<think>\n\n</think>\n\na<|im_end|>", True),
        ("\n", False),
    ]
    assert_rendered(renderer, WITH_TOOLS, pieces)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_tools_go_as_json_to_a_template_that_does_not(base: Path, system: str | None) -> None:
    renderer = Renderer(make_tokenizer(base, TEMPLATES["chatml"]), loss_on="assistant")
    first = [Message("system", system)] if system else []
    row = example(*first, *WITH_TOOLS.messages, tools=(TOOL,))
    tokenized = renderer.render(row)
    text = renderer.tokenizer.decode(tokenized.input_ids)
    trained = renderer.tokenizer.decode([label for label in tokenized.labels if label != -100])
    assert text.startswith("<|im_start|>system\n" + (f"{system}\n\n" if system else ""))
    assert '{"name": "f", "parameters": {}}<|im_end|>' in text and text.count("<|im_start|>system") == 1
    assert trained == '{"name": "f", "arguments": {"x": "é"}}<|im_end|>a<|im_end|>'
    assert (
        renderer.reference(example(("user", "q"), WITH_TOOLS.messages[1])) == '{"name": "f", "arguments": {"x": "é"}}'
    )


# Length


def test_too_long_rows(base: Path) -> None:
    tokenizer = make_tokenizer(base, TEMPLATES["chatml"])
    row = example(("user", "word " * 20), ("assistant", "answer " * 20))
    whole = Renderer(tokenizer).render(row)
    size = len(whole.input_ids)
    assert Renderer(tokenizer, max_length=size).render(row) == whole
    with pytest.raises(RowError, match=rf"{size} tokens; data\.max_length is {size - 1}"):
        Renderer(tokenizer, max_length=size - 1).render(row)
    cut = Renderer(tokenizer, max_length=size - 5, too_long="truncate").render(row)
    assert (cut.input_ids, cut.labels) == (whole.input_ids[: size - 5], whole.labels[: size - 5])
    with pytest.raises(RowError, match="no answer is left"):
        Renderer(tokenizer, max_length=10, too_long="truncate").render(row)


def test_build_dataset_counts_what_it_leaves_out(base: Path) -> None:
    tokenizer = make_tokenizer(base, TEMPLATES["chatml"])
    rows = [
        example(("user", "q"), ("assistant", "a"), origin="r:1"),
        example(("user", "q"), ("assistant", "word " * 90), origin="r:2"),
        example(("user", "q"), Message("assistant", "a", train=False), origin="r:3"),
        example(("user", "q"), ("assistant", "b"), origin="r:4"),
    ]
    renderer = Renderer(tokenizer, max_length=60)
    dataset, faults = build_dataset(rows, renderer)
    assert [(fault.origin, fault.rule) for fault in faults] == [("r:2", "too_long"), ("r:3", "untrained")]
    for index, row in enumerate((rows[0], rows[3])):
        tokenized = renderer.render(row)
        assert dataset[index][0].tolist() == tokenized.input_ids and dataset[index][1].tolist() == tokenized.labels
    assert dataset.input_ids.dtype == dataset.labels.dtype == np.int32 and dataset.offsets.dtype == np.int64
    with pytest.raises(DataError, match=r"1 of 4 rows are too long[\s\S]*r:2[\s\S]*data\.max_length"):
        build_dataset(rows, Renderer(tokenizer, max_length=60, too_long="error"))


def test_nothing_left_is_an_error_that_names_rows_and_reasons(base: Path) -> None:
    tokenizer = make_tokenizer(base, TEMPLATES["chatml"])
    long = [example(("user", "q"), ("assistant", "word " * 90), origin=f"r:{i}") for i in range(3)]
    with pytest.raises(DataError, match=r"no row is left[\s\S]*3 too_long[\s\S]*r:0") as error:
        build_dataset(long, Renderer(tokenizer, max_length=20))
    assert error.value.exit_code == 3
    masked = [example(("user", "q"), Message("assistant", "a", train=False), origin=f"r:{i}") for i in range(3)]
    with pytest.raises(DataError, match=r"3 untrained[\s\S]*r:0: no turn is trained"):
        build_dataset(masked, Renderer(tokenizer))


def test_load_dataset_names_every_fault_at_once(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    weightless = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]}
    good = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path.write_text("\n".join([json.dumps(good), "{broken", json.dumps(weightless), json.dumps(good)]))
    renderer = Renderer(make_tokenizer(base, TEMPLATES["chatml"]))
    with pytest.raises(DataError, match=r"2 of 4 rows[\s\S]*rows\.jsonl:2: [\s\S]*rows\.jsonl:3: "):
        load_dataset(path, renderer)
    prepared = load_dataset(path, renderer, on_bad_row="drop")
    assert [row.origin for row in prepared.examples] == ["rows.jsonl:1", "rows.jsonl:4"]
    assert len(prepared.dataset) == 2 and len(prepared.faults) == 2 and prepared.num_rows == 4


# Tokenizers without offsets


class NoOffsets:
    """A tokenizer like another one, but without offsets."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.is_fast = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, text: str, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self.inner(text, **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("loss_on", ["response", "assistant", "all"])
def test_a_tokenizer_without_offsets_gives_the_same(base: Path, name: str, loss_on: str) -> None:
    tokenizer = make_tokenizer(base, TEMPLATES[name], bos=True)
    slow: Any = NoOffsets(tokenizer)
    row = example(*THREE)
    assert Renderer(slow, loss_on=loss_on).render(row) == Renderer(tokenizer, loss_on=loss_on).render(row)


@pytest.fixture(scope="module")
def blank_first() -> Any:
    """A tokenizer in SentencePiece's manner: every text begins with a blank of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    corpus = ["Be brief. One? First answer here. Two? Second answer there. system user assistant\n"] * 4
    inner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


@pytest.mark.parametrize("loss_on", ["response", "assistant"])
def test_offsets_mark_the_tokens_of_a_tokenizer_that_cannot_take_pieces(blank_first: Any, loss_on: str) -> None:
    renderer = Renderer(blank_first, loss_on=loss_on, template="chatml")
    row = example(
        ("user", "One?"), ("assistant", "First answer here."), ("user", "Two?"), ("assistant", "Second answer.")
    )
    tokenized = renderer.render(row)
    text = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nFirst answer here.<|im_end|>\n"
    text += "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\nSecond answer.<|im_end|>\n"
    assert tokenized.input_ids == blank_first(text, add_special_tokens=False).input_ids
    expected = ["First answer here.<|im_end|>"] if loss_on == "assistant" else []
    trained = [segment.text for segment in preview(as_sample(tokenized), blank_first) if segment.trained]
    assert trained == [*expected, "Second answer.<|im_end|>"]


def as_sample(tokenized: Any) -> Any:
    return np.array(tokenized.input_ids), np.array(tokenized.labels)


def test_a_token_never_straddles_prompt_and_answer(base: Path) -> None:
    tokenizer = make_tokenizer(base, TEMPLATES["chatml"])
    renderer = Renderer(tokenizer, template="plain")
    row = example(("user", "q"), ("assistant", "\n\n  deep"))
    assert_rendered(renderer, row, [("q\n", False), ("\n\n  deep<|im_end|>", True), ("\n", False)])


# Real rows


@pytest.mark.parametrize("name", ["formats/glaive_toolcall_en_demo.json", "formats/alpaca_zh_demo.json"])
@pytest.mark.parametrize("template", ["chatml", "headers", "thinking"])
def test_real_rows_train_the_assistants_words_alone(base: Path, shared: Path, name: str, template: str) -> None:
    rows = load_examples(shared / "data" / name, limit=40).examples
    renderer = Renderer(make_tokenizer(base, TEMPLATES[template]), loss_on="assistant", max_length=100_000)
    dataset, faults = build_dataset(rows, renderer)
    assert faults == []
    for index, row in enumerate(rows):
        segments = preview(dataset[index], renderer.tokenizer)
        trained = [segment.text for segment in segments if segment.trained]
        answers = [message for message in row.messages if message.role == "assistant"]
        assert len(trained) == len(answers)
        for text, message in zip(trained, answers, strict=True):
            assert text.endswith(("<|im_end|>", "<|eot_id|>")) and message.content.strip() in text
        seen = "".join(segment.text for segment in segments if not segment.trained)
        assert all(message.content.strip() in seen for message in row.messages if message.role in ("user", "tool"))
        assert all(tool["function"]["name"] in seen for tool in row.tools)
