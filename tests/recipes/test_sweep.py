"""`lorica sweep`: which arms there are, what halving stops, and that what it leaves running is not changed by it."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorica.cli import main
from lorica.config import RunConfig, dump_yaml, load_config
from lorica.errors import ConfigError, DivergedError, DoesNotFitError, LoricaError, StoppedError, TargetError
from lorica.recipes import pictures, report
from lorica.recipes import sweep as recipe
from lorica.recipes import train as train_recipe
from lorica.recipes.arms import arm_name, make_arms, split_values
from lorica.recipes.preparing import prepare
from lorica.recipes.sweep import ArmResult, SweepResult, sweep
from lorica.recipes.train import train
from lorica.training.checkpoint import find_checkpoints, read_checkpoint
from lorica.training.metrics import read_metrics

NUM_STEPS, RUNG = 12, 4
LRS = "train.lr=1e-5,1e-2,1e-3"
TIMING = ("seconds", "tokens_per_second", "peak_memory_bytes", "joules")
WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Drawing, reading the rows and collecting garbage each take longer than training here; other tests do them."""
    known: dict[str, Any] = {}

    def prepare_once(config: RunConfig) -> Any:
        rows = repr((config.model.base, config.data, config.train.seed))
        return known[rows] if rows in known else known.setdefault(rows, prepare(config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "prepare", prepare_once)
        patch.setattr(recipe, "gc", SimpleNamespace(collect=lambda: 0))
        patch.setattr(report, "draw_curves", lambda rows, file: file.write_bytes(b""))
        patch.setattr(recipe, "draw_sweep", lambda results, file: file.write_bytes(b""))
        yield


@pytest.fixture(scope="module")
def run_yaml(make_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps, evaluated at every fourth."""
    folder = tmp_path_factory.mktemp("sweeps")
    file = folder / "run.yaml"
    file.write_text(dump_yaml(make_config(folder / "run", epochs=1.0)), encoding="utf-8")
    assert load_config(file).config.train.eval_every == 4
    return file


@pytest.fixture(scope="module")
def swept(run_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """Three arms, of which halving leaves one; for reading only."""
    return sweep(run_yaml, [LRS, "method.rank=2"], output=tmp_path_factory.mktemp("sweeps") / "three")


def log(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(folder / "metrics.jsonl")]


def count_training(monkeypatch: pytest.MonkeyPatch, act: Callable[[int], None] = lambda number: None) -> list[Path]:
    """The folder of each call of `train`; `act` is called with its number first."""
    folders: list[Path] = []

    def counted(run: Any, **options: Any) -> Any:
        folders.append(Path(run.config.train.output))
        act(len(folders))
        return train(run, **options)

    monkeypatch.setattr(recipe, "train", counted)
    return folders


Act = Callable[[float, int], None]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[float, int]]]:
    """pretend(act): `train` only writes a log, in which 1e-2 is ahead of 1e-3 and 1e-5; `act` may raise before.

    Gives the list of its calls: learning rate and step.
    """

    def install(act: Act = lambda lr, step: None) -> list[tuple[float, int]]:
        calls: list[tuple[float, int]] = []

        def log_only(run: Any, *, resume: str, stop_at: int, data: Any) -> None:
            lr, folder = run.config.train.lr, Path(run.config.train.output)
            calls.append((lr, stop_at))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(run.dump_yaml())
            act(lr, stop_at)
            rows: list[dict[str, Any]] = [{"step": step, "loss": 9.0} for step in range(1, stop_at + 1)]
            for step in range(4, stop_at + 1, 4):
                loss = abs(math.log10(lr) + 2) + 1 / step if lr < 1 else None
                rows.append({"step": step, "eval_loss": loss})
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

        monkeypatch.setattr(recipe, "train", log_only)
        return calls

    return install


Pretend = Callable[..., list[tuple[float, int]]]


# Which arms there are


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1e-4,3e-4, 1e-3", ["1e-4", "3e-4", "1e-3"]),
        ("8", ["8"]),
        ("all-linear,[q_proj, v_proj]", ["all-linear", "[q_proj, v_proj]"]),
        ("{a: [1, 2], b: 3},{}", ["{a: [1, 2], b: 3}", "{}"]),
        ("'a,b',\"c]\"", ["'a,b'", '"c]"']),
        ("(q|v){1,2}_proj,k", ["(q|v){1,2}_proj", "k"]),
        ("it's,['],']", ["it's", "['],']"]),
        ("", [""]),
    ],
)
def test_a_comma_separates_values_unless_it_stands_inside_one(text: str, values: list[str]) -> None:
    assert split_values(text) == values


@pytest.mark.parametrize("text", ["[a,b", "'a", "1,,2", "1,"])
def test_what_is_no_list_of_values_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"lacks a closing|empty value"):
        split_values(text)


def test_the_arms_are_the_grid_in_its_order(run_yaml: Path) -> None:
    arms = make_arms(run_yaml, ["train.lr=1e-4,1e-3", "method.rank=8,16", "train.epochs=3"])
    assert [arm.name for arm in arms] == [f"lr={lr},rank={rank}" for lr in ("0.0001", "0.001") for rank in (8, 16)]
    last = arms[-1].run.config
    assert arms[-1].values == {"train.lr": 1e-3, "method.rank": 16}
    assert (last.train.lr, last.train.epochs) == (1e-3, 3.0)
    assert arms[-1].folder == run_yaml.parent / "run-sweep" / "lr=0.001,rank=16"


def test_a_key_inside_a_mapping_has_a_value_too(run_yaml: Path) -> None:
    arms = make_arms(run_yaml, ["method.rank_pattern.q_proj=2,16", "train.lr=0.5"])
    assert [(arm.name, arm.values) for arm in arms] == [
        ("q_proj=2", {"method.rank_pattern.q_proj": 2}),
        ("q_proj=16", {"method.rank_pattern.q_proj": 16}),
    ]


def test_more_samples_include_the_fewer(run_yaml: Path) -> None:
    axes = ["train.lr=1e-4,1e-3,1e-2", "method.rank=2,4,8"]
    whole = [arm.name for arm in make_arms(run_yaml, axes)]
    few, more = ([arm.name for arm in make_arms(run_yaml, axes, samples=n, seed=3)] for n in (3, 6))
    assert (len(few), len(more), len(whole)) == (3, 6, 9)
    assert set(few) < set(more) < set(whole) and more == [name for name in whole if name in more]
    assert few != [arm.name for arm in make_arms(run_yaml, axes, samples=3, seed=4)]
    with pytest.raises(ConfigError, match="10,000 arms"):
        make_arms(run_yaml, [f"{key}={','.join(map(str, range(1, 101)))}" for key in ("train.lr", "method.rank")])


def test_names_are_file_names_that_tell_values_apart() -> None:
    assert arm_name({"train.lr": 1e-4, "data.packing": True}) == "lr=0.0001,packing=true"
    assert arm_name({"train.eval": 1, "data.eval": 2}) == "train.eval=1,data.eval=2"
    lists = [arm_name({"method.targets": value}) for value in (["q", "v"], "q v", "q/v", "../q", "x" * 300)]
    assert len(set(lists)) == 5 and all(len(name) < 255 and "/" not in name for name in lists)


def test_all_faults_come_at_once_and_before_anything_runs(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = count_training(monkeypatch)
    with pytest.raises(ConfigError) as caught:
        sweep(run_yaml, ["train.lr=1e-4,-1,fast", "method.rank=8,0", "train.lrr=1"])
    lines = str(caught.value).splitlines()
    assert len(lines) == len(set(lines))
    for text in ("train.lr: ", "-1", "'fast'", "method.rank: ", "train.lrr: unknown key"):
        assert any(text in line for line in lines), text
    with pytest.raises(ConfigError) as caught:
        sweep(run_yaml, ["lr", "train.lr=[1", "method.rank=1,2", "method.rank=3,4"])
    assert len(str(caught.value).splitlines()) == 3
    assert folders == []


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        (["train.lr=1e-4"], "nothing to sweep"),
        (["train.output=a,b"], "train.output"),
        (["train.lr=1e-4,0.0001"], "given twice"),
        (["train.lr=1e-4,1e-3", "data.eval=null"], "data.eval"),
        (["data.loss_on=response,all"], "different tokens"),
        (["train.seed=1,2"], "different tokens"),
    ],
)
def test_sweeps_that_cannot_be_meant(run_yaml: Path, axes: list[str], text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=text):
        sweep(run_yaml, axes, output=tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


# Halving


def test_arms_that_fall_behind_stop_at_the_rung(swept: SweepResult) -> None:
    """A third of 12 steps is 4, which is an evaluation's step."""
    found = {arm.values["train.lr"]: arm for arm in swept.arms}
    losses = {lr: min(row["eval_loss"] for row in log(Path(arm.folder)) if "eval_loss" in row and row["step"] <= RUNG)
              for lr, arm in found.items()}  # fmt: skip
    assert min(losses, key=lambda lr: losses[lr]) == 1e-2
    assert {lr: (arm.status, arm.step) for lr, arm in found.items()} == {
        1e-2: ("finished", NUM_STEPS),
        1e-3: ("stopped", RUNG),
        1e-5: ("stopped", RUNG),
    }
    for lr in (1e-3, 1e-5):
        assert found[lr].eval_loss == losses[lr]
        assert [read_checkpoint(p).step for p in find_checkpoints(Path(found[lr].folder) / "checkpoints")][-1] == RUNG


def test_what_survives_and_what_is_resumed_equals_a_run_of_its_own(
    swept: SweepResult, run_yaml: Path, tmp_path: Path
) -> None:
    """Bit for bit: log, weights, optimizer, random state, adapter. A stopped arm goes on as an ordinary run."""
    for lr in (1e-2, 1e-5):
        alone, arm = tmp_path / f"{lr}", next(arm for arm in swept.arms if arm.values["train.lr"] == lr)
        train(load_config(run_yaml, [f"train.lr={lr}", "method.rank=2", f"train.output={alone}"]))
        folder = Path(arm.folder)
        if arm.status == "stopped":
            assert log(folder) == [row for row in log(alone) if row["step"] <= RUNG]
            assert main(["generate", str(folder), "--prompt", "What is 1 plus 1?", "--max-new-tokens", "2"]) == 0
            folder = tmp_path / "resumed"
            last = find_checkpoints(Path(arm.folder) / "checkpoints")[-1]
            train(load_config(arm.folder, [f"train.output={folder}"]), resume=last)
            assert log(folder) == [row for row in log(alone) if row["step"] > RUNG]
        else:
            assert log(folder) == log(alone)
        ours, theirs = (read_checkpoint(find_checkpoints(f / "checkpoints")[-1]) for f in (folder, alone))
        assert ours.step == theirs.step == NUM_STEPS
        assert all(torch.equal(t, theirs.tensors[k][name]) for k in ours.tensors for name, t in ours.tensors[k].items())
        assert (folder / WEIGHTS).read_bytes() == (alone / WEIGHTS).read_bytes()


def test_rungs_lie_on_evaluations_and_not_two_on_one(run_yaml: Path) -> None:
    nine = ["train.lr=1,2,3,4,5,6,7,8,9"]

    def rungs(*axes: str) -> tuple[list[int], list[int]]:
        jobs = recipe._prepare(make_arms(run_yaml, [*axes, "train.epochs=2"]))
        divisors = recipe._rungs(jobs)
        return divisors, [jobs[0].step_at(divisor) for divisor in divisors]

    # 24 / 9 is 2.7, and the next evaluation is at 4.
    assert rungs(*nine) == ([9, 3, 1], [4, 8, 24])
    assert rungs(*nine, "train.eval_every=3") == ([9, 3, 1], [3, 9, 24])
    assert rungs(*nine, "train.eval_every=8") == ([3, 1], [8, 24])
    assert rungs(*nine, "train.eval_every=24") == ([1], [24])
    assert rungs("train.lr=1,2") == ([1], [24])
    assert rungs("train.lr=1,2,3,4") == ([3, 1], [8, 24])


def test_without_halving_all_come_to_their_end_and_the_best_is_the_minimum(
    swept: SweepResult, monkeypatch: pytest.MonkeyPatch, run_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a copy of the halved sweep's folder: what had finished is not repeated, what was stopped goes on there."""
    folder = Path(swept.output).with_name("copy")
    shutil.copytree(swept.output, folder)
    folders = count_training(monkeypatch)
    result = sweep(run_yaml, [LRS, "method.rank=2"], output=folder, halving=False)
    assert sorted(path.name for path in folders) == ["lr=0.001", "lr=1e-05"]
    assert {(arm.status, arm.step) for arm in result.arms} == {("finished", NUM_STEPS)}
    lowest = {
        arm.name: min(row["eval_loss"] for row in log(Path(arm.folder)) if "eval_loss" in row) for arm in result.arms
    }
    assert {arm.name: arm.eval_loss for arm in result.arms} == lowest
    assert result.best == result.arms[0].name == min(lowest, key=lambda name: lowest[name]) == "lr=0.01"
    table = capsys.readouterr().out
    assert [line.split()[0] for line in table.splitlines()[4:7]] == ["0.01", "0.001", "1e-05"]


# What it leaves


def test_the_csv_has_every_arm_and_the_best_is_a_configuration(swept: SweepResult, tmp_path: Path) -> None:
    folder = Path(swept.output)
    rows = list(csv.DictReader((folder / "sweep.csv").open(encoding="utf-8")))
    assert [row["arm"] for row in rows] == [arm.name for arm in swept.arms] and len(rows) == 3
    assert [float(row["eval_loss"]) for row in rows] == [arm.eval_loss for arm in swept.arms]
    assert [(row["train.lr"], row["status"], row["step"]) for row in rows[:1]] == [("0.01", "finished", str(NUM_STEPS))]
    best = load_config(folder / "best.yaml").config
    assert (best.train.lr, best.train.output) == (1e-2, str(folder / "best"))
    assert main(["train", str(folder / "best.yaml"), "train.max_steps=1", f"train.output={tmp_path / 'best'}"]) == 0


def test_a_second_time_nothing_is_trained(swept: SweepResult, run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = count_training(monkeypatch)
    assert sweep(run_yaml, [LRS, "method.rank=2"], output=swept.output) == swept
    assert folders == []


def test_it_goes_on_after_an_interruption(run_yaml: Path, tmp_path: Path, pretend: Pretend) -> None:
    def interrupt(lr: float, step: int) -> None:
        if lr == 1e-3:
            raise StoppedError("A checkpoint was saved; --resume auto goes on from there.", 2)

    output = tmp_path / "sweep"
    pretend(interrupt)
    with pytest.raises(StoppedError, match=r"lr=0\.001: .* The same command goes on") as caught:
        sweep(run_yaml, [LRS], output=output)
    assert caught.value.exit_code == 130
    done = json.loads((output / "sweep.json").read_text())["arms"]
    assert {name: arm["step"] for name, arm in done.items()} == {"lr=1e-05": RUNG, "lr=0.01": RUNG}
    calls = pretend()
    goes_on = sweep(run_yaml, [LRS], output=output)
    assert calls == [(1e-3, RUNG), (1e-2, NUM_STEPS)]
    at_once = sweep(run_yaml, [LRS], output=tmp_path / "other")
    assert [replace(arm, folder="") for arm in goes_on.arms] == [replace(arm, folder="") for arm in at_once.arms]


def test_the_best_configuration_is_that_of_the_arm_whatever_becomes_of_the_file(
    run_yaml: Path, tmp_path: Path, pretend: Pretend
) -> None:
    file = tmp_path / "run.yaml"
    shutil.copy(run_yaml, file)
    pretend(lambda lr, step: file.write_text("train: {lr: 7}"))
    result = sweep(file, [LRS], output=tmp_path / "sweep")
    assert (
        load_config(result.best_config).config
        == load_config(run_yaml, ["train.lr=1e-2", f"train.output={tmp_path / 'sweep' / 'best'}"]).config
    )


def test_an_arm_that_lost_its_log_is_named(run_yaml: Path, tmp_path: Path, pretend: Pretend) -> None:
    pretend()
    sweep(run_yaml, [LRS], output=tmp_path / "sweep")
    (tmp_path / "sweep" / "lr=0.001" / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"lr=0\.001 has lost its metrics\.jsonl"):
        sweep(run_yaml, [LRS], output=tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep" / "lr=0.001")
    calls = pretend()
    sweep(run_yaml, [LRS], output=tmp_path / "sweep")
    assert calls == [(1e-3, RUNG)]


def test_another_sweep_in_the_folder_is_refused_and_more_values_are_fine(
    swept: SweepResult, run_yaml: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folders = count_training(monkeypatch)
    with pytest.raises(ConfigError) as caught:
        sweep(run_yaml, ["train.lr=1e-2,2e-2,3e-2", "method.rank=4", "train.warmup=2"], output=swept.output)
    for text in ("lr=1e-05 is not among", "lr=0.001 is not", "method.rank was 2, is 4", "train.warmup was 0.03, is 2"):
        assert text in str(caught.value)
    with pytest.raises(ConfigError, match="evaluation rows were others"):
        sweep(run_yaml, [LRS, "method.rank=2", "data.eval=0.2"], output=swept.output)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        sweep(run_yaml, [LRS], output=tmp_path)
    (tmp_path / "sweep.json").write_text('{"arms": {"a": 1}}')
    with pytest.raises(ConfigError, match="damaged"):
        sweep(run_yaml, [LRS], output=tmp_path)
    assert folders == []

    def stop(number: int) -> None:
        raise KeyboardInterrupt

    folders = count_training(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(run_yaml, [f"{LRS},2e-5", "method.rank=2"], output=swept.output)
    assert [path.name for path in folders] == ["lr=2e-05"]


# Arms that fail


def test_arms_that_fail_are_rows_with_a_reason(run_yaml: Path, tmp_path: Path, pretend: Pretend) -> None:
    """The arm that was ahead diverges after the rung: the next best one takes its place."""

    def fail(lr: float, step: int) -> None:
        if lr == 1e-2 and step == NUM_STEPS:
            raise DivergedError("the loss is NaN")
        if lr == 0.5:
            raise DoesNotFitError("too large")

    pretend(fail)
    result = sweep(run_yaml, [f"{LRS},0.5,7"], output=tmp_path / "sweep")
    # Two of five were kept, so one of them is left. 7 has no evaluation loss that is a number.
    assert [(arm.values["train.lr"], arm.status, arm.step) for arm in result.arms] == [
        (1e-3, "finished", NUM_STEPS),
        (1e-5, "stopped", RUNG),
        (1e-2, "diverged", RUNG),
        (7.0, "diverged", RUNG),
        (0.5, "does not fit", 0),
    ]
    assert [arm.eval_loss for arm in result.arms[2:]] == [None] * 3
    assert [arm.reason.split(";")[0] for arm in result.arms[2:]] == [
        "the loss is NaN",
        "None of its evaluation losses is a finite number",
        "too large",
    ]
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    assert rows[4]["reason"] == "too large" and rows[4]["eval_loss"] == ""


def test_the_next_best_takes_the_place_of_all_that_fail(run_yaml: Path, tmp_path: Path, pretend: Pretend) -> None:
    def fail(lr: float, step: int) -> None:
        if step == NUM_STEPS and lr != 1e-3:
            raise DivergedError("the loss is NaN")

    calls = pretend(fail)
    assert sweep(run_yaml, [LRS], output=tmp_path / "sweep").best == "lr=0.001"
    assert calls[3:] == [(1e-2, NUM_STEPS), (1e-3, NUM_STEPS)]
    # Halving is decided anew from what was recorded: that the first one failed later changes nothing before.
    assert sweep(run_yaml, [LRS], output=tmp_path / "sweep").best == "lr=0.001" and len(calls) == 5


def test_a_sweep_in_which_all_fail_says_where_the_reasons_are(run_yaml: Path, tmp_path: Path, pretend: Pretend) -> None:
    def fail(lr: float, step: int) -> None:
        if lr < 1:
            raise MemoryError

    pretend(fail)
    with pytest.raises(LoricaError, match=r"sweep\.csv"):
        sweep(run_yaml, [f"{LRS},7"], output=tmp_path / "sweep")
    rows = {row["arm"]: row for row in csv.DictReader((tmp_path / "sweep" / "sweep.csv").open())}
    assert rows.pop("lr=7.0")["status"] == "diverged"
    assert {(row["status"], row["reason"]) for row in rows.values()} == {("does not fit", "MemoryError")}
    assert not (tmp_path / "sweep" / "best.yaml").exists()


def test_a_loss_that_diverges_in_earnest(run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the loop: an evaluation that is not finite keeps an arm from being the best, a NaN step ends it."""
    result = sweep(run_yaml, ["train.lr=1e-2,1e30", "train.max_steps=8", "train.clip=1e30"], output=tmp_path / "sweep")
    assert [(arm.values["train.lr"], arm.status) for arm in result.arms] == [(1e-2, "finished"), (1e30, "diverged")]
    assert "lower train.lr" in result.arms[1].reason
    # After a single step nothing was NaN but the evaluation, and the adapter cannot be proved.
    with pytest.raises(LoricaError, match="No arm came to its end"):
        sweep(run_yaml, ["train.lr=1e29,1e30", "train.max_steps=1", "train.clip=1e30"], output=tmp_path / "one")
    rows = list(csv.DictReader((tmp_path / "one" / "sweep.csv").open()))
    assert [(row["status"], row["step"]) for row in rows] == [("diverged", "1")] * 2


# The picture and the command line


def arm(values: dict[str, Any], status: str, loss: float | None) -> ArmResult:
    return ArmResult("a", "f", values, status, 1, 1, loss, None, None, 0, 0.0, "")


@pytest.mark.parametrize(
    ("key", "values", "scale"),
    [
        ("train.lr", [1e-4, 3e-4, 1e-3], "log"),
        ("method.rank", [8, 16, 24], "linear"),
        ("method.targets", ["all-linear", ["q_proj", "v_proj"], None], "linear"),
    ],
)
def test_the_picture_shows_every_arm(key: str, values: list[Any], scale: str) -> None:
    from matplotlib.figure import Figure

    arms = [arm({key: values[0]}, "finished", 1.0), arm({key: values[1]}, "stopped", 2.0)]
    arms.append(arm({key: values[2]}, "diverged", None))
    panel = Figure().subplots()
    pictures._draw_key(panel, arms, key, [], {key: key})
    assert panel.get_xscale() == scale and panel.get_xlabel() == key
    marks = [(line.get_marker(), line.get_markerfacecolor()) for line in panel.get_lines()]
    assert sorted(mark for mark, _ in marks) == ["*", "o", "o", "x"] and ("o", "none") in marks
    assert len(panel.get_xticks()) == 3


def test_two_keys_make_lines_between_arms_that_were_trained_equally_far() -> None:
    """A colour for each value of the other key; solid between those at their end, which may be other steps."""
    from matplotlib.figure import Figure

    ends = {0.1: ("stopped", 4), 0.2: ("finished", 24), 0.3: ("stopped", 8), 0.4: ("finished", 20), 0.5: ("stopped", 4)}
    arms = [
        replace(arm({"train.lr": lr, "method.rank": rank}, status, lr + rank), step=step)
        for lr, (status, step) in ends.items()
        for rank in (16, 8)
    ]
    panel = Figure().subplots()
    names = {"train.lr": "lr", "method.rank": "rank"}
    pictures._draw_key(panel, arms, "train.lr", ["method.rank"], names)
    legend = panel.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["rank = 8", "rank = 16"]
    colours = [line.get_color() for line in legend.get_lines()]
    lines = [line for line in panel.get_lines() if len(list(line.get_xdata())) > 1]
    found = {(line.get_color(), line.get_linestyle(), *line.get_ydata()) for line in lines}
    assert found == {
        (colours[0], "-", 8.2, 8.4),
        (colours[0], ":", 8.1, 8.5),
        (colours[1], "-", 16.2, 16.4),
        (colours[1], ":", 16.1, 16.5),
    }


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    """Dollars are no TeX, which may be wrong TeX, and a leading underscore hides nothing."""
    from matplotlib.figure import Figure

    values = ["(q$|k$_^)", "_x", ["a$", "b$"]]
    arms = [arm({"method.targets": v, "train.lr": lr}, "finished", 1.0) for v in values for lr in (1e-4, 1.1e-4, 1e-2)]
    pictures.draw_sweep(arms, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    panel = Figure().subplots()
    pictures._draw_key(panel, arms, "train.lr", ["method.targets"], {"method.targets": "targets"})
    legend = panel.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()][2] == "targets = _x"
    # Two of the numbers are too near each other to be read on a logarithmic axis.
    assert list(panel.get_xticks()) == [0, 1, 2] and panel.get_xscale() == "linear"


def test_the_command_line(run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", str(run_yaml), "train.lr=1e-3,1e-2", "method.rank=2,4", "train.max_steps=2", "--samples", "2"]
    assert main([*words, "--output", str(tmp_path / "sweep"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["arms"]) == 2 and result["best"] == result["arms"][0]["name"]
    assert main(["sweep", str(run_yaml), "train.lr=1"]) == 2
    assert main(["sweep", str(run_yaml)]) == 2
    assert "Missing argument" in capsys.readouterr().err


def test_data_that_was_prepared_is_not_read_again(run_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = train_recipe.prepare

    def counted(config: RunConfig) -> Any:
        calls.append(config)
        return original(config)

    monkeypatch.setattr(recipe, "prepare", counted)
    monkeypatch.setattr(train_recipe, "prepare", counted)
    sweep(run_yaml, ["train.lr=1e-3,1e-2", "train.max_steps=1"])
    assert len(calls) == 1


def test_targets_that_match_nothing_are_told_before_anything_is_trained(
    run_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = count_training(monkeypatch)
    with pytest.raises(TargetError, match=r"no_such(.|\n)*nor_this"):
        sweep(run_yaml, ["method.targets=all-linear,[no_such],[nor_this]"], output=tmp_path / "sweep")
    assert folders == [] and not (tmp_path / "sweep").exists()
