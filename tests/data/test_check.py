"""The report on a data set against counts made by hand; the preview against the labels themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorica.data.check import check, overlap, preview
from lorica.data.packing import pack
from lorica.data.render import Prepared, Renderer, load_dataset
from lorica.data.rows import Example, Message
from lorica.recipes.console import jsonable

from .templates import TEMPLATES, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(base: Path) -> Any:
    return make_tokenizer(base, TEMPLATES["chatml"])


def prepare(tokenizer: Any, path: Path, rows: list[Any], **options: Any) -> Prepared:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return load_dataset(path, Renderer(tokenizer, **options), on_bad_row="drop")


def pair(prompt: str, response: str) -> dict[str, str]:
    return {"prompt": prompt, "response": response, "note": "not read"}


def test_the_report_counts_everything(tokenizer: Any, tmp_path: Path) -> None:
    rows: list[Any] = [pair(f"q{i}", "word " * (i + 1)) for i in range(20)]
    rows += [pair("q3", "word " * 4), pair("q3", "word " * 4), "{broken", pair("q", ""), pair("long", "word " * 500)]
    prepared = prepare(tokenizer, tmp_path / "rows.jsonl", rows, max_length=100)
    report = check(prepared, batch_tokens=200)
    assert (report.num_rows, report.num_samples) == (25, 22)
    assert report.num_rows == report.num_samples + len(report.faults)
    assert report.num_faults_by_rule == {"json": 1, "empty": 1, "too_long": 1}
    assert [fault.origin for fault in report.faults] == ["rows.jsonl:23", "rows.jsonl:24", "rows.jsonl:25"]
    assert report.num_duplicates == 2
    assert report.duplicates == (("rows.jsonl:21", "rows.jsonl:4"), ("rows.jsonl:22", "rows.jsonl:4"))
    assert report.unused_columns == ("note",) and report.format == "prompt_response"

    lengths = sorted(len(ids) for ids, _ in (prepared.dataset[i] for i in range(22)))
    assert report.num_tokens == sum(lengths)
    assert report.length_percentiles == {"p50": lengths[10], "p90": lengths[19], "p99": lengths[21], "max": lengths[21]}
    assert report.longest[0] == ("rows.jsonl:20", lengths[-1]) and len(report.longest) == 10
    trained = sum(int((labels != -100).sum()) for _, labels in (prepared.dataset[i] for i in range(22)))
    assert report.num_trained_tokens == trained and report.trained_share == pytest.approx(trained / sum(lengths))
    assert sum(lengths) / 200 <= report.num_steps <= 22
    assert report.overlap is None
    assert json.loads(json.dumps(jsonable(report)))["num_samples"] == 22


def test_overlap_of_train_and_eval_is_counted(tokenizer: Any, tmp_path: Path) -> None:
    train = prepare(tokenizer, tmp_path / "train.jsonl", [pair("q1", "a1"), pair("q2", "a2"), pair("q2", "a3")])
    evaluation = prepare(
        tokenizer,
        tmp_path / "dev.jsonl",
        [pair("q2", "other"), pair(" q1 ", "a1\n"), pair("q2", "a3"), pair("q9", "a1")],
    )
    found = check(train, evaluation, batch_tokens=100).overlap
    assert found is not None
    assert (found.num_exact, found.num_prompts, found.num_eval) == (2, 3, 4)
    assert found.examples == (
        ("dev.jsonl:2", "train.jsonl:1"),
        ("dev.jsonl:3", "train.jsonl:3"),
        ("dev.jsonl:1", "train.jsonl:2"),
    )


def test_overlap_of_conversations_and_texts() -> None:
    def chat(*turns: str, origin: str = "r:1") -> Example:
        roles = ("user", "assistant") * len(turns)
        return Example(tuple(map(Message, roles, turns)), None, (), (), None, origin)

    def text(content: str) -> Example:
        return Example((), content, (), (), None, "t:1")

    train = [chat("a", "b", "c", "d"), chat("a", "b"), text("words")]
    found = overlap(train, [chat("a", "b", "c", "other"), chat("a", "x", "c", "d"), text("words"), text("more")])
    assert (found.num_exact, found.num_prompts) == (1, 2)


MULTI = [
    ("user", "One 一?"),
    ("assistant", "First 第一。"),
    ("user", "Two?"),
    ("assistant", "<think>\nx\n</think>\n\nThird ü."),
]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("loss_on", ["response", "assistant", "all"])
@pytest.mark.parametrize("bos", [False, True])
def test_the_preview_is_the_mask_trained_on(base: Path, tmp_path: Path, name: str, loss_on: str, bos: bool) -> None:
    tokenizer = make_tokenizer(base, TEMPLATES[name], bos=bos)
    row = {"messages": [{"role": role, "content": content} for role, content in MULTI]}
    prepared = prepare(tokenizer, tmp_path / "rows.jsonl", [row], loss_on=loss_on)
    ids, labels = prepared.dataset[0]
    segments = preview(prepared.dataset[0], tokenizer)
    assert "".join(segment.text for segment in segments) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(segment.text for segment in segments)
    shown = np.repeat([segment.trained for segment in segments], [segment.num_tokens for segment in segments])
    assert shown.tolist() == (labels != -100).tolist()
    # What a batch trains at t is the token at t + 1, so the mask shown is the batch's, moved by one.
    targets = pack(prepared.dataset, [0]).targets[0].numpy()
    assert (targets[:-1] != -100).tolist() == shown[1:].tolist() and not shown[0]


def test_a_character_cut_in_half_is_shown_once(tokenizer: Any) -> None:
    ids = np.array(tokenizer("a中b").input_ids, np.int32)
    labels = np.where(np.arange(len(ids)) >= 2, ids, -100).astype(np.int32)
    segments = preview((ids, labels), tokenizer)
    assert [segment.num_tokens for segment in segments] == [2, len(ids) - 2]
    assert segments[0].text.startswith("a") and segments[1].text.endswith("b")
