"""`lorica train` as a whole. Numbers in docstrings are the reliability cases that a run is held to."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorica
from lorica.cli import main
from lorica.config import RunConfig, dump_yaml, load_config
from lorica.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    DoesNotFitError,
    LoricaError,
    ModelError,
    RunLockedError,
    TargetError,
)
from lorica.models.load import load_model
from lorica.recipes import report
from lorica.recipes import train as recipe
from lorica.recipes.opening import adapter_fault
from lorica.recipes.report import draw_curves
from lorica.training import checkpoint as checkpoints
from lorica.training import loop
from lorica.training import step as step_module
from lorica.training.checkpoint import find_checkpoints, read_checkpoint
from lorica.training.lock import RunLock
from lorica.training.metrics import read_metrics

Config = Callable[..., RunConfig]
TIMING = ("seconds", "tokens_per_second", "peak_memory_bytes", "joules")
NUM_STEPS = 24


def metrics(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the machine decides."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(folder / "metrics.jsonl")]


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in find_checkpoints(folder / "checkpoints")]


def same_run(ours: Path, theirs: Path) -> None:
    """Equal bit for bit: loss log, checkpoints with optimizer and random state, adapter; and nothing half is left."""
    assert metrics(ours) == metrics(theirs)
    # Killed after its last save, a run has not pruned.
    assert steps(ours)[-2:] == steps(theirs)[-2:]
    for path in find_checkpoints(theirs / "checkpoints"):
        a, b = read_checkpoint(ours / "checkpoints" / path.name).tensors, read_checkpoint(path).tensors
        assert all(a[stem].keys() == b[stem].keys() for stem in checkpoints.REQUIRED)
        assert all(torch.equal(tensor, b[stem][name]) for stem in a for name, tensor in a[stem].items())
    weights = "adapter/adapter_model.safetensors"
    assert (ours / weights).read_bytes() == (theirs / weights).read_bytes()
    assert [path.name for path in ours.rglob(".*")] == []


def content(folder: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of change of every file but the lock, which is taken to look."""
    return {
        str(file): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in folder.rglob("*")
        if file.is_file() and file.name != "lock"
    }


def start_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its process id. 99 is its exit code after an exception."""
    pid = os.fork()
    if pid == 0:
        try:
            # The pool of a forked parent has no threads in the child.
            torch.set_num_threads(1)
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(99)
    return pid


def exit_code(pid: int) -> int:
    """Wait for a child; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def in_child(work: Callable[[], object]) -> int:
    return exit_code(start_child(work))


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(owner: Any, name: str, act: Callable[[int], None]) -> None:
    """Call `act(n)` before the n-th call, counted from 0, of `owner.name`; for good, so in a child only."""
    original, count = getattr(owner, name), iter(range(10**9))

    def wrapped(*arguments: Any, **options: Any) -> Any:
        act(next(count))
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def kill_before(owner: Any, name: str, number: int = 0) -> None:
    before_call(owner, name, lambda count: kill_self() if count == number else None)


@pytest.fixture(autouse=True, scope="module")
def _no_pictures() -> Iterator[None]:
    """Drawing takes longer than training here; `test_a_run_leaves_its_whole_folder` undoes this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_curves", lambda rows, file: file.write_bytes(b""))
        yield


@pytest.fixture
def refuse_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails here must fail before the weights are read."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(recipe, "load_with_head", refuse)


@pytest.fixture(scope="module")
def straight(make_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with dropout and accumulation."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    lorica.train(make_config(folder, micro_batch_tokens=64))
    assert [row["step"] for row in metrics(folder) if "loss" in row] == list(range(1, NUM_STEPS + 1))
    return folder


# What a run leaves behind


def test_a_run_leaves_its_whole_folder(make_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_curves", draw_curves)
    folder = tmp_path / "run"
    config = make_config(folder)
    result = lorica.train(config)
    assert {path.name for path in folder.iterdir()} - {"tensorboard"} == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "curves.png",
        "environment.json",
        "lock",
        "metrics.jsonl",
        "report.md",
        "result.json",
    }
    assert load_config(folder).config == config
    assert json.loads((folder / "result.json").read_text()) == vars(result)
    assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__
    assert (result.status, result.steps, result.read_back_difference) == ("finished", NUM_STEPS, 0.0)
    assert result.train_samples + result.eval_samples == 64
    evaluations = [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row]
    assert result.eval_loss == min(evaluations) < math.log(8192) - 0.2
    assert f"| evaluation loss, best | {result.eval_loss:.4g} |" in (folder / "report.md").read_text()
    assert (folder / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    files = [file for file in folder.rglob("*") if file.is_file() and "tensorboard" not in file.parts]
    assert not {file.suffix for file in files} & {".pt", ".bin", ".pkl", ".pickle"}


def test_the_adapter_has_the_weights_of_the_best_evaluation(
    make_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14: the best checkpoint outlives pruning to one."""
    losses = iter([3.0, 1.0, 2.0, math.nan, 1.5, 1.1])
    monkeypatch.setattr(recipe, "make_evaluation", lambda *_: lambda: {"loss": next(losses), "perplexity": 1.0})
    result = lorica.train(make_config(tmp_path / "run", keep_checkpoints=1, save_every=100))
    assert (result.adapter_step, result.eval_loss, result.steps) == (8, 1.0, NUM_STEPS)
    assert steps(tmp_path / "run") == [8, NUM_STEPS]
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    trained = {
        step: read_checkpoint(checkpoints.checkpoint_path(tmp_path / "run" / "checkpoints", step)).tensors["trainable"]
        for step in (8, NUM_STEPS)
    }
    name = "model.layers.0.self_attn.q_proj"
    saved = adapter[f"base_model.model.{name}.lora_B.weight"]
    assert torch.equal(saved, trained[8][f"{name}.lora_b"])
    assert not torch.equal(saved, trained[NUM_STEPS][f"{name}.lora_b"])


def test_early_stopping_ends_the_run_and_nothing_is_left_to_do(
    make_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(recipe, "make_evaluation", lambda *_: lambda: {"loss": next(losses), "perplexity": 1.0})
    config = make_config(tmp_path / "run", early_stopping=2)
    result = lorica.train(config)
    assert (result.status, result.steps, result.adapter_step) == ("stopped early", 12, 4)
    assert lorica.train(config, resume="auto").status == "nothing to do"


def test_a_paused_run_has_an_adapter_and_goes_on_as_if_it_had_not_paused(
    make_config: Config, tmp_path: Path, straight: Path
) -> None:
    """At a step that is neither an evaluation's nor a checkpoint's; the schedule is that of the whole run."""
    config = make_config(tmp_path / "run", micro_batch_tokens=64)
    for _ in range(2):
        paused = lorica.train(config, resume="auto", stop_at=10)
        assert (paused.status, paused.steps, paused.adapter_step) == ("paused", 10, 8)
        assert metrics(tmp_path / "run") == [row for row in metrics(straight) if row["step"] <= 10]
        assert adapter_fault(tmp_path / "run" / "adapter") is None
    result = lorica.train(config, resume="auto", stop_at=NUM_STEPS + 1)
    assert (result.status, result.steps) == ("finished", NUM_STEPS)
    same_run(tmp_path / "run", straight)


def test_a_run_without_evaluation_gives_the_last_weights(make_config: Config, tmp_path: Path) -> None:
    result = lorica.train(make_config(tmp_path / "run", data={"eval": None}, max_steps=4))
    assert (result.eval_loss, result.eval_samples, result.adapter_step, result.train_samples) == (None, 0, 4, 64)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Notes the adapted model as the loop receives it: its logits, and the frozen tensors before and after."""
    seen: dict[str, Any] = {"ids": torch.arange(40, 60)[None]}
    original = recipe.run_loop

    def frozen(model: Any) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}

    def run_loop(model: Any, *arguments: Any, **options: Any) -> Any:
        with torch.no_grad():
            seen["logits"] = model.eval()(input_ids=seen["ids"]).logits
        seen["before"] = frozen(model)
        result = original(model, *arguments, **options)
        seen["after"] = frozen(model)
        return result

    monkeypatch.setattr(recipe, "run_loop", run_loop)
    return seen


def test_the_base_is_where_training_starts_and_is_never_written(
    make_config: Config, tiny_base: Path, tmp_path: Path, watched: dict[str, Any]
) -> None:
    """19: the logits before the first step are the base's. 21: frozen weights and the base's files do not change."""
    files = content(tiny_base)
    lorica.train(make_config(tmp_path / "run", method={"targets": ("q_proj", "up_proj", "embed_tokens")}))
    with torch.no_grad():
        plain = load_model(tiny_base, dtype="float32", device="cpu")(input_ids=watched["ids"]).logits
    assert torch.equal(watched["logits"], plain)
    assert watched["before"].keys() == watched["after"].keys() and len(watched["before"]) > 15
    assert all(torch.equal(tensor, watched["after"][name]) for name, tensor in watched["before"].items())
    assert content(tiny_base) == files


def test_how_a_step_is_computed_does_not_change_it(make_config: Config, tmp_path: Path, straight: Path) -> None:
    """16: micro batches, padding and activation checkpointing give the first step that one packed batch gives."""
    variants: dict[str, dict[str, Any]] = {
        "whole": {},
        "accumulated": {"micro_batch_tokens": 64},
        "checkpointed": {"activation_checkpointing": True},
    }
    first = {}
    for name, changes in variants.items():
        lorica.train(make_config(tmp_path / name, method={"dropout": 0.0}, max_steps=2, **changes))
        first[name] = metrics(tmp_path / name)[0]
    for row in first.values():
        assert row["loss"] == pytest.approx(first["whole"]["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(first["whole"]["grad_norm"], rel=1e-5)
    # Dropout is drawn again alike when activations are computed a second time.
    for how in (True, "offload"):
        lorica.train(make_config(tmp_path / f"{how}", micro_batch_tokens=64, activation_checkpointing=how))
        assert metrics(tmp_path / f"{how}") == metrics(straight)


# Killed and resumed


def test_killed_where_it_hurts_the_resumed_run_is_the_same_run(
    make_config: Config, tmp_path: Path, straight: Path
) -> None:
    """2, 3, 4: one run killed in the middle of an epoch, inside an accumulation window, at an epoch's end, at the last
    step, before the adapter has its name, and before the result is written."""
    folder = tmp_path / "run"
    config = make_config(folder, micro_batch_tokens=64)
    first_epoch = next(row["step"] for row in metrics(straight) if row["epoch"] == 1.0)
    assert 5 < 7 < first_epoch < NUM_STEPS

    def at_step(step: int) -> Callable[[], None]:
        def act(_: int) -> None:
            if metrics(folder)[-1:] and metrics(folder)[-1]["step"] == step:
                kill_self()

        return lambda: before_call(loop, "_is_due", act)

    def inside_step() -> None:
        # Its batches are made and its learning rate is set; the fifth step from where it resumed.
        kill_before(step_module, "_accumulate_gradients", 4)

    for wound in (
        at_step(5),
        inside_step,
        at_step(first_epoch),
        at_step(NUM_STEPS),
        lambda: kill_before(recipe, "load_adapter"),
        lambda: kill_before(recipe, "write_run_report"),
    ):

        def work(wound: Callable[[], None] = wound) -> None:
            wound()
            lorica.train(config, resume="auto")

        assert in_child(work) == -signal.SIGKILL
        assert not (folder / "result.json").exists()
    assert lorica.train(config, resume="auto").resumed_from_step == NUM_STEPS
    same_run(folder, straight)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments_the_resumed_run_is_the_same_run(
    make_config: Config, tmp_path: Path, seed: int
) -> None:
    """1, 2: with dropout, accumulation and offloaded activations; by the clock, and at calls that touch files."""
    how = False if seed else "offload"
    changes: dict[str, Any] = {"micro_batch_tokens": 64, "activation_checkpointing": how, "seed": seed}
    lorica.train(make_config(tmp_path / "straight", **changes))
    folder, chance, kills = tmp_path / "run", random.Random(seed), 0
    config = make_config(folder, **changes)
    for number in range(4):
        fatal = chance.randrange(20, 150)

        def work(fatal: int = fatal, by_clock: bool = number % 2 == 1) -> None:
            count = iter(range(10**9))
            for owner, name in (
                (os, "fsync"),
                (os, "rename"),
                (os, "replace"),
                (os, "unlink"),
                (checkpoints, "save_file"),
            ):
                if not by_clock:
                    before_call(owner, name, lambda _: kill_self() if next(count) == fatal else None)
            lorica.train(config, resume="auto")

        pid = start_child(work)
        if number % 2 == 1:
            time.sleep(chance.uniform(0.2, 0.7))
            os.kill(pid, signal.SIGKILL)
        code = exit_code(pid)
        assert code in (0, -signal.SIGKILL)
        kills += code != 0
    assert kills > 0
    lorica.train(config, resume="auto")
    same_run(folder, tmp_path / "straight")


def test_a_save_that_was_killed_is_named_and_the_checkpoint_before_it_used(
    make_config: Config, tmp_path: Path, straight: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """1: and says so."""
    folder = tmp_path / "run"
    config = make_config(folder, micro_batch_tokens=64)

    def work() -> None:
        # Checkpoints are saved at steps 3, 4 (an evaluation) and 6; the third is left without its name.
        kill_before(checkpoints, "_publish", 2)
        lorica.train(config)

    assert in_child(work) == -signal.SIGKILL
    assert steps(folder) == [3, 4]
    capfd.readouterr()
    assert lorica.train(config, resume="auto").resumed_from_step == 4
    said = capfd.readouterr().err
    assert "step-00000006" in said and "interrupted" in said
    assert f"Going on from {folder / 'checkpoints' / 'step-00000004'}." in said
    same_run(folder, straight)


@pytest.fixture
def stopped(make_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[RunConfig, Path]:
    """A run with checkpoints at 6 and 8, where it ran out of memory."""
    config = make_config(tmp_path / "run", micro_batch_tokens=64, data={"eval": 0.1}, eval_every=4)
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "make_loss", failing_loss(tmp_path / "run", 8, torch.OutOfMemoryError("out of memory")))
        with pytest.raises(DoesNotFitError):
            lorica.train(config)
    assert steps(tmp_path / "run") == [6, 8]
    return config, tmp_path / "run"


def failing_loss(folder: Path, step: int, fault: BaseException) -> Callable[[Any], Any]:
    """In the place of `make_loss`: a loss that raises `fault` after `step` steps."""
    from lorica.models.loss import make_loss

    def make(model: Any) -> Any:
        loss_fn = make_loss(model)

        def loss(model: Any, inputs: Mapping[str, Any], targets: Any) -> Any:
            if any(row["step"] == step for row in read_metrics(folder / "metrics.jsonl")) and torch.is_grad_enabled():
                raise fault
            return loss_fn(model, inputs, targets)

        return loss

    return make


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_a_damaged_checkpoint_is_refused_by_name(
    stopped: tuple[RunConfig, Path], name: str, damage: str, refuse_models: None
) -> None:
    """5, 6: an explicit path fails."""
    config, folder = stopped
    damaged = folder / "checkpoints" / "step-00000008"
    spoil(damaged / name, damage)
    with pytest.raises(CheckpointError, match=name):
        lorica.train(config, resume=damaged)
    assert steps(folder) == [6, 8]


def spoil(file: Path, damage: str) -> None:
    if damage == "missing":
        file.unlink()
        return
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 0x10
    file.write_bytes(whole)


def test_the_automatic_resume_falls_back_and_says_so(
    stopped: tuple[RunConfig, Path], straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """5: and the run that follows is the same run."""
    config, folder = stopped
    spoil(folder / "checkpoints" / "step-00000008" / "optimizer.safetensors", "flipped")
    assert lorica.train(config, resume="auto").resumed_from_step == 6
    said = capsys.readouterr().err
    assert "step-00000008" in said and "optimizer.safetensors is damaged" in said
    same_run(folder, straight)


def test_without_one_whole_checkpoint_nothing_is_started_anew(
    stopped: tuple[RunConfig, Path], refuse_models: None
) -> None:
    config, folder = stopped
    for path in find_checkpoints(folder / "checkpoints"):
        spoil(path / "rng.safetensors", "flipped")
    with pytest.raises(CheckpointError, match="None of the 2 checkpoints"):
        lorica.train(config, resume="auto")


def test_a_fork_at_the_best_step_keeps_the_best_weights(
    stopped: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Resumed into another folder, the checkpoint that it goes on from comes along: its weights may stay the best."""
    _, folder = stopped
    source = read_checkpoint(folder / "checkpoints" / "step-00000008")
    assert source.state["counters"]["best_step"] == 8
    fork = tmp_path / "fork"
    config = load_config(folder, [f"train.output={fork}", "train.keep_checkpoints=1"]).config
    monkeypatch.setattr(recipe, "make_evaluation", lambda *_: lambda: {"loss": 99.0, "perplexity": 1.0})
    result = lorica.train(config, resume=source.path)
    assert (result.adapter_step, result.eval_loss) == (8, source.state["counters"]["best_loss"])
    assert steps(fork) == [8, NUM_STEPS]
    adapter = load_file(fork / "adapter" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(adapter[f"base_model.model.{name}.lora_B.weight"], source.tensors["trainable"][f"{name}.lora_b"])


def test_a_fork_beyond_the_best_step_has_a_best_of_its_own(
    make_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, 2.0, 3.0, 5.0, 4.0, 6.0, 5.0, 4.0, 6.0])
    monkeypatch.setattr(recipe, "make_evaluation", lambda *_: lambda: {"loss": next(losses), "perplexity": 1.0})
    lorica.train(make_config(tmp_path / "run", keep_checkpoints=99))
    later = checkpoints.checkpoint_path(tmp_path / "run" / "checkpoints", 12)
    result = lorica.train(make_config(tmp_path / "fork"), resume=later)
    assert (result.adapter_step, result.eval_loss) == (20, 4.0)


def test_checkpoints_of_two_runs_never_share_a_folder(stopped: tuple[RunConfig, Path], tmp_path: Path) -> None:
    config, folder = stopped
    copied = tmp_path / "elsewhere" / "step-00000008"
    shutil.copytree(folder / "checkpoints" / "step-00000008", copied)
    before = content(folder)
    with pytest.raises(CheckpointError, match="another run than"):
        lorica.train(config, resume=copied)
    assert content(folder) == before
    with pytest.raises(CheckpointError, match="is no checkpoint: it has no manifest"):
        lorica.train(config, resume=folder)


def test_changed_rows_need_a_word(
    stopped: tuple[RunConfig, Path], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """9."""
    _, folder = stopped
    more = tmp_path / "more.jsonl"
    more.write_text(rows.read_text() + '{"prompt": "What is 9 plus 9?", "response": "It is 18."}\n')
    config = load_config(folder, [f"data.train={more}"]).config
    with pytest.raises(CheckpointError, match=r"(?s)data\.train: .*--allow-data-change"):
        lorica.train(config, resume="auto")
    assert lorica.train(config, resume="auto", allow_data_change=True).resumed_from_step == 8
    assert "Resuming with a change: data.train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("method.rank=8", "method.rank: 4 in the checkpoint, 8 now"),
        ("method.targets=q_proj", "method.targets: 'all-linear' in the checkpoint, 'q_proj' now"),
        ("train.seed=1", "order.seed: 0 in the checkpoint, 1 now"),
        ("data.packing=false", "order.padded: False in the checkpoint, True now"),
        ("data.loss_on=all", "data.train: "),
    ],
)
def test_another_run_is_refused_with_the_difference(
    stopped: tuple[RunConfig, Path], change: str, difference: str, refuse_models: None
) -> None:
    """10."""
    _, folder = stopped
    before = content(folder)
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        lorica.train(load_config(folder, [change]).config, resume="auto")
    assert difference in str(caught.value)
    assert content(folder) == before


def test_another_base_is_refused(
    stopped: tuple[RunConfig, Path], save_base: Callable[[Any], Path], tiny_base: Path
) -> None:
    from transformers import AutoConfig

    _, folder = stopped
    other = AutoConfig.from_pretrained(tiny_base)
    other.initializer_range = 0.05
    config = load_config(folder, [f"model.base={save_base(other)}"]).config
    with pytest.raises(CheckpointError, match=r"model\.fingerprint"):
        lorica.train(config, resume="auto")


def test_another_learning_rate_is_said_aloud(
    stopped: tuple[RunConfig, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """10."""
    _, folder = stopped
    lorica.train(load_config(folder, ["train.lr=0.02", "train.max_steps=10"]).config, resume="auto")
    said = capsys.readouterr().err
    assert "settings.lr: 0.01 in the checkpoint, 0.02 now" in said
    assert "settings.max_steps: None in the checkpoint, 10 now" in said


def test_a_finished_run_has_nothing_to_do(
    finished: Path, refuse_models: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """11: exit code 0, and no file is touched."""
    before = content(finished)
    assert main(["train", str(finished), "--resume", "auto", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["status"] == "nothing to do" and "Nothing to do" in err
    assert content(finished) == before
    with pytest.raises(CheckpointError, match="--resume auto"):
        lorica.train(finished)
    assert content(finished) == before


def test_a_result_of_another_version_is_made_again(tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    config = load_config(finished, [f"train.output={tmp_path / 'run'}"]).config
    (tmp_path / "run" / "result.json").write_text('{"status": "finished"}')
    result = lorica.train(config, resume="auto")
    assert (result.status, result.resumed_from_step) == ("finished", NUM_STEPS)
    same_run(tmp_path / "run", finished)


def test_a_result_that_says_nothing_of_energy_is_read(tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "result.json"
    result = json.loads(file.read_text())
    del result["energy_joules"], result["energy_source"]
    file.write_text(json.dumps(result))
    config = load_config(finished, [f"train.output={tmp_path / 'run'}"]).config
    again = lorica.train(config, resume="auto")
    assert (again.status, again.energy_joules) == ("nothing to do", None) and "did not measure" in again.energy_source


def test_a_moved_run_does_not_start_anew_in_its_old_place(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "moved")
    with pytest.raises(
        ConfigError, match=rf"it was moved or copied\. Say where .* train\.output={tmp_path / 'moved'}\."
    ):
        lorica.train(tmp_path / "moved", resume="auto")
    here = [str(tmp_path / "moved"), f"train.output={tmp_path / 'moved'}", "--resume", "auto"]
    assert main(["train", *here]) == 0
    # A configuration of one's own may have any name.
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    assert lorica.train(tmp_path / "config.yaml", resume="auto").status == "nothing to do"


def test_a_finished_run_writes_a_cut_off_adapter_again(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    config = load_config(finished, [f"train.output={tmp_path / 'run'}"]).config
    weights = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert lorica.train(config, resume="auto").status == "finished"
    assert f"{weights} is damaged or cut off" in capsys.readouterr().err
    same_run(tmp_path / "run", finished)


def test_a_finished_run_can_be_made_longer(make_config: Config, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", max_steps=6)
    lorica.train(config)
    longer = load_config(tmp_path / "run", ["train.max_steps=9"]).config

    def work() -> None:
        kill_before(recipe, "write_run_report")
        lorica.train(longer, resume="auto")

    assert in_child(work) == -signal.SIGKILL
    # Nothing may take the result of the shorter run for that of the longer one.
    assert lorica.train(longer, resume="auto").status == "finished"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_leaves_with_its_code(
    make_config: Config, tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    """12: and the run goes on afterwards. Once as a fork, which starts fast, once as the user's own command."""
    folder, file = tmp_path / "run", tmp_path / "run.yaml"
    file.write_text(dump_yaml(make_config(folder, epochs=2000.0, save_every=10**6, eval_every=10**6)))
    words = ["train", str(file)]
    if number == signal.SIGTERM:
        pid = start_child(lambda: os._exit(main(words)))
    else:
        pid = subprocess.Popen([sys.executable, "-m", "lorica", *words]).pid
    deadline = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or len(read_metrics(folder / "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(pid, number)
    assert exit_code(pid) == 128 + number
    said = capfd.readouterr().err
    assert "A checkpoint was saved; --resume auto goes on" in said and "Traceback" not in said
    (saved,) = steps(folder)
    assert saved == metrics(folder)[-1]["step"]
    more = load_config(folder, [f"train.max_steps={saved + 2}"]).config
    assert lorica.train(more, resume="auto").resumed_from_step == saved


def test_one_process_a_run_folder_and_a_dead_one_does_not_count(make_config: Config, tmp_path: Path) -> None:
    """13."""
    ready, told = os.pipe()

    def work() -> None:
        with RunLock(tmp_path / "run"):
            os.write(told, b".")
            time.sleep(60)

    pid = start_child(work)
    os.read(ready, 1)
    config = make_config(tmp_path / "run", max_steps=2)
    with pytest.raises(RunLockedError, match=f"process {pid} ") as caught:
        lorica.train(config)
    assert caught.value.exit_code == 1
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL
    assert lorica.train(config).steps == 2


# What cannot be trained


def test_an_output_that_cannot_be_written_is_refused_first(
    make_config: Config, tmp_path: Path, refuse_models: None
) -> None:
    """8."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"Cannot write in the run folder .*train\.output"):
        lorica.train(make_config(tmp_path / "file" / "run"))


def test_a_full_disk_leaves_what_was_saved(
    make_config: Config, tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7."""
    config, calls, original = make_config(tmp_path / "run", micro_batch_tokens=64), [], checkpoints.save_file

    def save_file(tensors: Any, file: Path) -> None:
        calls.append(file)
        if len(calls) > 7:
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        original(tensors, file)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", save_file)
        with pytest.raises(CheckpointError, match=r"No space left on device.* free some space"):
            lorica.train(config)
    assert steps(tmp_path / "run") == [3, 4]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003", "step-00000004"]
    assert lorica.train(config, resume="auto").resumed_from_step == 4
    same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_an_absurd_learning_rate_diverges(make_config: Config, tmp_path: Path, on_nan: str) -> None:
    """17: the checkpoint before stays, and its weights are numbers."""
    config = make_config(tmp_path / "run", lr=1e30, save_every=1, warmup=0.0, on_nan=on_nan, data={"eval": None})
    with pytest.raises(DivergedError, match=r"The last good checkpoint is .*Try a lower train\.lr") as caught:
        lorica.train(config)
    assert caught.value.exit_code == 5
    last = read_checkpoint(find_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    assert all(bool(tensor.isfinite().all()) for tensor in last.tensors["trainable"].values())
    row = metrics(tmp_path / "run")[-1]
    assert row["loss"] is None and "nan" in row["skipped"]
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_base_with_a_poisoned_weight_diverges(
    make_config: Config, tiny_base: Path, save_base: Callable[[Any], Path], tmp_path: Path
) -> None:
    """17."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(tiny_base)
    config.tie_word_embeddings = False
    poisoned = save_base(config)
    tensors = load_file(poisoned / "model.safetensors")
    # A word of every row.
    tensors["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(tiny_base)(" plus").input_ids] = math.nan
    save_file(tensors, poisoned / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(make_config(tmp_path / "run", base=poisoned)))
    assert main(["train", str(file)]) == 5
    assert steps(tmp_path / "run") == []


def test_running_out_of_memory_leaves_with_advice_and_whole_checkpoints(
    make_config: Config,
    tmp_path: Path,
    straight: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """23."""
    folder, file = tmp_path / "run", tmp_path / "run.yaml"
    file.write_text(dump_yaml(make_config(folder, micro_batch_tokens=64)))
    fault = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "make_loss", failing_loss(folder, 7, fault))
        assert main(["train", str(file)]) == 4
    said = capsys.readouterr().err
    assert "train.micro_batch_tokens=32" in said and "activation_checkpointing" in said
    assert steps(folder) == [4, 6] and list((folder / "checkpoints").glob(".*")) == []
    assert not (folder / "adapter").exists()
    lorica.train(file, resume="auto")
    same_run(folder, straight)


@pytest.mark.parametrize(
    ("text", "changes", "says"),
    [
        ("", {}, "holds no rows"),
        (None, {"max_length": 4}, "of 64 rows 64 too_long"),
        ('{"prompt": "a", "response": "b"}\nbroken\n', {}, r"rows\.jsonl:2"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', {}, r"rows\.jsonl:1"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}\n',
            {"eval": None},
            r"rows\.jsonl:1.*every loss weight is 0",
        ),
        ('{"prompt": "a", "response": "b"}\n', {}, "cannot hold out rows"),
    ],
    ids=["empty", "too long", "broken", "no answer", "masked", "one row"],
)
def test_data_that_cannot_be_trained_on(
    make_config: Config,
    rows: Path,
    tmp_path: Path,
    refuse_models: None,
    text: str | None,
    changes: dict[str, Any],
    says: str,
) -> None:
    """18, 28, 29, 30: an error with exit code 3, never a run of no steps."""
    file = tmp_path / "rows.jsonl"
    file.write_text(rows.read_text() if text is None else text)
    with pytest.raises(DataError, match=says) as caught:
        lorica.train(make_config(tmp_path / "run", data={"train": str(file), **changes}))
    assert caught.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rows_in_both_sets_are_counted(make_config: Config, rows: Path, tmp_path: Path, capsys: Any) -> None:
    """33."""
    held_out = tmp_path / "held_out.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    held_out.write_text("".join(lines[:5]) + '{"prompt": "What is 9 plus 9?", "response": "It is 18."}\n')
    lorica.train(make_config(tmp_path / "run", data={"eval": str(held_out)}, max_steps=1))
    said = capsys.readouterr().err
    assert "5 of 6 evaluation rows are also training rows" in said and "held_out.jsonl:1" in said


@pytest.mark.parametrize(
    ("change", "fault", "says"),
    [
        ({"n_positions": 16}, DataError, r"longest sample has \d+ tokens, .* takes 16\. Set data\.max_length=16"),
        ({"vocab_size": 300}, ModelError, r"its tokenizer makes the token [\d,]+, but its vocabulary has 300"),
    ],
)
def test_samples_that_the_base_has_no_place_for(
    make_config: Config,
    save_base: Callable[[Any], Path],
    tmp_path: Path,
    refuse_models: None,
    change: dict[str, int],
    fault: type[LoricaError],
    says: str,
) -> None:
    from transformers import GPT2Config

    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 2}
    with pytest.raises(fault, match=says):
        lorica.train(make_config(tmp_path / "run", base=save_base(GPT2Config(**{**shape, **change}))))


def test_targets_that_match_nothing(make_config: Config, tmp_path: Path) -> None:
    """27."""
    with pytest.raises(TargetError, match=r"'q_pro' matches no module.*q_proj"):
        lorica.train(make_config(tmp_path / "run", method={"targets": ("k_proj", "q_pro")}))


def test_a_folder_name_is_only_a_name(make_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """39."""
    monkeypatch.chdir(tmp_path)
    lorica.train(make_config("x; touch p", max_steps=1))
    assert [path.name for path in tmp_path.iterdir()] == ["x; touch p"]
    assert main(["train", "x; touch p", "--resume", "auto"]) == 0


# Other shapes of base


def test_a_gpt2_trains_packed_and_padded(make_config: Config, save_base: Callable[[Any], Path], tmp_path: Path) -> None:
    from transformers import GPT2Config

    base = save_base(
        GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=8192,
            n_positions=256,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    first = []
    for packing in (True, False):
        folder = tmp_path / f"packing {packing}"
        config = make_config(
            folder, base=base, data={"packing": packing}, method={"dropout": 0.0}, batch_tokens=4096, epochs=6.0
        )
        lorica.train(config)
        assert metrics(folder)[-1]["eval_loss"] < metrics(folder)[0]["loss"]
        first.append(metrics(folder)[0]["loss"])
    # All rows are in the one step of an epoch, whatever their order.
    assert first[0] == pytest.approx(first[1], rel=1e-5)


def test_a_qwen3_trains(make_config: Config, save_base: Callable[[Any], Path], tmp_path: Path) -> None:
    from transformers import Qwen3Config

    base = save_base(
        Qwen3Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=8192,
        )
    )
    result = lorica.train(make_config(tmp_path / "run", base=base))
    assert result.eval_loss is not None and result.eval_loss < metrics(tmp_path / "run")[0]["loss"]


def test_a_base_that_cannot_pack_trains_padded(
    make_config: Config, save_base: Callable[[Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And resumes to the same run; packing switched off by hand is the same again."""
    from transformers import StableLmConfig

    base = save_base(
        StableLmConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=8192,
        )
    )
    config = make_config(tmp_path / "run", base=base)
    lorica.train(config)
    assert "Batches are padded, because this model cannot pack: " in capsys.readouterr().err
    lorica.train(make_config(tmp_path / "by hand", base=base, data={"packing": False}))
    same_run(tmp_path / "by hand", tmp_path / "run")
    again = make_config(tmp_path / "again", base=base)

    def work() -> None:
        kill_before(step_module, "_batches", 12)
        lorica.train(again)

    assert in_child(work) == -signal.SIGKILL and steps(tmp_path / "again")
    lorica.train(again, resume="auto")
    same_run(tmp_path / "again", tmp_path / "run")


def test_padded_and_packed_give_the_same_loss(make_config: Config, tmp_path: Path) -> None:
    first = []
    for packing in (True, False):
        folder = tmp_path / str(packing)
        lorica.train(
            make_config(folder, data={"packing": packing}, method={"dropout": 0.0}, batch_tokens=4096, max_steps=1)
        )
        first.append(metrics(folder)[0])
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-4)


def test_the_embedded_base_learns(make_config: Config, tmp_path: Path) -> None:
    result = lorica.train(make_config(tmp_path / "run", base="embedded", batch_tokens=512, lr=5e-3))
    assert result.eval_loss is not None and result.eval_loss < 0.7 * metrics(tmp_path / "run")[0]["loss"]


# The command line


@pytest.fixture
def yaml(make_config: Config, tmp_path: Path) -> str:
    file = tmp_path / "run.yaml"
    file.write_text(dump_yaml(make_config(tmp_path / "run")))
    return str(file)


def test_max_steps_on_the_command_line(yaml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", yaml, "train.lr=2e-2", "--max-steps", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "run" / "result.json").read_text()) and printed["steps"] == 3
    config = load_config(tmp_path / "run").config
    assert (config.train.max_steps, config.train.lr) == (3, 2e-2)
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "  max_steps: 3  # command line\n" in text


def test_a_dry_run_plans_and_writes_nothing(yaml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", yaml, "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["steps"] == NUM_STEPS and report["peak_bytes"] > 0
    assert not (tmp_path / "run").exists()


def test_a_dry_run_checks_the_rows(yaml: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text("broken\n")
    assert main(["train", yaml, f"data.train={tmp_path / 'bad.jsonl'}", "--dry-run"]) == 3
    assert main(["train", yaml, "data.train=nowhere.jsonl", "--dry-run"]) == 3
    assert "bad.jsonl:1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_every_error_is_one_of_ours(yaml: str, tmp_path: Path) -> None:
    """What goes wrong in a run leaves as a LoricaError with its exit code, in Python as on the command line."""
    for change, code in (("model.base=./nowhere", 1), ("data.train=nowhere.jsonl", 3), ("train.lr=-1", 2)):
        with pytest.raises(LoricaError) as caught:
            lorica.train(load_config(yaml, [change]))
        assert caught.value.exit_code == code
        assert main(["train", yaml, change]) == code
