"""Reading rows: every format and file kind, and what is said of everything that is broken."""

from __future__ import annotations

import gzip
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorica.data.rows import Example, Message
from lorica.data.sources import FORMATS, load_examples, refuse_faults
from lorica.errors import DataError


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_bytes(b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows))
    return path


def turns(example: Example) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in example.messages]


ASKED = [("user", "q"), ("assistant", "a")]


def said(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


# The formats


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", ASKED),
        ({"instruction": "q", "output": "a"}, "alpaca", ASKED),
        ({"instruction": "q", "input": "more", "output": "a"}, "alpaca", [("user", "q\nmore"), ("assistant", "a")]),
        ({"instruction": "q", "context": "more", "response": "a"}, "alpaca", [("user", "q\nmore"), ("assistant", "a")]),
        (
            {"instruction": "q", "output": "a", "system": "s", "history": [["q0", "a0"]]},
            "alpaca",
            [("system", "s"), ("user", "q0"), ("assistant", "a0"), *ASKED],
        ),
        ({"instruction": "q", "input": "", "output": "a", "text": "q a"}, "alpaca", ASKED),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", ASKED),
        ({"conversations": said(*ASKED)}, "messages", ASKED),
        ({"messages": said(("system", "s"), *ASKED)}, "messages", [("system", "s"), *ASKED]),
        ({"messages": said(("developer", "s"), *ASKED)}, "messages", [("system", "s"), *ASKED]),
        ({"messages": said(("user", "q"), ("model", "a"))}, "messages", ASKED),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, *said(("assistant", "a"))]},
            "messages",
            ASKED,
        ),
        ({"prompt": "q", "response": "a"}, "prompt_response", ASKED),
        ({"prompt": "q", "completion": "a"}, "prompt_response", ASKED),
        ({"question": "q", "answer": "a"}, "prompt_response", ASKED),
        ({"input": "q", "output": "a"}, "prompt_response", ASKED),
        ({"query": "q", "response": "a", "system": "s"}, "prompt_response", [("system", "s"), *ASKED]),
        ({"prompt": "q", "references": ["a", "b"]}, "prompt_response", ASKED),
    ],
)
def test_formats_are_recognised_and_read(tmp_path: Path, row: Any, format: str, expected: Any) -> None:
    loaded = load_examples(write_lines(tmp_path / "rows.jsonl", [row]))
    assert (loaded.format, loaded.faults, loaded.num_rows) == (format, [], 1)
    assert turns(loaded.examples[0]) == expected
    assert loaded.examples[0].origin == "rows.jsonl:1"
    assert format in FORMATS


@pytest.mark.parametrize("column", ["text", "content"])
def test_plain_text(tmp_path: Path, column: str) -> None:
    loaded = load_examples(write_lines(tmp_path / "rows.jsonl", [{column: "some text", "source": 3}]))
    assert loaded.format == "text" and loaded.examples[0].text == "some text" and loaded.examples[0].messages == ()
    assert loaded.unused == ("source",)


def test_references_and_task_are_kept(tmp_path: Path) -> None:
    row = {"prompt": "q", "references": ["a", "b"], "task": "t1"}
    example = load_examples(write_lines(tmp_path / "rows.jsonl", [row])).examples[0]
    assert example.references == ("a", "b") and example.task == "t1"
    assert example.messages[-1].content == "a"


def test_loss_weights_say_what_is_trained(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "q", "loss_weight": 0.0},
            {"role": "assistant", "content": "a", "loss_weight": 1.0},
            {"role": "assistant", "content": "b", "weight": 0},
            {"role": "assistant", "content": "c"},
        ]
    }
    example = load_examples(write_lines(tmp_path / "rows.jsonl", [row])).examples[0]
    assert [message.train for message in example.messages] == [False, True, False, None]


def test_tools_and_calls_of_both_worlds_become_the_same(tmp_path: Path) -> None:
    tool = {"name": "f", "parameters": {"type": "object"}}
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": json.dumps([tool]),
    }
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    openai = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": [{"type": "function", "function": tool}],
    }
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first = load_examples(write_lines(tmp_path / "a" / "rows.jsonl", [sharegpt])).examples[0]
    second = load_examples(write_lines(tmp_path / "b" / "rows.jsonl", [openai])).examples[0]
    assert first == second
    assert first.tools == ({"type": "function", "function": tool},)
    assert first.messages[1].tool_calls == (
        {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
    )  # fmt: skip


def test_reasoning_is_kept_in_think_tags(tmp_path: Path) -> None:
    row = {"messages": [*said(("user", "q")), {"role": "assistant", "content": "a", "reasoning_content": "because"}]}
    example = load_examples(write_lines(tmp_path / "rows.jsonl", [row])).examples[0]
    assert example.messages[-1].content == "<think>\nbecause\n</think>\n\na"


# Columns


def test_columns_can_be_mapped(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"ask": "q", "tell": "a", "response": "wrong"}])
    loaded = load_examples(path, columns={"prompt": "ask", "response": "tell"})
    assert turns(loaded.examples[0]) == ASKED
    assert loaded.columns == {"prompt": "ask", "response": "tell"} and loaded.unused == ("response",)


def test_mapping_errors_come_together_with_suggestions(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a"}])
    with pytest.raises(DataError) as error:
        load_examples(path, columns={"promt": "question", "response": "anwser"})
    text = str(error.value)
    assert "promt" in text and "'prompt'" in text and "'answer'" in text and "question, answer" in text


def test_unknown_columns_name_what_was_found_and_what_is_wanted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"alpha": "q", "beta": "a"}])
    with pytest.raises(DataError) as error:
        load_examples(path)
    text = str(error.value)
    assert "alpha, beta" in text and "data.columns={prompt: alpha, response: beta}" in text
    assert all(name in text for name in FORMATS)


@pytest.mark.parametrize(
    ("format", "example"),
    [
        ("alpaca", "{instruction: alpha, output: beta}"),
        ("messages", "{messages: alpha}"),
        ("prompt_response", "{prompt: alpha, response: beta}"),
        ("text", "{text: alpha}"),
    ],
)
def test_the_example_has_the_columns_of_the_format_that_was_named(tmp_path: Path, format: str, example: str) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"alpha": "q", "beta": "a"}])
    with pytest.raises(DataError) as error:
        load_examples(path, format=format)
    assert f"for example data.columns={example}." in str(error.value)


def test_ambiguous_columns_are_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"question": "q", "query": "q2", "answer": "a"}])
    with pytest.raises(DataError, match=r"question, query.*data\.columns"):
        load_examples(path)
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a", "messages": said(*ASKED)}])
    with pytest.raises(DataError, match=r"messages, prompt_response.*data\.format"):
        load_examples(path)
    assert load_examples(path, format="messages").format == "messages"


def test_bad_explicit_format(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}])
    with pytest.raises(DataError, match="did you mean 'alpaca'"):
        load_examples(path, format="alpacca")
    with pytest.raises(DataError, match="sharegpt: conversations"):
        load_examples(path, format="sharegpt")


def test_preference_pairs_are_refused_by_name_and_usable_by_mapping(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match=r"preference pairs.*response: chosen"):
        load_examples(path)
    assert turns(load_examples(path, columns={"response": "chosen"}).examples[0]) == ASKED
    whole = write_lines(tmp_path / "whole.jsonl", [{"chosen": said(*ASKED), "rejected": said(*ASKED)}])
    assert turns(load_examples(whole, columns={"messages": "chosen"}).examples[0]) == ASKED


# Files


def test_bom_crlf_blank_lines_and_a_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"prompt": "q", "response": "a"}\r\n\r\n   \n{"prompt": "\xe4\xb8\xad", "response": "a"}'
    )
    loaded = load_examples(path)
    assert [example.origin for example in loaded.examples] == ["rows.jsonl:1", "rows.jsonl:4"]
    assert loaded.examples[1].messages[0].content == "中" and loaded.num_rows == 2


def test_json_list_and_json_lines_under_a_json_name(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": "a"}, {"prompt": "q", "response": None}]
    path = tmp_path / "rows.json"
    path.write_text("\ufeff" + json.dumps(rows), encoding="utf-8")
    loaded = load_examples(path)
    assert [example.origin for example in loaded.examples] == ["rows.json:0"]
    assert [fault.origin for fault in loaded.faults] == ["rows.json:1"]
    assert load_examples(write_lines(path, rows)).faults[0].origin == "rows.json:2"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"prompt": "q",\n  "response" "a"}]', r"rows\.json:2:14"),
        (b'{"data": 1}', "holds an object"),
        (b'"text"', "holds a text"),
        (b'[{"a": "\xff"}]', "not UTF-8: byte 0xff"),
        (b"[" * 200_000, "not readable as JSON"),
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
    ],
)
def test_broken_json_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        load_examples(path)


def test_csv_with_quotes_newlines_and_big_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    big = "x" * 300_000
    path.write_text(f'prompt,response\r\n"q\n1","say ""a"""\r\n\r\nq2,{big}\r\n', encoding="utf-8-sig", newline="")
    loaded = load_examples(path)
    assert [example.origin for example in loaded.examples] == ["rows.csv:2", "rows.csv:5"]
    assert turns(loaded.examples[0]) == [("user", "q\n1"), ("assistant", 'say "a"')]
    assert loaded.examples[1].messages[1].content == big


@pytest.mark.parametrize(("name", "delimiter"), [("a.tsv", "\t"), ("a.csv", ";"), ("a.csv", "\t"), ("a.csv", ",")])
def test_csv_delimiters(tmp_path: Path, name: str, delimiter: str) -> None:
    (tmp_path / name).write_text(f"prompt{delimiter}response\nq{delimiter}a\n")
    assert turns(load_examples(tmp_path / name).examples[0]) == ASKED


def test_csv_faults_have_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,response\nq,a\nq\nq,a,b\nq,\xff\nq,\nq,"a"b\nq,a\nq,"never closed\nq,a\n')
    faults = {fault.origin: fault.reason for fault in load_examples(path).faults}
    assert set(faults) == {f"rows.csv:{line}" for line in (3, 4, 5, 6, 7, 9)}
    assert "1 fields; the header has 2" in faults["rows.csv:3"] and "3 fields" in faults["rows.csv:4"]
    assert "not UTF-8: byte 0xff" in faults["rows.csv:5"] and "empty" in faults["rows.csv:6"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [{"messages": said(*ASKED)}, {"messages": None}, {"messages": [{"role": "user", "content": None}]}]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    loaded = load_examples(path)
    assert turns(loaded.examples[0]) == ASKED and loaded.examples[0].origin == "rows.parquet:0"
    assert [fault.origin for fault in loaded.faults] == ["rows.parquet:1", "rows.parquet:2"]
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not readable as Parquet"):
        load_examples(path)


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl"):
        write_lines(tmp_path / name, [{"prompt": name, "response": "a"}])
    (tmp_path / "notes.md").write_text("no data")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    origins = [example.origin for example in load_examples(tmp_path).examples]
    assert origins == ["a.jsonl:1", "b.jsonl:1"]


def test_a_folder_of_splits_needs_a_choice(tmp_path: Path) -> None:
    for name in ("train-00000.jsonl", "test-00000.jsonl"):
        write_lines(tmp_path / name, [{"prompt": name, "response": "a"}])
    with pytest.raises(DataError, match=r"train, test.*data\.split=train"):
        load_examples(tmp_path)
    loaded = load_examples(tmp_path, split="test")
    assert [example.origin for example in loaded.examples] == ["test-00000.jsonl:1"]
    with pytest.raises(DataError, match="no file is named after the split 'dev'"):
        load_examples(tmp_path, split="dev")


def test_limit_reads_the_first_rows(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": str(i), "response": "a"} for i in range(9)])
    loaded = load_examples(path, limit=4)
    assert loaded.num_rows == len(loaded.examples) == 4


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf\n"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="holds no rows") as error:
        load_examples(path)
    assert error.value.exit_code == 3


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}])
    with pytest.raises(DataError, match=r"no such file.*Did you mean .*rows\.jsonl"):
        load_examples(tmp_path / "row.jsonl")
    with pytest.raises(DataError, match=r"unknown kind of file '.xml'"):
        (tmp_path / "rows.xml").write_text("<a/>")
        load_examples(tmp_path / "rows.xml")
    with pytest.raises(DataError, match=r"data\.split is for folders"):
        load_examples(tmp_path / "rows.jsonl", split="test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.jsonl"):
        load_examples(tmp_path / "empty")
    (tmp_path / "wide.jsonl").write_text('{"prompt": "q", "response": "a"}\n', encoding="utf-16")
    with pytest.raises(DataError, match="UTF-16"):
        load_examples(tmp_path / "wide.jsonl")
    (tmp_path / "wider.jsonl").write_text('{"prompt": "q", "response": "a"}\n', encoding="utf-32")
    with pytest.raises(DataError, match="iconv -f UTF-32"):
        load_examples(tmp_path / "wider.jsonl")
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(b'{"prompt": "q", "response": "a"}\n'))
    with pytest.raises(DataError, match=r"compressed.*gunzip packed\.jsonl"):
        load_examples(tmp_path / "packed.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load_examples(tmp_path / "pipe.jsonl")
    (tmp_path / "linked.jsonl").symlink_to("nowhere")
    with pytest.raises(DataError, match="no such file") as error:
        load_examples(tmp_path / "linked.jsonl")
    assert "linked.jsonl?" not in str(error.value)


def test_the_case_of_a_suffix_does_not_matter(tmp_path: Path) -> None:
    write_lines(tmp_path / "ROWS.JSONL", [{"prompt": "q", "response": "a"}])
    assert len(load_examples(tmp_path / "ROWS.JSONL").examples) == len(load_examples(tmp_path).examples) == 1


def test_a_hub_id_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"someone/rows: no such file.*pip install 'lorica\[hub\]'"):
        load_examples("someone/rows")


def test_a_hub_id_is_read_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        if split == "none":
            raise ValueError("Unknown split")
        return [{"prompt": "q", "response": "a"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_examples("someone/rows").examples[0].origin == "someone/rows:0"
    load_examples("someone/rows", split="test")
    assert asked == [("someone/rows", "train"), ("someone/rows", "test")]
    with pytest.raises(DataError, match="Unknown split"):
        load_examples("someone/rows", split="none")


def test_parquet_needs_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'lorica\[hub\]'"):
        load_examples(tmp_path / "rows.parquet")


def test_local_files_never_touch_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "q", "response": "a"}])
    assert len(load_examples(path).examples) == 1
    with pytest.raises(DataError):
        load_examples(tmp_path / "missing.jsonl")


# Broken rows: each stands on line 3 between good ones, and is refused with its line, a rule and a reason.


def chat(*messages: object) -> dict[str, object]:
    return {"messages": list(messages)}


USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}

BROKEN_LINES: dict[str, tuple[bytes, str, str]] = {
    "cut off": (b'{"messages": [{"role": "user"', "json", "column"),
    "single quotes": (b"{'messages': []}", "json", "column 2"),
    "trailing comma": (b'{"messages": [],}', "json", "column"),
    "two objects": (b'{"messages": []} {"messages": []}', "json", "column 18"),
    "bare words": (b"hello world", "json", "column 1"),
    "raw NUL": (b'{"messages": "\0"}', "encoding", "NUL byte at column 15"),
    "latin-1": ('{"messages": "é"}'.encode("latin-1"), "encoding", "0xe9 at column 15"),
    "raw control character": (b'{"messages": "a\x01"}', "json", "control character"),
    "repeated key": (b'{"messages": [], "messages": []}', "json", "'messages' stands twice"),
    "nested too deep": (b"[" * 100_000, "json", "not readable"),
    "number too long": (b'{"messages": ' + b"9" * 5000 + b"}", "json", "not readable"),
    "a list": (b"[1, 2]", "type", "a list"),
    "a text": (b'"messages"', "type", "a text"),
    "a number": (b"17", "type", "a number"),
    "null": (b"null", "type", "null"),
    "empty object": (b"{}", "empty", "empty object"),
}  # fmt: skip

BROKEN_ROWS: dict[str, tuple[object, str, str]] = {
    "column missing": ({"id": 5}, "null", "messages is null or missing"),
    "turns null": ({"messages": None}, "null", "messages is null"),
    "turns an object": ({"messages": USER}, "type", "messages is an object"),
    "turns a text": ({"messages": "hello"}, "type", "messages is a text"),
    "no turns": (chat(), "empty", "no turns"),
    "turn null": (chat(USER, None), "type", "turn 2 is null"),
    "turn a text": (chat(USER, "a"), "type", "turn 2 is a text"),
    "role missing": (chat(USER, {"content": "a"}), "roles", "turn 2: role is null"),
    "role a number": (chat(USER, {"role": 3, "content": "a"}), "roles", "role is a number"),
    "role unknown": (chat(USER, {"role": "robot", "content": "a"}), "roles", "unknown role 'robot'"),
    "no assistant turn": (chat(USER), "roles", "no assistant turn"),
    "only a system turn": (chat({"role": "system", "content": "s"}), "roles", "no assistant turn"),
    "content missing": (chat(USER, {"role": "assistant"}), "null", "turn 2 (assistant) is null or missing"),
    "content null": (chat(USER, {"role": "assistant", "content": None}), "null", "turn 2 (assistant) is null"),
    "content null, no calls": (
        chat(USER, {"role": "assistant", "content": None, "tool_calls": []}), "null", "turn 2 (assistant) is null"
    ),
    "user content null": (chat({"role": "user", "content": None}, ANSWER), "null", "turn 1 (user) is null"),
    "content empty": (chat(USER, {"role": "assistant", "content": ""}), "empty", "turn 2 (assistant) is empty"),
    "content blank": (chat(USER, {"role": "assistant", "content": " \n\t"}), "empty", "turn 2 (assistant) is empty"),
    "user empty": (chat({"role": "user", "content": ""}, ANSWER), "empty", "turn 1 (user) is empty"),
    "content a number": (chat(USER, {"role": "assistant", "content": 42}), "type", "a number"),
    "content true": (chat(USER, {"role": "assistant", "content": True}), "type", "a boolean"),
    "content an object": (chat(USER, {"role": "assistant", "content": {"a": 1}}), "type", "an object"),
    "content no parts": (chat(USER, {"role": "assistant", "content": []}), "empty", "is empty"),
    "content an image": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER), "type", "'image_url'"
    ),
    "part without text": (chat({"role": "user", "content": [{"type": "text"}]}, ANSWER), "null", "part 1 is null"),
    "NUL in a text": (chat(USER, {"role": "assistant", "content": "a\0b"}), "encoding", "NUL character at position 2"),
    "half a surrogate": (chat(USER, {"role": "assistant", "content": "a\ud83d"}), "encoding", "surrogate"),
    "weight a half": (chat(USER, {**ANSWER, "loss_weight": 0.5}), "type", "loss weight is 0.5"),
    "weight a text": (chat(USER, {**ANSWER, "weight": "1"}), "type", "loss weight is '1'"),
    "calls without name": (chat(USER, {**ANSWER, "tool_calls": [{"arguments": {}}]}), "tools", "name and arguments"),
    "calls a text": (chat(USER, {**ANSWER, "tool_calls": "f()"}), "tools", "name and arguments"),
    "arguments broken": (
        chat(USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{x"}]}), "tools", "arguments of f is not valid"
    ),
    "user calls a tool": (chat({**USER, "tool_calls": [{"name": "f"}]}, ANSWER), "roles", "only an assistant"),
    "function_call not JSON": (chat(USER, {"role": "function_call", "content": "f(1)"}), "tools", "not valid JSON"),
    "tools not JSON": ({**chat(USER, ANSWER), "tools": "[{"}, "tools", "not valid JSON"),
    "tools an object": ({**chat(USER, ANSWER), "tools": {"name": "f"}}, "tools", "tools is an object"),
    "tools of texts": ({**chat(USER, ANSWER), "tools": ["f"]}, "tools", "a list of objects"),
}  # fmt: skip

ALL_BROKEN = {**BROKEN_LINES, **{name: (json.dumps(row).encode(), *why) for name, (row, *why) in BROKEN_ROWS.items()}}


def test_there_are_forty_kinds() -> None:
    assert len(ALL_BROKEN) >= 40


@pytest.mark.parametrize("name", ALL_BROKEN)
def test_a_broken_row_is_named_and_costs_itself_alone(tmp_path: Path, name: str) -> None:
    line, rule, reason = ALL_BROKEN[name]
    good = json.dumps(chat(USER, ANSWER)).encode() + b"\n"
    path = write_lines(tmp_path / "rows.jsonl", [good, good, line + b"\n", good])
    loaded = load_examples(path)
    assert [example.origin for example in loaded.examples] == [f"rows.jsonl:{i}" for i in (1, 2, 4)]
    assert [(fault.origin, fault.rule) for fault in loaded.faults] == [("rows.jsonl:3", rule)]
    assert reason in loaded.faults[0].reason
    assert loaded.num_rows == 4
    with pytest.raises(DataError, match=r"1 of 4 rows[\s\S]*rows\.jsonl:3: [\s\S]*data\.on_bad_row=drop") as error:
        refuse_faults(loaded, "error")
    assert error.value.exit_code == 3
    refuse_faults(loaded, "drop")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": None, "output": "a"}, "instruction is null"),
        ({"instruction": "q", "output": ""}, "output is empty"),
        ({"instruction": "", "output": "a"}, "instruction is empty"),
        ({"instruction": "q", "input": 3, "output": "a"}, "input is a number"),
        ({"instruction": "q", "output": "a", "history": [["only one"]]}, "pairs"),
        ({"instruction": "q", "output": "a", "history": "before"}, "pairs"),
    ],
)
def test_broken_alpaca_rows(tmp_path: Path, row: Any, reason: str) -> None:
    good = {"instruction": "q", "input": "i", "output": "a", "history": []}
    loaded = load_examples(write_lines(tmp_path / "rows.jsonl", [good, row, good]))
    assert [fault.origin for fault in loaded.faults] == ["rows.jsonl:2"] and reason in loaded.faults[0].reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q"}, "response is null or missing"),
        ({"prompt": "q", "response": ["a", "b"]}, "response is a list"),
        ({"prompt": "q", "response": {"answer": "a"}}, "response is an object"),
        ({"prompt": "q", "references": {"a": 1}, "response": "a"}, "references is an object"),
        ({"prompt": "q", "references": ["a", None], "response": "a"}, "reference 2 is null"),
    ],
)
def test_broken_prompt_response_rows(tmp_path: Path, row: Any, reason: str) -> None:
    good = {"prompt": "q", "response": "a", "references": ["a"]}
    loaded = load_examples(write_lines(tmp_path / "rows.jsonl", [good, row, good]))
    assert [fault.origin for fault in loaded.faults] == ["rows.jsonl:2"] and reason in loaded.faults[0].reason


def test_only_twenty_faults_are_listed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"text": "good"}] + [b"{\n"] * 25)
    with pytest.raises(DataError) as error:
        refuse_faults(load_examples(path), "error")
    assert "25 of 26 rows" in str(error.value) and "and 5 more" in str(error.value)
    assert str(error.value).count("rows.jsonl:") == 20


def test_a_file_of_faults_alone_is_an_error_even_when_dropping(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [b"{\n", b"[]\n"])
    with pytest.raises(DataError, match="none of its 2 rows") as error:
        load_examples(path)
    assert "one object a line" in str(error.value) and "on_bad_row" not in str(error.value)
    path.write_bytes('{"prompt": "问", "response": "答"}\n'.encode("gb18030"))
    with pytest.raises(DataError, match="convert the file: iconv"):
        load_examples(path)


# Real files


@pytest.mark.parametrize(
    ("name", "format", "num_rows"),
    [
        ("formats/alpaca_en_demo.json", "alpaca", 999),
        ("formats/alpaca_zh_demo.json", "alpaca", 1000),
        ("formats/glaive_toolcall_en_demo.json", "sharegpt", 300),
        ("formats/v1_sft_demo.jsonl", "messages", 500),
        ("mixture/law.dev.jsonl", "prompt_response", 350),
        ("e2e/dev.jsonl", "prompt_response", 60),
        ("sst2/dev.jsonl", "classification", 872),
        ("clinc150/dev.jsonl", "classification", 3000),
    ],
)
def test_real_files_are_read_whole(shared: Path, name: str, format: str, num_rows: int) -> None:
    loaded = load_examples(shared / "data" / name)
    assert (loaded.format, len(loaded.examples), loaded.faults) == (format, num_rows, [])


def test_real_preference_pairs(shared: Path) -> None:
    path = shared / "data" / "formats" / "dpo_en_demo.json"
    with pytest.raises(DataError, match="preference pairs"):
        load_examples(path)
    loaded = load_examples(path, columns={"response": "chosen"})
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert len(loaded.examples) == 300
    assert loaded.examples[0].messages[-1] == Message("assistant", raw[0]["chosen"]["value"])


def test_real_tool_calls_keep_every_call_and_tool(shared: Path) -> None:
    path = shared / "data" / "formats" / "glaive_toolcall_en_demo.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    for row, example in zip(raw, load_examples(path).examples, strict=True):
        calls = [json.loads(turn["value"]) for turn in row["conversations"] if turn["from"] == "function_call"]
        assert [call["function"] for message in example.messages for call in message.tool_calls] == calls
        assert [tool["function"] for tool in example.tools] == json.loads(row["tools"])
