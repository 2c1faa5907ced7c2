"""The command line: arguments reach the recipes, errors leave with their exit codes, stdout carries data only."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from lorica import errors
from lorica.cli import app, main
from lorica.config import Resolved

Recipe = Callable[..., Any]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model: {base: embedded}\ndata: {train: rows.jsonl}\n")
    return "run.yaml"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """Put a recipe in the place of a real one; gives the list of its calls."""

    def put(module: str, name: str, outcome: object = None) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def recipe(*args: Any, **options: Any) -> object:
            calls.append((args, options))
            print("a table for people")
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        monkeypatch.setitem(sys.modules, f"lorica.recipes.{module}", SimpleNamespace(**{name: recipe}))
        return calls

    return put


def commands() -> Iterator[list[str]]:
    def walk(command: Any, words: list[str]) -> Iterator[list[str]]:
        yield words
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, [*words, name])

    yield from walk(typer.main.get_command(app), [])


def test_the_verbs() -> None:
    verbs = {" ".join(words) for words in commands()}
    assert verbs == {"", "doctor", "init", "data", "data check", "data preview", "plan", "train", "eval", "merge"} | {
        "export",
        "generate",
        "components",
        "sweep",
        "compare",
        "adapter",
        "adapter inspect",
        "adapter verify",
        "adapter convert",
        "adapter static",
        "adapter combine",
        "adapter scale",
        "chat",
        "quickstart",
        "config",
        "config show",
    }


@pytest.mark.parametrize("words", list(commands()), ids=lambda words: " ".join(words) or "lorica")
def test_every_command_has_help_with_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: lorica") and err == ""
    assert "..." not in out.partition("Commands:")[2], "a command's summary is cut off"
    if words and words not in (["adapter"], ["data"], ["config"]):
        assert f"Example: lorica {' '.join(words)}" in " ".join(out.split()) and "--json" in out


def test_no_help_imports_anything_heavy() -> None:
    program = (
        "import sys\nfrom lorica.cli import main\n"
        f"for words in {list(commands())!r}: assert main([*words, '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'numpy', 'yaml', 'rich.console', 'pyarrow', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"


def test_help_is_quick() -> None:
    """Processor time, the best of five: the machine may be busy with other things."""
    seconds = []
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-m", "lorica", "--help"], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < 0.3, seconds


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lorica 0.")


def test_arguments_reach_the_recipes(config: str, fake: Recipe) -> None:
    calls = fake("train", "train", {})
    words = [
        "train",
        config,
        "method.rank=4",
        "--resume",
        "auto",
        "--max-steps",
        "7",
        "--allow-data-change",
        "train.lr=1",
    ]
    assert main(words) == 0
    ((run,), options) = calls[0]
    assert isinstance(run, Resolved) and run.origin["train.lr"] == "command line"
    values = run.config
    assert (values.method.rank, values.train.max_steps, values.train.lr) == (4, 7, 1.0)
    assert options == {"resume": "auto", "dry_run": False, "allow_data_change": True}

    calls = fake("plan", "plan", {})
    assert main(["plan", config, "--memory", "8GiB", "--measure"]) == 0
    assert calls[0][1] == {"memory_bytes": 8 * 2**30, "measure": True}

    calls = fake("merge", "merge", {})
    assert main(["merge", "runs/first", "model.base=./moved", "--output", "x; touch /tmp/p"]) == 0
    assert calls[0][0] == ("runs/first", Path("x; touch /tmp/p"), ["model.base=./moved"])

    calls = fake("generate", "generate", [])
    assert main(["generate", "runs/first", "--prompt", "Why?"]) == 0
    assert calls[0][0] == ("runs/first", []) and calls[0][1]["max_new_tokens"] is None


def test_a_shell_in_the_output_name_is_only_a_name(config: str, fake: Recipe, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    calls = fake("train", "train", {})
    assert main(["train", config, f"train.output=x; touch {trace}"]) == 0
    assert calls[0][0][0].config.train.output == f"x; touch {trace}"
    Path(config).write_text(f"model: {{base: embedded}}\ndata: {{train: y}}\ntrain: {{output: 'x; touch {trace}'}}\n")
    assert main(["train", config]) == 0
    assert calls[1][0][0].config.train.output == f"x; touch {trace}" and not trace.exists()


def test_json_is_one_document_whatever_is_printed(fake: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    fake("merge", "merge", {"path": Path("out"), "loss": float("nan"), "名": (1, 2.5, None)})
    assert main(["merge", "runs/first", "--output", "out", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"path": "out", "loss": None, "名": [1, 2.5, None]}
    assert err == "a table for people\n"
    assert main(["merge", "runs/first", "--output", "out"]) == 0
    assert capsys.readouterr().out == "a table for people\n"


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.LoricaError("text"), 1),
        (errors.ConfigError("text"), 2),
        (errors.TargetError("text"), 2),
        (errors.DataError("text"), 3),
        (errors.DoesNotFitError("text"), 4),
        (errors.DivergedError("text"), 5),
        (errors.StoppedError("text", 2), 130),
        (errors.StoppedError("text", 15), 143),
        (errors.ModelError("text"), 1),
        (MemoryError(), 4),
        (OutOfMemoryError("CUDA out of memory"), 4),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 4),
        (RuntimeError("text"), 1),
        (PermissionError(13, "text", "file"), 1),
        (KeyboardInterrupt(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_exit_codes(error: BaseException, code: int, fake: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    fake("merge", "merge", error)
    assert main(["merge", "runs/first", "-o", "out"]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err and "error: " in err and out == "a table for people\n"

    assert main(["merge", "runs/first", "-o", "out", "--json"]) == code
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert set(report) == {"error"} and set(report["error"]) == {"type", "message", "exit_code"}
    assert report["error"]["exit_code"] == code
    if isinstance(error, errors.LoricaError):
        assert report["error"] == {"type": type(error).__name__, "message": "text", "exit_code": code}
        assert "error: text" in err


def test_running_out_of_memory_says_what_to_try(fake: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    fake("merge", "merge", MemoryError())
    main(["merge", "runs/first", "-o", "out"])
    assert "train.micro_batch_tokens" in capsys.readouterr().err


def test_traceback_on_demand(fake: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake("merge", "merge", errors.DataError("text"))
    assert main(["merge", "runs/first", "--traceback", "-o", "out"]) == 3
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("LORICA_TRACEBACK", "1")
    assert main(["merge", "runs/first", "-o", "out"]) == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train"], "Missing argument"),
        (["train", "run.yaml", "--max-step", "3"], "No such option"),
        (["train", "run.yaml", "--max-steps", "zero"], "--max-steps"),
        (["merge", "runs/first"], "--output"),
        (["export", "runs/first", "-o", "x", "--format", "gguf"], "gguf"),
        (["generate", "runs/first", "--prompt", "a", "--input", "b"], "not both"),
        (["plan", "run.yaml", "--memory", "much"], "8GiB"),
        (["train", "missing.yaml"], "does not exist"),
    ],
)
def test_what_cannot_be_parsed_exits_2(
    words: list[str], text: str, config: str, capsys: pytest.CaptureFixture[str], fake: Recipe
) -> None:
    calls = fake("train", "train"), fake("generate", "generate"), fake("plan", "plan"), fake("export", "export")
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert text in err and out == ""
    assert main([*words, "--json"]) == 2
    assert text in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not any(calls), "the recipe ran"


def test_a_misspelt_key_stops_before_anything_is_loaded(config: str) -> None:
    Path(config).write_text(
        "model:\n  base: org/model-that-is-nowhere\ndata: {train: x}\ntrain:\n  lrr: 1\n  seeds: 2\n"
    )
    program = (
        "import sys\nfrom lorica.cli import main\n"
        f"code = main(['train', {config!r}])\n"
        "assert not [name for name in sys.modules if name.startswith('lorica.models')]\n"
        "sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: run.yaml:5: train.lrr: unknown key; did you mean 'lr'?\n"
        "run.yaml:6: train.seeds: unknown key; did you mean 'seed'?\n"
    )


def test_config_show(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", config, "train.lr=3e-4"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "train.lr" in line)
    assert line.split()[:4] == ["train.lr", "0.0003", "command", "line"]
    assert "\x1b" not in out and "run.yaml:2" in out
    assert main(["config", "show", config, "train.lr=3e-4", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert (rows["train.lr"]["value"], rows["train.lr"]["origin"]) == (3e-4, "command line")
    assert rows["data.train"]["origin"] == "run.yaml:2" and rows["train.lr"]["description"]


def test_a_reader_that_leaves_is_no_error(config: str) -> None:
    command = [sys.executable, "-m", "lorica", "config", "show", config]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_ascii_terminals_get_valid_json(config: str) -> None:
    Path(config).write_text("model: {base: embedded}\ndata: {train: 数据.jsonl}\n")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "lorica", "config", "show", config, "--json"]
    result = subprocess.run(command, capture_output=True, env=environment, check=True)
    assert "数据.jsonl" in [row["value"] for row in json.loads(result.stdout.decode("ascii"))]
    # A table, which has no escapes of its own, has those of Python.
    result = subprocess.run(command[:-1], capture_output=True, env=environment, check=True)
    assert "\\u6570\\u636e.jsonl" in result.stdout.decode("ascii")


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8"])
def test_a_pipe_gets_json_in_utf_8(config: str, locale: str) -> None:
    Path(config).write_text("model: {base: embedded}\ndata: {train: 数据.jsonl}\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    command = [sys.executable, "-m", "lorica", "config", "show", config, "--json"]
    result = subprocess.run(command, capture_output=True, env={**environment, "LC_ALL": locale}, check=True)
    assert '"数据.jsonl"' in result.stdout.decode("utf-8")


def test_a_warning_is_one_line_without_a_place_in_the_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert main(["--help"]) == 0
    assert warnings.formatwarning("no compiler", RuntimeWarning, "build.py", 30) == "warning: no compiler\n"


def test_what_a_command_imports_is_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a process of its own only; a recipe's own garbage is collected, and so is that of a program that calls us."""
    seen: list[tuple[bool, bool]] = []

    def recipe() -> SimpleNamespace:
        seen.append((gc.isenabled(), gc.get_freeze_count() > 0))
        return SimpleNamespace(ok=True)

    monkeypatch.setitem(sys.modules, "lorica.recipes.doctor", SimpleNamespace(doctor=recipe))
    monkeypatch.setattr(sys, "argv", ["lorica", "doctor"])
    gc.unfreeze()
    try:
        assert main(["doctor"]) == 0 and main() == 0
    finally:
        gc.unfreeze()
    assert seen == [(True, False), (True, True)] and gc.isenabled()
