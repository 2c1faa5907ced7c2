"""`lorica generate` and `lorica chat` on the embedded base."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorica.errors import ConfigError, DataError
from lorica.evaluate.generation import generate as generate_ids
from lorica.quant.linear import format_of
from lorica.recipes import generate as recipe
from lorica.recipes.generate import Answer, chat, generate
from lorica.recipes.opening import open_model

TURN = "<|im_start|>{}\n{}<|im_end|>\n"
ASK = "<|im_start|>assistant\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def opened() -> tuple[Any, Any, Any]:
    return open_model("embedded")


@pytest.fixture(autouse=True)
def _open_once(opened: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "open_model", lambda *_, **__: opened)


def by_hand(opened: tuple[Any, Any, Any], text: str, num: int) -> str:
    model, tokenizer, renderer = opened
    ids = generate_ids(
        model, tokenizer, [tokenizer(text).input_ids], max_new_tokens=num, stop_ids=renderer.stop_ids, batch_size=1
    )
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def test_one_prompt_gives_plain_text(opened: tuple[Any, Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    answers = generate("embedded", prompt="Who lives in the forest?", max_new_tokens=8)
    expected = by_hand(opened, TURN.format("user", "Who lives in the forest?") + ASK, 8)
    assert expected
    assert answers == [Answer("Who lives in the forest?", expected)]
    assert capsys.readouterr().out == expected + "\n"


def test_the_head_may_be_quantised(opened: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, *rest = opened
    other = copy.deepcopy(model)
    monkeypatch.setattr(recipe, "open_model", lambda *_, **__: (other, *rest))
    (answer,) = generate("embedded", prompt="Who lives in the forest?", max_new_tokens=4, quant_head="int8")
    assert format_of(other) == "int8" and format_of(model) is None
    assert answer.response == by_hand((other, *rest), TURN.format("user", "Who lives in the forest?") + ASK, 4)


def test_stdin_is_one_prompt(opened: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("two\nlines\n"))
    (answer,) = generate("embedded", max_new_tokens=4)
    assert answer == Answer("two\nlines", by_hand(opened, TURN.format("user", "two\nlines") + ASK, 4))


def test_on_a_terminal_the_answer_is_streamed(opened: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    (answer,) = generate("embedded", prompt="Once", max_new_tokens=8)
    assert screen.getvalue() == answer.response + "\n"
    assert answer.response == by_hand(opened, TURN.format("user", "Once") + ASK, 8)


def test_a_file_of_rows(opened: tuple[Any, Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "the reference, which is not shown to the model"},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        "\n\n".join(map(json.dumps, ({"prompt": "A long first question about the forest"}, {"messages": turns}))),
        encoding="utf-8",
    )
    answers = generate("embedded", input=file, max_new_tokens=5)
    texts = [
        TURN.format("user", "A long first question about the forest") + ASK,
        TURN.format("system", "Be brief.") + TURN.format("user", "Hello?") + ASK,
    ]
    assert [answer.prompt for answer in answers] == ["A long first question about the forest", "Hello?"]
    assert [answer.response for answer in answers] == [by_hand(opened, text, 5) for text in texts]
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [{"prompt": answer.prompt, "response": answer.response} for answer in answers]


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufefffirst\r\n\n  second \n", encoding="utf-8")
    assert [answer.prompt for answer in generate("embedded", input=file, max_new_tokens=2)] == ["first", "second"]


def test_bad_prompts_are_all_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "fine"}', '{"question": "x"}', '{"prompt": null, "messages": []}', "{broken"]
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        generate("embedded", input=file)
    message = str(caught.value)
    assert message.startswith("3 prompts cannot be used")
    for part in ("prompts.jsonl:2: neither prompt nor messages, but question", "prompts.jsonl:3:", "prompts.jsonl:4:"):
        assert part in message


def test_a_prompt_that_is_too_long_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("short\n" + "long " * 2100, encoding="utf-8")
    with pytest.raises(DataError, match=r"prompts.txt:2 has \d+ tokens. Shorten the prompt\.$"):
        generate("embedded", input=file)


def test_the_usual_length_shrinks_to_what_fits_and_an_asked_one_does_not(
    opened: tuple[Any, Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The context is 2048; a short prompt beside a long one gets what it gets alone."""
    monkeypatch.setattr(recipe, "MAX_NEW_TOKENS", 20)
    long, short = "long " * 2020, "Who lives in the forest?"
    prompts = [TURN.format("user", text.strip()) + ASK for text in (long, short)]
    left = 2048 - len(opened[1](prompts[0]).input_ids)
    assert 0 < left < 20
    file = tmp_path / "prompts.txt"
    file.write_text(f"{long}\n{short}", encoding="utf-8")
    answers = generate("embedded", input=file)
    expected = [by_hand(opened, prompt, room) for prompt, room in zip(prompts, (left, 20), strict=True)]
    assert [answer.response for answer in answers] == expected
    assert f"leaves 1 of 2 answers less room than the usual 20 tokens, the shortest {left}." in capsys.readouterr().err
    with pytest.raises(
        DataError, match=r"room for 20 more in .* prompts.txt:1 has \d+ tokens. Shorten .* or lower max"
    ):
        generate("embedded", input=file, max_new_tokens=20)


def test_no_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", Terminal())
    with pytest.raises(ConfigError, match="no prompt"):
        generate("embedded")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ConfigError, match="no prompt"):
        generate("embedded")
    with pytest.raises(ConfigError, match="not both"):
        generate("embedded", prompt="a", input=tmp_path)
    with pytest.raises(DataError, match="no such file"):
        generate("embedded", input=tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match="the prompt is empty"):
        generate("embedded", prompt="  ")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="holds no prompts"):
        generate("embedded", input=tmp_path / "empty.txt")
    (tmp_path / "prompts.docx").touch()
    with pytest.raises(DataError, match=r"end in \.txt, \.jsonl"):
        generate("embedded", input=tmp_path / "prompts.docx")


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """What a person types; an exception class stands for Ctrl-C or Ctrl-D."""
    waiting: Iterator[str | type[BaseException]] = iter(lines)

    def answer(_: str = "") -> str:
        line = next(waiting)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)


def test_a_chat_remembers_and_forgets(opened: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    typed(monkeypatch, "Hello", "", "And you?", "/nonsense", "/reset", "Hello", "/exit", "never read")
    answers = chat("embedded", max_new_tokens=5)
    first = TURN.format("user", "Hello")
    one = by_hand(opened, first + ASK, 5)
    two = by_hand(opened, first + TURN.format("assistant", one) + TURN.format("user", "And you?") + ASK, 5)
    assert answers == [Answer("Hello", one), Answer("And you?", two), Answer("Hello", one)]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_a_chat_ends_quietly(monkeypatch: pytest.MonkeyPatch, end: type[BaseException]) -> None:
    typed(monkeypatch, end)
    assert chat("embedded") == []


def test_an_answer_can_be_cut_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = recipe.stream

    def interrupted(*args: Any, **how: Any) -> Iterator[str]:
        pieces = whole(*args, **how)
        yield next(pieces)
        pieces.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "stream", interrupted)
    typed(monkeypatch, "Hello", "/exit")
    assert chat("embedded", max_new_tokens=50) == []
    out, err = capsys.readouterr()
    assert "cut short" in err and out.endswith("\n")


def test_a_full_context_drops_the_oldest_turns(
    opened: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "context_length", lambda model: 60)
    typed(monkeypatch, "one " * 12, "two " * 12, "three " * 80, "/exit")
    answers = chat("embedded", max_new_tokens=20)
    alone = by_hand(opened, TURN.format("user", ("two " * 12).strip()) + ASK, 20)
    assert [answer.response for answer in answers][1:] == [alone]
    notes = capsys.readouterr().err
    assert "the oldest 2 turns are forgotten" in notes
    assert "more than the model's context of 60" in notes


def test_a_long_message_gets_a_shorter_answer(opened: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    text = TURN.format("user", ("two " * 12).strip()) + ASK
    monkeypatch.setattr(recipe, "context_length", lambda model: len(opened[1](text).input_ids) + 3)
    typed(monkeypatch, "one " * 8, "two " * 12, "/exit")
    assert chat("embedded")[1].response == by_hand(opened, text, 3)
