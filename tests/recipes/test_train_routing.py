"""What a run says of its routers: the figures of each evaluation and of the report against each row by itself and
scikit-learn, that looking changes nothing, and that runs without routers know nothing of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import normalized_mutual_info_score
from task_bases import WORDS, make_base

import lorica
from lorica.config import DataConfig, RunConfig, load_config
from lorica.data.rows import Example
from lorica.methods.gates import UNKNOWN
from lorica.recipes import heat_map
from lorica.recipes import routing as recipe
from lorica.recipes.compare import compare
from lorica.recipes.evaluate import EvaluationReport, evaluate
from lorica.recipes.intrinsic import Intrinsic
from lorica.recipes.opening import open_model
from lorica.recipes.preparing import prepare
from lorica.recipes.routing import MEANS, labelled, rows_to_watch
from lorica.recipes.train import TrainResult
from lorica.training.metrics import read_metrics

Config = Callable[..., RunConfig]
TASKS = ("sums", "spells")


def write_rows(file: Path, numbers: range) -> Path:
    sums = [{"prompt": f"What is {i} plus 3?", "response": f"It is {i + 3}.", "task": "sums"} for i in numbers]
    spells = [{"prompt": f"Spell {i}", "response": "a b c" * (i % 3 + 1), "task": "spells"} for i in numbers]
    rows = [*sums, *spells, {"prompt": "Who are you?", "response": "Nobody."}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def configure(make_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("rows")
    files = {
        "train": str(write_rows(folder / "train.jsonl", range(20))),
        "eval": str(write_rows(folder / "eval.jsonl", range(20, 26))),
    }

    def configure(output: Path, data: Any = None, method: Any = None, **train: Any) -> RunConfig:
        config = make_config(output, data={**files, **(data or {})}, **{"max_steps": 8, "epochs": 9.0, **train})
        options = {"rank": 2, "num_heads": 3, "dropout": 0.1, "temperature": 0.3, **(method or {})}
        return config.model_copy(update={"method": lorica.HydraLoRA(**options)})

    return configure


@contextmanager
def first_is_best() -> Iterator[None]:
    """The loss of each evaluation is said to be higher than the one before."""
    losses, real = iter([1.0, 2.0]), recipe.scores_and_routing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "scores_and_routing", lambda *a: {**real(*a), "loss": next(losses)})
        yield


@pytest.fixture(scope="module")
def run(configure: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 8 steps; the adapter is that of step 4."""
    folder = tmp_path_factory.mktemp("runs") / "hydra"
    with first_is_best():
        result = lorica.train(configure(folder))
    assert isinstance(result, TrainResult) and (result.status, result.adapter_step) == ("finished", 4)
    return folder


def by_hand(folder: Path) -> dict[str, tuple[torch.Tensor, np.ndarray[Any, Any]]]:
    """The adapter's gates [tokens, N] of each layer, each evaluation row by itself, and each token's task."""
    data = prepare(load_config(folder).config)
    model = open_model(folder)[0].eval()
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in lorica.adapters(model)}
    for name, layer in lorica.adapters(model).items():
        layer.watch = seen[name].append  # type: ignore[attr-defined]
    tasks: list[str | None] = []
    assert data.eval is not None
    for index, example in enumerate(data.eval_examples):
        ids = data.eval[index][0].astype(np.int64)
        tasks += [example.task] * len(ids)
        with torch.no_grad():
            model(input_ids=torch.from_numpy(ids)[None])
    return {name: (torch.cat(parts).double(), np.array(tasks, dtype=object)) for name, parts in seen.items()}


def test_the_file_is_of_the_adapter_and_every_row_of_it(run: Path) -> None:
    found, expected = json.loads((run / "routing.json").read_text()), by_hand(run)
    assert found["rows"] == "the 13 evaluation rows" and set(found["components"]) == set(TASKS)
    assert list(found["layers"]) == list(expected) and len(expected) == 14
    for name, (gates, tasks) in expected.items():
        layer = found["layers"][name]
        assert layer["mean_gates"] == pytest.approx(gates.mean(0).tolist(), abs=1e-5)
        tops = gates.argmax(1).numpy()
        assert layer["top_shares"] == pytest.approx((np.bincount(tops, minlength=3) / len(tops)).tolist(), abs=1e-5)
        named = np.isin(tasks.astype(str), TASKS)
        assert layer["nmi"] == pytest.approx(normalized_mutual_info_score(tasks[named], tops[named]), abs=1e-5)
        for task, part in zip(found["components"], layer["by_component"], strict=True):
            assert part == pytest.approx(gates[tasks == task].mean(0).tolist(), abs=1e-5)
    model = open_model(run)[0]
    for name, cosines in found["cosines"].items():
        heads = lorica.adapters(model)[name].heads().flatten(1).detach().double()  # type: ignore[attr-defined]
        pairs = [float(torch.cosine_similarity(heads[i], heads[j], dim=0)) for i, j in ((0, 1), (0, 2), (1, 2))]
        assert (cosines["mean"], cosines["least"]) == pytest.approx((fmean(pairs), min(pairs)), abs=1e-6)


def test_each_evaluation_has_the_means_and_the_console_shows_them(
    configure: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with first_is_best():
        lorica.train(configure(tmp_path / "run"))
    first, last = (row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in row)
    assert (first["step"], last["step"]) == (4, 8) and first["eval_nmi"] != last["eval_nmi"]
    # Those of the best step are of the weights that became the adapter.
    layers = json.loads((tmp_path / "run" / "routing.json").read_text())["layers"].values()
    assert {name: first[f"eval_{name}"] for name in MEANS} == {
        "routing_entropy": fmean(layer["row_entropy"] for layer in layers),
        "load_entropy": fmean(layer["load_entropy"] for layer in layers),
        "top_share": fmean(max(layer["top_shares"]) for layer in layers),
        "nmi": fmean(layer["nmi"] for layer in layers),
        "adjusted_nmi": fmean(layer["adjusted_nmi"] for layer in layers),
    }
    shown = capsys.readouterr().err
    assert all(f"eval_adjusted_nmi {row['eval_adjusted_nmi']:.4g}" in shown for row in (first, last))


def test_the_report_has_table_words_and_picture(run: Path) -> None:
    page = (run / "report.md").read_text(encoding="utf-8")
    assert "What the routers of 14 layers do on the 13 evaluation rows." in page and "Top heads follow the 2" in page
    assert "| mlp.down_proj | 2 |" in page and "| all | 14 |" in page and "![Loss and learning rate]" in page
    assert "![Mean gates by layer, head and component](routing.png)" in page
    assert (run / "routing.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_looking_changes_nothing(configure: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the same training with, without and with unwatched evaluation, and the same evaluation loss."""
    lorica.train(configure(tmp_path / "watched"))
    lorica.train(configure(tmp_path / "no rows", data={"eval": None}))
    monkeypatch.setattr(recipe, "is_routed", lambda model: False)
    lorica.train(configure(tmp_path / "unwatched"))
    rows = {f.name: read_metrics(f / "metrics.jsonl") for f in tmp_path.iterdir()}
    losses = {name: [row["loss"] for row in part if "loss" in row] for name, part in rows.items()}
    assert losses["watched"] == losses["no rows"] == losses["unwatched"] and len(losses["watched"]) == 8
    evaluated = {name: [row["eval_loss"] for row in part if "eval_loss" in row] for name, part in rows.items()}
    assert evaluated["watched"] == evaluated["unwatched"] and evaluated["no rows"] == []
    assert not (tmp_path / "unwatched" / "routing.json").exists()


def test_without_evaluation_rows_the_report_looks_at_training_rows(configure: Config, tmp_path: Path) -> None:
    lorica.train(configure(tmp_path / "run", data={"eval": None}, max_steps=2))
    found = json.loads((tmp_path / "run" / "routing.json").read_text())
    assert found["rows"] == "41 training rows, as none are held out" and len(found["layers"]) == 14
    page = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert "do on 41 training rows, as none are held out." in page


def test_a_resumed_run_says_the_same(configure: Config, tmp_path: Path, run: Path) -> None:
    with first_is_best():
        lorica.train(configure(tmp_path / "run"), stop_at=5)
        lorica.train(configure(tmp_path / "run"), resume="auto")
    folders = tmp_path / "run", run
    ours, theirs = ((folder / "routing.json").read_bytes() for folder in folders)
    assert ours == theirs
    means = [[row for row in read_metrics(f / "metrics.jsonl") if "eval_loss" in row] for f in folders]
    assert means[0] == means[1] and len(means[0]) == 2


@pytest.mark.parametrize(
    "method", [lorica.LoRA(rank=2), lorica.HydraLoRA(rank=2, gate="uniform")], ids=["lora", "even"]
)
def test_without_routers_nothing_is_looked_at(
    configure: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    for name in ("rows_to_watch", "watch_routing"):
        monkeypatch.setattr(recipe, name, None)
    monkeypatch.setattr(heat_map, "write_routing", None)
    lorica.train(configure(tmp_path / "run", max_steps=2).model_copy(update={"method": method}))
    assert not list((tmp_path / "run").glob("routing*"))
    assert not any("nmi" in key for row in read_metrics(tmp_path / "run" / "metrics.jsonl") for key in row)
    assert "Routing" not in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_rows_of_one_kind_have_no_agreement(configure: Config, tmp_path: Path, rows: Path) -> None:
    lorica.train(configure(tmp_path / "run", data={"train": str(rows), "eval": 0.2}, max_steps=2))
    found = json.loads((tmp_path / "run" / "routing.json").read_text())
    assert found["components"] == [] and all(layer["nmi"] is None for layer in found["layers"].values())
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert "eval_nmi" not in last and 0 < last["eval_routing_entropy"] < 1


def test_a_task_of_the_rows_gives_way_to_components() -> None:
    def example(task: str | None) -> Example:
        return Example((), "text", (), (), task, "rows.jsonl:1")

    rows = [example(task) for task in ("b", "a", None, "b")]
    labels, names = labelled(rows)
    assert (labels.tolist(), names) == ([0, 1, UNKNOWN, 0], ("b", "a"))
    components: Any = SimpleNamespace(terms=(("x", "y", "z", "v"), ("u",)))
    labels, names = labelled(rows, components, np.array([1, 0, -1, 0]))
    assert (labels.tolist(), names) == ([1, 0, UNKNOWN, 0], ("x y z", "u"))
    # One kind is nothing to agree with.
    assert labelled([example("a"), example("a"), example(None)])[1] == ()
    many = [example(f"task {n % 20}") for n in range(100)] + [example("common")] * 9
    labels, names = labelled(many)
    assert names[0] == "common" and len(names) == recipe.MAX_TASKS and labels.min() == UNKNOWN


def test_components_are_those_of_the_rows_that_are_looked_at(configure: Config, tmp_path: Path) -> None:
    data = prepare(configure(tmp_path))
    components: Any = SimpleNamespace(terms=(("one",), ("two",)))
    assert data.eval is not None
    train, evaluation = np.arange(len(data.train)) % 2, np.arange(len(data.eval)) % 2
    watched = rows_to_watch(data, Intrinsic(components, train, evaluation))
    assert watched.names == ("one", "two") and watched.components.tolist() == evaluation.tolist()
    bare = rows_to_watch(replace(data, eval=None), Intrinsic(components, train, None))
    assert bare.components.tolist() == train.tolist() and len(bare.dataset) == 41


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_classifiers_are_looked_at_and_encoder_decoders_are_not(tmp_path: Path, configure: Config, kind: str) -> None:
    make_base(kind, tmp_path / kind)
    file = tmp_path / "rows.jsonl"
    pairs = [(WORDS[i % 20], WORDS[i * 7 % 20]) for i in range(40)]
    keys = ("text", "label") if kind == "bert" else ("prompt", "response")
    lines = [dict(zip(keys, (f"{a} {b}", "yes" if i % 3 else "no"), strict=True)) for i, (a, b) in enumerate(pairs)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = configure(tmp_path / "run", max_steps=2)
    data = DataConfig(train=str(file), eval=0.3, max_length=24)
    model = config.model.model_copy(
        update={"base": str(tmp_path / kind), "task": "classification" if kind == "bert" else "auto"}
    )
    lorica.train(config.model_copy(update={"data": data, "model": model}))
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert ("eval_routing_entropy" in last) == (kind == "bert") == (tmp_path / "run" / "routing.png").exists()
    if kind == "bert":
        assert {"eval_loss", "eval_accuracy", "eval_macro_f1"} <= last.keys()


def test_eval_shows_the_table_on_the_same_rows(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = evaluate(run, generate=False)
    assert isinstance(report, EvaluationReport) and report.routing is not None
    written = json.loads((run / "routing.json").read_text())
    assert set(report.routing.components) == set(written["components"])
    for name, layer in report.routing.layers.items():
        assert layer.nmi == pytest.approx(written["layers"][name]["nmi"], abs=1e-9)
        assert layer.mean_gates == pytest.approx(written["layers"][name]["mean_gates"], abs=1e-6)
    assert json.loads((run / "evaluation.json").read_text())["routing"]["layers"].keys() == written["layers"].keys()
    out = capsys.readouterr().out
    assert "Routing on 13 rows of" in out and "Top heads follow the 2 components" in out


def test_compare_shows_the_means_of_those_that_have_them(
    run: Path, configure: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(tmp_path / "lora", max_steps=2)
    lorica.train(config.model_copy(update={"method": lorica.LoRA(rank=2)}))
    hydra, lora = compare([run, tmp_path / "lora"], output=tmp_path / "c.png").runs
    best = next(r for r in read_metrics(run / "metrics.jsonl") if r.get("eval_loss") == hydra.best_eval_loss)
    assert hydra.routing == {name: best[f"eval_{name}"] for name in MEANS} and lora.routing == {}
    line = next(line for line in capsys.readouterr().out.splitlines() if "adjusted NMI" in line)
    assert f"{best['eval_adjusted_nmi']:.4f}" in line and "-" in line
