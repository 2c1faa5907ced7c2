"""`lorica init` writes a run.yaml that loads and fits the rows, and never overwrites one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from lorica.cli import main
from lorica.config import load_config
from lorica.errors import ConfigError, DataError
from lorica.recipes.init import init, render


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(path: str, count: int, words: int = 5) -> str:
    lines = [json.dumps({"prompt": f"Question {i}?", "response": "word " * words + str(i)}) for i in range(count)]
    Path(path).write_text("\n".join(lines) + "\n")
    return path


def test_without_rows_a_placeholder(capsys: pytest.CaptureFixture[str]) -> None:
    result = init(Path("project"))
    assert result.rows is None and result.path == Path("project/run.yaml")
    config = load_config("project/run.yaml").config
    assert (config.model.base, config.data.train, config.data.max_length) == ("embedded", "rows.jsonl", 1024)
    assert config.train.output == "project/runs/first"
    text = Path("project/run.yaml").read_text()
    assert all(" # " in line for line in text.splitlines() if line.startswith("  ")), "every key says what it means"
    assert "lorica train project/run.yaml" in capsys.readouterr().out


def test_the_file_fits_the_rows() -> None:
    rows("mine.jsonl", 100, words=60)
    result = init(Path())
    assert result.data == "mine.jsonl" and result.rows is not None
    assert (result.rows.format, result.rows.num_rows, result.rows.num_faults) == ("prompt_response", 100, 0)
    config = load_config("run.yaml").config
    longest, total = max(result.rows.lengths), sum(result.rows.lengths)
    assert 60 < longest <= config.data.max_length < longest + 64 and config.data.max_length % 64 == 0
    assert len(result.rows.lengths) == 100 and 15 <= total / config.train.batch_tokens <= 25, "steps an epoch"
    assert config.data.eval == 0.2 and config.train.epochs == 3
    assert config.data.format == "prompt_response" and config.train.output == "runs/first"


def test_rows_longer_than_the_base_takes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    rows("mine.jsonl", 10)
    with Path("mine.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "Long?", "response": "word " * 3000}) + "\n")
    result = init(Path())
    assert result.rows is not None and max(result.rows.lengths) > 3000 and result.rows.num_too_long == 1
    assert load_config("run.yaml").config.data.max_length == result.rows.context == 2048
    assert "1 of them are left out: the base takes 2,048 tokens" in " ".join(capsys.readouterr().out.split())


def test_an_existing_file_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("mine")
    assert main(["init", "--data", rows("mine.jsonl", 3)]) == 2
    assert "exists" in capsys.readouterr().err and Path("run.yaml").read_text() == "mine"


def test_several_files_are_a_question() -> None:
    rows("a.jsonl", 1)
    rows("b.jsonl", 1)
    with pytest.raises(ConfigError, match=r"a\.jsonl, b\.jsonl.*--data"):
        init(Path())
    assert not Path("run.yaml").exists()


def test_rows_that_cannot_be_read_leave_no_file() -> None:
    Path("mine.jsonl").write_text('{"colour": "red"}\n')
    with pytest.raises(DataError):
        init(Path())
    assert not Path("run.yaml").exists()


@pytest.mark.parametrize("name", ["no", "1e-4", "a: b", "it's #1", "x; touch pwned", "行 数据"])
def test_names_survive_yaml_and_the_shell(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(name).mkdir()
    data = rows(f"{name}/rows.jsonl", 10)
    result = init(Path(name), base="hub/some-model")
    assert load_config(result.path).config.data.train == data
    assert shlex.split(result.commands[2]) == ["lorica", "train", str(result.path)]
    assert not Path("pwned").exists()
    load_config(result.path)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["path"] == "run.yaml" and len(result["commands"]) == 3


def test_no_rows_are_held_out_of_a_handful() -> None:
    from lorica.recipes.init import Rows

    Path("run.yaml").write_text(render("x", "b", Path("o"), Rows("text", 4, 0, (), None)))
    assert load_config("run.yaml").config.data.eval is None
