"""`lorica components`: what it prints and writes, for every kind of rows, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import mixture, rows

import lorica
from lorica.cli import main
from lorica.data.components import Components
from lorica.data.rows import Example, Message
from lorica.data.sources import load_examples, stream_examples
from lorica.errors import DataError
from lorica.models.load import load_model, load_tokenizer
from lorica.recipes.components import components, hidden_states, text_of
from lorica.recipes.data import configuration


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: Sequence[Any]) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    Path(name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return name


def as_pairs(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"prompt": text, "response": "Yes."} for text in texts]


def test_a_mixture_is_shown_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    texts, truth = mixture({"baking": 60, "农业": 100}, 0)
    source = write("rows.jsonl", as_pairs(texts))
    assert main(["components", source, "--output", "found", "--max-components", "4", "--seed", "3"]) == 0
    out, err = capsys.readouterr()
    assert "rows.jsonl: 2 components in 160 rows" in out and "What decides: overlap." in out and err == ""
    assert "rows.jsonl:" in out.partition("Typical rows")[2] and "held-out" in out
    found = Components.from_json(Path("found/components.json").read_text(encoding="utf-8"))
    assert found.sizes == (100, 60) and found.settings["seed"] == 3 and len(found.criteria) == 4
    assert [truth[row] for row in found.typical[0]] == [1, 1, 1]
    assert Path("found/components.png").read_bytes().startswith(b"\x89PNG")

    assert main(["components", source, "--num", "1", "--limit", "30", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["num"], report["num_rows"], report["num_noise"]) == (1, 30, 0) and "rows.jsonl" in err
    assert report["components"][0]["size"] == 30 and report["files"][0] == "components/components.json"
    assert report["components"][0]["samples"][0][0].startswith("rows.jsonl:")


def test_from_python_with_dbscan() -> None:
    texts, _ = mixture({"courts": 80, "编程": 80}, 1)
    report = lorica.components(
        write("rows.jsonl", [{"text": text} for text in texts]), method="dbscan", max_components=2
    )
    assert report.num == 2 and sum(part.size for part in report.components) + report.num_noise == 160


def test_bad_rows_stop_it_or_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    good = as_pairs(rows("chess", 20, 0))
    source = write("rows.jsonl", [*good[:5], "{broken", *good[5:], {"prompt": "x", "response": None}])
    assert main(["components", source]) == 3
    err = capsys.readouterr().err
    assert "2 of 22 rows" in err and "rows.jsonl:6" in err and "rows.jsonl:22" in err
    assert not Path("components").exists()
    report = components(source, ["data.on_bad_row=drop"], max_components=1)
    assert (report.num_rows, report.num_left_out) == (20, 2)
    for content in ([], ["{broken"], [{"prompt": "x", "response": None}]):
        with pytest.raises(DataError):
            components(write("bad.jsonl", content), ["data.on_bad_row=drop"])
    assert main(["components", source, "data.on_bad_row=drop", "--num", "2", "--method", "dbscan"]) == 2
    with pytest.raises(DataError, match="no such file"):
        components("missing.jsonl")


def test_what_counts_is_the_whole_row_but_a_system_prompt() -> None:
    turns = (Message("system", "Be brief."), Message("user", "Why?"), Message("assistant", "x" * 3_000))
    conversation = Example(turns, None, (), (), None, "a:1")
    assert text_of(conversation) == "Why?\n" + "x" * 2_000
    assert text_of(replace(conversation, messages=turns[:1])) == "Be brief."
    assert text_of(Example((), "first", (), (), None, "a:2", text_pair="second")) == "first\nsecond"


def test_a_long_system_prompt_hides_no_component(capsys: pytest.CaptureFixture[str]) -> None:
    texts, _ = mixture({"courts": 60, "编程": 60}, 1)
    prompt = "You are a helpful, harmless and honest assistant. Always answer as helpfully as possible. " * 3
    turns = [[("system", prompt), ("user", text), ("assistant", "Yes.")] for text in texts]
    rows = [{"messages": [{"role": role, "content": content} for role, content in row]} for row in turns]
    assert main(["components", write("rows.jsonl", rows), "--max-components", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num"] == 2


def test_streamed_rows_are_the_loaded_ones() -> None:
    first = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    late = {**first, "tools": [{"name": "f", "parameters": {}}]}
    source = write("rows.jsonl", [*[first] * 60, "{", {"messages": []}, late])
    loaded, stream = load_examples(source), stream_examples(source)
    for _ in range(2):
        streamed = list(stream())
        assert [row for row in streamed if isinstance(row, Example)] == loaded.examples
        assert [row for row in streamed if not isinstance(row, Example)] == loaded.faults
    assert loaded.examples[-1].tools and len(list(stream_examples(source, limit=7)())) == 7


def test_hidden_states_are_the_means_over_each_row_alone() -> None:
    texts = ["One short row.", "", "A row of many more words than the first one has, so that one of them is padded."]
    ours = hidden_states(configuration("rows.jsonl"))(texts)
    model, tokenizer = load_model("embedded").eval(), load_tokenizer("embedded")
    for row, text in zip(ours, texts, strict=True):
        ids = tokenizer(text)["input_ids"] or [tokenizer.eos_token_id]
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        np.testing.assert_allclose(row, states[0].float().mean(0).numpy(), rtol=0.05, atol=0.05)


def test_hidden_states_of_the_base_find_two_languages() -> None:
    texts, truth = mixture({"sailing": 15, "法律": 15}, 0)
    report = components(write("rows.jsonl", as_pairs(texts)), features="hidden", max_components=2)
    found = Components.from_json(Path("components/components.json").read_text(encoding="utf-8"))
    assert report.num == 2 and found.settings["features"] == "hidden"
    assert len({(label, kind) for label, kind in zip(found.labels.tolist(), truth, strict=True)}) == 2
