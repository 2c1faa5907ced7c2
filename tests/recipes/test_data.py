"""`lorica data check` and `lorica data preview` against rows whose content and faults are known."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica.cli import main
from lorica.config import RunConfig, dump_yaml, load_config
from lorica.data.render import Renderer
from lorica.data.sources import load_examples
from lorica.errors import DataError
from lorica.models.load import load_tokenizer
from lorica.recipes.data import check, configuration, preview
from lorica.recipes.train import train

CONVERSATION = {
    "messages": [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "中文 hi 😀?"},
        {"role": "assistant", "content": "First [bold]answer[/bold]."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Second 答案."},
    ]
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, *rows: Any) -> str:
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return name


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"Question {i}?", "response": f"Answer {i}."} for i in range(count)]


def test_check_counts_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    rows = write("rows.jsonl", *pairs(20), pairs(1)[0], "{broken", {"prompt": "x", "response": None})
    result = check(rows, ["data.on_bad_row=drop"])
    report = result.train
    assert result.refusal is None
    assert (report.num_rows, report.num_samples, report.num_duplicates) == (23, 21, 1)
    assert [fault.origin for fault in report.faults] == ["rows.jsonl:22", "rows.jsonl:23"]
    assert result.num_held_out >= 1 and result.eval is None
    out = capsys.readouterr().out
    assert "rows.jsonl:22" in out and "`train` would accept" in out and "\x1b" not in out

    lengths = [
        len(Renderer(load_tokenizer("embedded")).render(example).input_ids) for example in load_examples(rows).examples
    ]
    assert report.num_tokens == sum(lengths) and report.length_percentiles["max"] == max(lengths)


def test_check_exits_3_where_train_would_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    rows = write("rows.jsonl", *pairs(20), "{broken", {"prompt": "x", "response": "y\0"})
    assert main(["data", "check", rows]) == 3
    out = capsys.readouterr().out
    assert "`train` would refuse:\n2 of 22 rows cannot be used" in out and "data.on_bad_row=drop" in out
    assert main(["data", "check", rows, "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert "rows.jsonl:21" in result["refusal"] and len(result["train"]["faults"]) == 2
    assert main(["data", "check", rows, "data.on_bad_row=drop"]) == 0


@pytest.mark.parametrize(
    ("rows", "overrides", "words"),
    [
        (pairs(9), ["data.max_length=8", "data.too_long=error"], "8"),
        (pairs(9), ["data.max_length=8"], "too_long"),
        ([], [], "no rows"),
        ([{"colour": "red"}], [], "colour"),
        (["{broken"], [], "rows.jsonl:1"),
    ],
)
def test_nothing_to_train_on_is_an_error(
    rows: list[Any], overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", write("rows.jsonl", *rows), *overrides]) == 3
    assert words in capsys.readouterr().err


def test_too_long_rows_refuse_only_where_they_are_an_error() -> None:
    long = {"prompt": "x", "response": "word " * 200}
    rows = write("rows.jsonl", *pairs(9), long)
    assert check(rows, ["data.max_length=64"]).refusal is None
    refusal = check(rows, ["data.max_length=64", "data.too_long=error"]).refusal
    assert refusal is not None and "1 rows are longer than data.max_length = 64" in refusal
    assert check(rows, ["data.max_length=64", "data.too_long=truncate"]).train.num_samples == 10


def test_too_few_rows_to_hold_out() -> None:
    refusal = check(write("rows.jsonl", *pairs(1))).refusal
    assert refusal is not None and "data.eval=null" in refusal
    assert check("rows.jsonl", ["data.eval=null"]).refusal is None


def test_overlap_with_the_evaluation_file_is_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", *pairs(10))
    write(
        "eval.jsonl", *pairs(3), {"prompt": "Question 5?", "response": "Other."}, {"prompt": "New", "response": "New"}
    )
    Path("run.yaml").write_text("model: {base: embedded}\ndata: {train: train.jsonl, eval: eval.jsonl}\n")
    result = check("run.yaml")
    assert result.train.overlap is not None and result.eval is not None and result.eval.num_rows == 5
    assert (result.train.overlap.num_exact, result.train.overlap.num_prompts) == (3, 4)
    assert "Warning: 3 of 5 evaluation rows are training rows too" in capsys.readouterr().out


def test_a_bare_file_gets_the_defaults() -> None:
    config = configuration("odd: name #1.jsonl", ["data.max_length=64"])
    assert (
        config.data.train == "odd: name #1.jsonl" and config.model.base == "embedded" and config.data.max_length == 64
    )
    assert config.train == load_config(None, ["model.base=embedded", "data.train=x"]).config.train
    assert configuration("x.jsonl", ["model.base=./other"]).model.base == "./other"


def test_steps_are_counted_as_train_takes_them(
    make_config: Callable[..., RunConfig], save_base: Callable[[Any], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Padded where the base cannot pack."""
    from transformers import StableLmConfig

    shape = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 8192}
    base = save_base(StableLmConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, **shape))
    rows = write("rows.jsonl", *({"prompt": "x", "response": "word " * (1 + 30 * (i % 3 == 0))} for i in range(60)))
    config = make_config("run", base=base, data={"train": rows, "eval": None}, epochs=1.0)
    Path("run.yaml").write_text(dump_yaml(config))
    padded = check("run.yaml").train.num_steps
    assert "Batches are padded, because this model cannot pack" in capsys.readouterr().err
    assert check("run.yaml", ["model.base=embedded"]).train.num_steps < padded
    assert train(config).steps == padded


@pytest.mark.parametrize("loss_on", ["response", "assistant", "all"])
def test_the_mask_shown_is_the_mask_trained_on(loss_on: str) -> None:
    rows = write("rows.jsonl", CONVERSATION)
    (sample,) = preview(rows, [f"data.loss_on={loss_on}"])
    renderer = Renderer(load_tokenizer("embedded"), loss_on=loss_on)
    tokens = renderer.render(load_examples(rows).examples[0])
    mask = [segment.trained for segment in sample.segments for _ in range(segment.num_tokens)]
    assert mask == [label != -100 for label in tokens.labels]
    assert "".join(segment.text for segment in sample.segments) == renderer.tokenizer.decode(tokens.input_ids)
    learned = [segment.text for segment in sample.segments if segment.trained]
    if loss_on == "response":
        assert learned == ["Second 答案.<|im_end|>"]
    elif loss_on == "assistant":
        assert learned == ["First [bold]answer[/bold].<|im_end|>", "Second 答案.<|im_end|>"]


def test_preview_off_a_terminal_marks_with_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    write(
        "rows.jsonl", CONVERSATION, {"messages": [{"role": "user", "content": "\x1b[31m"}, CONVERSATION["messages"][2]]}
    )
    assert main(["data", "preview", "rows.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "\u27e6Second 答案.<|im_end|>\u27e7" in out and "\x1b" not in out
    assert "[bold]answer[/bold]" in out and "rows.jsonl:2" in out

    assert main(["data", "preview", "rows.jsonl", "--rows", "1", "--row", "1", "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)
    assert sample["origin"] == "rows.jsonl:2" and {"trained", "text", "num_tokens"} == set(sample["segments"][0])


def test_preview_says_why_a_row_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    write("rows.jsonl", {"prompt": "x", "response": "word " * 100})
    (sample,) = preview("rows.jsonl", ["data.max_length=16"])
    assert sample.fault is not None and "data.max_length is 16" in sample.fault and sample.segments == []
    assert sample.fault in capsys.readouterr().out
    with pytest.raises(DataError, match="there is no row 7"):
        preview("rows.jsonl", first=7)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color", [False, True])
def test_colour_on_a_terminal_unless_no_color(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    write("rows.jsonl", CONVERSATION)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("NO_COLOR", "1" if no_color else "")
    preview("rows.jsonl")
    if no_color:
        assert "\x1b" not in terminal.getvalue()
        assert "\u27e6Second 答案.<|im_end|>\u27e7" in terminal.getvalue()
    else:
        assert "\x1b[1;32mSecond 答案.<|im_end|>\x1b[0m" in terminal.getvalue()
        assert "\u27e6" not in terminal.getvalue()


def test_real_files_of_other_projects(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = shared / "data" / "formats" / "alpaca_zh_demo.json"
    result = check(str(file), ["data.on_bad_row=drop"])
    report = result.train
    assert report.format == "alpaca" and report.num_rows == len(json.loads(file.read_text()))
    assert report.num_samples + len(report.faults) == report.num_rows
    assert set(report.num_faults_by_rule) <= {"too_long"}, report.faults[:3]
    assert len(preview(str(file), rows=2)) == 2
