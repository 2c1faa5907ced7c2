"""`lorica compare`: what differs, what came out, and that a run that is damaged is shown with what it has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorica.cli import main
from lorica.config import RunConfig, dump_yaml, load_config
from lorica.errors import ConfigError
from lorica.recipes import compare as recipe
from lorica.recipes.compare import RunSummary, compare
from lorica.recipes.generate import generate
from lorica.recipes.pictures import draw_comparison
from lorica.recipes.preparing import prepare
from lorica.training.metrics import read_metrics

Make = Callable[..., Path]


@pytest.fixture
def make_run(make_config: Callable[..., RunConfig], tmp_path: Path) -> Make:
    """make_run(name, rows of metrics.jsonl, result=..., answers=..., **train): a run folder made by hand."""

    def make(
        name: str,
        rows: list[dict[str, Any]],
        *,
        result: dict[str, Any] | None = None,
        answers: dict[str, str] | None = None,
        method: dict[str, Any] | None = None,
        **train: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = make_config(folder, method=method, **train)
        (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        if result is not None:
            (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
        if answers is not None:
            samples = [{"prompt": p, "references": ["yes"], "adapter": text} for p, text in answers.items()]
            scores = {"exact_match": 50.0, "bleu": 12.5, "rouge_l": None, "chrf": 3.0}
            content = {"all": {"adapter": scores}, "samples": samples}
            (folder / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make


def step(number: int, loss: float) -> dict[str, Any]:
    tokens, seconds = 100 * number, 0.5 * number
    return {"step": number, "loss": loss, "lr": 1e-3, "tokens": tokens, "seconds": seconds, "peak_memory_bytes": 2**20}


FIRST = [step(1, 4.0), {"step": 1, "eval_loss": 3.5}, step(2, 3.0), {"step": 2, "eval_loss": 3.75}]
SECOND = [step(1, 5.0), step(2, 4.5)]
RESULT = {"status": "finished", "peak_memory_bytes": 3 * 2**20, "trainable_parameters": 1234}


def test_only_what_differs_is_listed(make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run("a", FIRST, lr=1e-3), make_run("b", SECOND, method={"rank": 8}, lr=1e-3, seed=7)]
    found = compare(runs, output=tmp_path / "c.png")
    assert found.differences == {"method.rank": {"a": 4, "b": 8}, "train.seed": {"a": 0, "b": 7}}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["method.rank", "4", "8"] in lines and ["key", "a", "b"] in lines
    assert not any(line[:1] == ["train.lr"] for line in lines)


def test_the_figures_are_those_of_the_log_and_the_result(make_run: Make, tmp_path: Path) -> None:
    drawn = {"energy_joules": 12345.0, "energy_source": "RAPL package 0"}
    runs = [make_run("a", FIRST, result={**RESULT, **drawn}, answers={"Is it?": "no"}), make_run("b", SECOND)]
    first, second = compare(runs, output=tmp_path / "c.png").runs
    assert first == RunSummary(
        name="a",
        run=str(runs[0]),
        status="finished",
        steps=2,
        tokens=200,
        seconds=1.0,
        energy_joules=12345.0,
        energy_source="RAPL package 0",
        peak_memory_bytes=3 * 2**20,
        trainable_parameters=1234,
        train_loss=3.0,
        eval_loss=3.75,
        best_eval_loss=3.5,
        best_step=1,
        scores={"exact_match": 50.0, "bleu": 12.5, "chrf": 3.0},
        routing={},
        notes=[],
    )
    assert (second.status, second.train_loss, second.best_eval_loss, second.scores) == ("unfinished", 4.5, None, {})
    assert (second.peak_memory_bytes, second.notes) == (2**20, ["result.json is missing."])
    assert (second.energy_joules, second.energy_source) == (None, "")


@pytest.mark.parametrize(
    ("metrics", "result", "cell"),
    [
        ([{**step(1, 4.0), "joules": 2500.0}], None, "2.5 kJ (so far)"),
        ([step(1, 4.0)], {**RESULT, "energy_joules": None, "energy_source": "a virtual machine"}, "not readable"),
        ([step(1, 4.0)], RESULT, "-"),
    ],
    ids=["unfinished", "not readable", "of a version that did not measure"],
)
def test_energy_is_what_the_run_says(
    make_run: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    metrics: list[dict[str, Any]],
    result: dict[str, Any] | None,
    cell: str,
) -> None:
    compare([make_run("a", metrics, result=result), make_run("b", SECOND)], output=tmp_path / "c.png")
    line = next(line for line in capsys.readouterr().out.splitlines() if "energy in steps" in line)
    assert line.split() == ["energy", "in", "steps", *cell.split(), "-"]


def test_answers_to_the_same_rows_stand_side_by_side(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        make_run("a", FIRST, answers={"One?": "1", "Two?": "2", "Only a?": "x"}),
        make_run("b", FIRST, answers={"Two?": "zwei", "One?": "eins"}),
        make_run("c", FIRST),
    ]
    samples = compare(runs, output=tmp_path / "c.png").samples
    assert [(sample.prompt, sample.answers) for sample in samples] == [
        ("One?", {"a": "1", "b": "eins", "c": None}),
        ("Two?", {"a": "2", "b": "zwei", "c": None}),
    ]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["Two?", "yes", "2", "zwei", "-"] in lines


def test_damaged_runs_are_shown_with_what_they_have(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [make_run(name, FIRST, result=RESULT, answers={"One?": "1"}) for name in ("a", "b", "c", "d")]
    (runs[1] / "config.yaml").write_text("train: [")
    (runs[1] / "result.json").write_text("{")
    (runs[2] / "metrics.jsonl").unlink()
    (runs[2] / "evaluation.json").write_text('{"samples": 3}')
    text = b'\xff\xfe\n{"step": 1, "loss": 4.0, "seconds": "soon"}\n{"step": 1, "eval_loss": [2]}\n{"step": 2, "lo'
    (runs[3] / "metrics.jsonl").write_bytes(text)
    (runs[3] / "result.json").write_text('{"status": "finished", "peak_memory_bytes": "much"}')
    found = compare(runs, output=tmp_path / "c.png")
    a, b, c, d = found.runs
    assert a.notes == [] and found.differences == {}
    assert len(b.notes) == 2 and "config.yaml:1" in b.notes[0] and "result.json" in b.notes[1]
    assert (b.status, b.train_loss) == ("unfinished", 3.0)
    assert len(c.notes) == 2 and "metrics.jsonl is missing" in c.notes[0] and "lorica eval" in c.notes[1]
    assert (c.status, c.steps, c.peak_memory_bytes) == ("finished", None, 3 * 2**20)
    assert (d.steps, d.train_loss, d.tokens, d.seconds, d.peak_memory_bytes) == (1, 4.0, None, None, None)
    assert "c: metrics.jsonl is missing." in capsys.readouterr().err


def test_runs_of_the_same_name_have_their_paths(make_run: Make, tmp_path: Path) -> None:
    runs = [make_run("x/run", FIRST), make_run("y/run", FIRST)]
    assert [run.name for run in compare(runs, output=tmp_path / "c.png").runs] == [str(run) for run in runs]


def test_what_is_no_run_is_refused_all_at_once(make_run: Make, tmp_path: Path) -> None:
    run = make_run("a", FIRST)
    with pytest.raises(ConfigError) as caught:
        compare([run, tmp_path / "nowhere", tmp_path])
    assert [line.split(" is no run")[0] for line in str(caught.value).splitlines()] == [
        str(tmp_path / "nowhere"),
        str(tmp_path),
    ]
    for runs in ([run], [run, run]):
        with pytest.raises(ConfigError, match="two different runs"):
            compare(runs)
    for picture, reason in ((tmp_path / "c.txt", r"ends in \.png"), (run / "metrics.jsonl" / "c.png", "cannot be")):
        with pytest.raises(ConfigError, match=reason):
            compare([run, make_run(picture.suffix[1:], FIRST)], output=picture)


def test_of_many_runs_each_is_a_row(make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five, of which one is given twice; a table of many columns fits no terminal."""
    runs = [make_run(name, FIRST, lr=lr) for name, lr in zip("abcde", (1e-3, 1e-3, 1e-3, 2e-3, 2e-3), strict=True)]
    found = compare([*runs, runs[0]], output=tmp_path / "new" / "c.svg")
    assert [run.name for run in found.runs] == list("abcde") and Path(found.picture).is_file()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["run", "train.lr"] in lines and ["d", "0.002"] in lines
    assert any(line[:4] == ["e", "unfinished", "2", "200"] for line in lines)


def test_the_picture_has_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def kept(figure: Any, *arguments: Any, **options: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", kept)
    draw_comparison({"a": FIRST, "_b$x^$": SECOND, "c": []}, tmp_path / "c.png")
    left, right = figures[0].axes
    assert [list(line.get_ydata()) for line in left.get_lines()] == [[4.0, 3.0], [5.0, 4.5], []]
    assert [list(line.get_ydata()) for line in right.get_lines()] == [[3.5, 3.75], [], []]
    (legend,) = figures[0].legends
    assert [text.get_text().replace("\\", "") for text in legend.get_texts()] == ["a", "_b$x^$", "c"]
    assert all(tick == int(tick) for tick in right.get_xticks())
    assert (tmp_path / "c.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_new_answers_are_those_that_generate_gives(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On evaluation rows of the first run; a run that cannot be opened has none, and says so."""
    other, broken = tmp_path / "other", tmp_path / "broken"
    for folder in (other, broken):
        shutil.copytree(finished, folder)
    (broken / "adapter" / "adapter_model.safetensors").unlink()
    monkeypatch.setattr(recipe, "draw_comparison", lambda curves, file: None)
    monkeypatch.setattr(recipe, "gc", SimpleNamespace(collect=lambda: 0))
    found = compare([finished, other, broken], samples=2)
    held_out = {example.messages[0].content for example in prepare(load_config(finished).config).eval_examples}
    assert len(found.samples) == 2 and {sample.prompt for sample in found.samples} <= held_out
    length = load_config(finished).config.eval.max_new_tokens
    for sample in found.samples:
        (answer,) = generate(finished, prompt=sample.prompt, max_new_tokens=length)
        assert sample.answers == {"finished": answer.response, "other": answer.response, "broken": None}
        assert sample.reference.startswith("It is ")
    assert any("does not answer" in note for note in found.runs[2].notes)
    assert found.runs[0].best_eval_loss == min(
        row["eval_loss"] for row in read_metrics(finished / "metrics.jsonl") if "eval_loss" in row
    )


def test_the_command_line(make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(make_run("a", FIRST)), str(make_run("b", FIRST, lr=0.5))]
    assert main(["compare", *runs, "--output", str(tmp_path / "c.png"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["differences"] == {"train.lr": {"a": 0.01, "b": 0.5}} and Path(document["picture"]).is_file()
    assert main(["compare", runs[0], str(tmp_path / "no")]) == 2
    capsys.readouterr()
    no_rows = make_run("c", FIRST, lr=0.25)
    file = no_rows / "config.yaml"
    file.write_text(file.read_text().replace("eval: 0.1", "eval: null"))
    assert main(["compare", str(no_rows), runs[0], "-o", str(tmp_path / "d.png"), "--samples", "1"]) == 2
    assert "no evaluation rows" in capsys.readouterr().err
