from __future__ import annotations

import hashlib
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorica.data import layouts
from lorica.data.sampler import Order, micro_batches
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import CheckpointError, DivergedError, DoesNotFitError, StoppedError
from lorica.methods.attach import adapt, adapters, trainable_parameters, trained_state
from lorica.methods.lora import LoRA
from lorica.methods.lora_kinds import LoraLinear
from lorica.models.loss import make_loss
from lorica.training import loop
from lorica.training.checkpoint import Checkpoint, find_checkpoints, latest_valid, read_checkpoint, restore_trained
from lorica.training.metrics import read_metrics

from .conftest import IDENTITY, Bigram, in_child, kill_self, make_dataset, make_model, make_order, summed_loss

Train = Callable[..., Any]
TIMING = ("seconds", "tokens_per_second", "peak_memory_bytes", "joules")


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop may catch it, and nothing is saved on its way."""


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or the machine decides."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(folder / "metrics.jsonl")]


def last_row(folder: Path) -> int:
    """The step of the newest row, 0 before the first."""
    return max((row["step"] for row in rows(folder)), default=0)


def last(folder: Path) -> Checkpoint:
    return read_checkpoint(find_checkpoints(folder / "checkpoints")[-1])


def recording(seen: list[list[int]], *, fail_at: int | None = None, fault: BaseException | None = None) -> Any:
    """`summed_loss` that notes the ids of each micro batch and, at the `fail_at`-th call, raises `fault`."""

    def loss_fn(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
        if len(seen) == fail_at and fault is not None:
            raise fault
        seen.append(inputs["input_ids"].flatten().tolist())
        return summed_loss(model, inputs, targets)

    return loss_fn


def falling(model_losses: Iterator[float]) -> Callable[[], dict[str, float]]:
    def evaluate() -> dict[str, float]:
        loss = next(model_losses)
        return {"loss": loss, "perplexity": math.exp(loss)}

    return evaluate


def same_run(a: Checkpoint, b: Checkpoint) -> None:
    """Equal bit for bit: weights, optimizer, random state, counters."""
    for stem in ("trainable", "optimizer", "rng"):
        assert a.tensors[stem].keys() == b.tensors[stem].keys()
        different = [name for name, tensor in a.tensors[stem].items() if not torch.equal(tensor, b.tensors[stem][name])]
        assert different == []
    without_clock = [{k: v for k, v in c.state["counters"].items() if k != "seconds"} for c in (a, b)]
    assert without_clock[0] == without_clock[1]


def test_training_lowers_the_loss_and_leaves_the_base_alone(train: Train, tmp_path: Path) -> None:
    """Reliability case 21 besides."""
    before = {name: p.detach().clone() for name, p in make_model().named_parameters() if not p.requires_grad}
    model, result = train(order=make_order(make_dataset(), epochs=12.0), lr=0.03)
    log = rows(tmp_path / "run")
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    assert all(torch.equal(dict(model.named_parameters())[name], tensor) for name, tensor in before.items())
    assert result.step == len(log) and result.loss == log[-1]["loss"]
    assert (result.best_step, result.best_loss, result.stopped_early) == (None, None, False)


def test_rows_say_what_happened(train: Train, tmp_path: Path) -> None:
    dataset = make_dataset()
    order = make_order(dataset)
    _, result = train(evaluate=falling(iter([3.0, 2.5, 2.0, 1.5, 1.0])), warmup=0.0, schedule="linear")
    everything = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps = [row for row in everything if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, order.num_steps + 1))
    assert steps[-1]["tokens"] == 2 * dataset.lengths.sum() == result.tokens
    assert steps[-1]["epoch"] == 2.0 and steps[0]["lr"] == 0.01 and steps[-1]["lr"] == 0.0
    assert {*steps[0], "joules"} == {"step", "epoch", "loss", "lr", "grad_norm", "tokens", *TIMING}
    assert all(row["seconds"] > 0 and row["tokens_per_second"] > 0 and row["peak_memory_bytes"] > 1e6 for row in steps)
    evaluations = [row for row in everything if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == sorted({*range(3, order.num_steps + 1, 3), order.num_steps})
    assert evaluations[0].keys() == {"step", "epoch", "eval_loss", "eval_perplexity"}


def test_log_every_thins_the_rows_but_keeps_the_last(train: Train, tmp_path: Path) -> None:
    dataset = make_dataset()
    train(log_every=4, order=make_order(dataset))
    steps = [row["step"] for row in rows(tmp_path / "run")]
    num_steps = make_order(dataset).num_steps
    assert steps == sorted({*range(4, num_steps + 1, 4), num_steps})


@pytest.mark.parametrize("killed_at", [0, 1, 2, 3, 7, "epoch's end", "last step", "accumulation"])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(
    train: Train, tmp_path: Path, killed_at: int | str
) -> None:
    """Reliability cases 2, 3 and 4: dropout on, several micro batches a step, evaluation in between."""
    dataset, losses = make_dataset(), [3.0, 2.5, 2.7, 2.2, 2.1, 2.3, 2.0, 1.9]
    order = make_order(dataset)
    straight_seen: list[list[int]] = []
    train(folder=tmp_path / "straight", loss_fn=recording(straight_seen), evaluate=falling(iter(losses)))

    # How many micro batches are seen before each step begins.
    firsts = [0]
    for step in range(order.num_steps):
        firsts.append(firsts[-1] + len(micro_batches(order.batch(step), dataset.lengths, 15)))
    epoch_end = order.num_steps // 2
    assert order.epoch(epoch_end) == 1.0 and firsts[7] - firsts[6] > 2
    named = {"epoch's end": firsts[epoch_end], "last step": firsts[-1] - 1, "accumulation": firsts[6] + 2}
    fail_at = firsts[killed_at] if isinstance(killed_at, int) else named[killed_at]

    seen: list[list[int]] = []
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        train(
            folder=folder,
            loss_fn=recording(seen, fail_at=fail_at, fault=Killed()),
            evaluate=falling(iter(losses)),
        )
    warnings: list[str] = []
    resume = latest_valid(folder / "checkpoints", warnings.append)
    assert warnings == []
    done = 0 if resume is None else resume.step
    assert (resume is None) == (killed_at in (0, 1))
    resumed_seen: list[list[int]] = []
    evaluated = sum(1 for step in range(1, done + 1) if step % 3 == 0)
    train(
        folder=folder,
        resume=resume,
        model=make_model() if resume is None else scrambled(make_model()),
        loss_fn=recording(resumed_seen),
        evaluate=falling(iter(losses[evaluated:])),
    )
    assert seen[: firsts[done]] + resumed_seen == straight_seen
    same_run(last(folder), last(tmp_path / "straight"))
    assert rows(folder) == rows(tmp_path / "straight")


def scrambled(model: nn.Module) -> nn.Module:
    """Other weights and another random state: whatever a resumed run does not restore shows."""
    torch.manual_seed(12345)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(1.0)
    return model


def test_a_process_killed_while_training_resumes_to_the_same_end(train: Train, tmp_path: Path) -> None:
    """SIGKILL for real, in the middle of a step."""

    def work() -> None:
        # The pool of a forked parent has no threads in the child.
        torch.set_num_threads(1)
        calls = iter(range(1000))

        def loss_fn(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
            if next(calls) == 17:
                kill_self()
            return summed_loss(model, inputs, targets)

        train(loss_fn=loss_fn)

    assert in_child(work) == -signal.SIGKILL
    resume = latest_valid(tmp_path / "run" / "checkpoints", print)
    assert resume is not None and resume.step > 0
    train(resume=resume)
    train(folder=tmp_path / "straight")
    same_run(last(tmp_path / "run"), last(tmp_path / "straight"))
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")


def test_a_damaged_checkpoint_is_passed_over_and_the_end_is_the_same(train: Train, tmp_path: Path) -> None:
    train(keep_checkpoints=9)
    # A checkpoint is read when its tensors are asked for.
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    expected, folder = last(tmp_path / "before"), tmp_path / "run" / "checkpoints"
    expected_rows = rows(tmp_path / "run")
    for path in find_checkpoints(folder)[-2:]:
        (path / "optimizer.safetensors").write_bytes(b"")
    warnings: list[str] = []
    resume = latest_valid(folder, warnings.append)
    assert resume is not None and len(warnings) == 2
    train(resume=resume, keep_checkpoints=9)
    same_run(last(tmp_path / "run"), expected)
    assert rows(tmp_path / "run") == expected_rows


def test_resuming_from_an_early_checkpoint_writes_its_own_future(train: Train, tmp_path: Path) -> None:
    train(keep_checkpoints=9)
    early, folder = read_checkpoint(find_checkpoints(tmp_path / "run" / "checkpoints")[0]), tmp_path / "run"
    with pytest.raises(Killed):
        train(resume=early, keep_checkpoints=2, lr=0.02, loss_fn=recording([], fail_at=6, fault=Killed()))
    # The next automatic resume must find this run, not the far end of the one before.
    assert early.step < last(folder).step < early.step + 6
    train(resume=last(folder), lr=0.02)
    steps = [row["step"] for row in rows(folder)]
    assert steps == list(range(1, len(steps) + 1))


def test_a_run_that_goes_on_in_another_folder_begins_with_its_checkpoint(train: Train, tmp_path: Path) -> None:
    """Its weights are the best so far, and may stay so."""
    train(evaluate=falling(iter([3.0, 1.0, *[2.0] * 9])), keep_checkpoints=9)
    best = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000006")
    _, result = train(folder=tmp_path / "fork", resume=best, evaluate=falling(iter([2.0] * 9)), keep_checkpoints=1)
    assert (result.best_step, result.best_loss) == (6, 1.0)
    same_run(read_checkpoint(tmp_path / "fork" / "checkpoints" / "step-00000006"), best)


def test_a_finished_run_has_nothing_to_do(train: Train, tmp_path: Path) -> None:
    """Reliability case 11."""

    def content() -> dict[str, str]:
        files = [file for file in (tmp_path / "run").rglob("*") if file.is_file() and "tensorboard" not in file.parts]
        return {
            str(file): hashlib.sha256(file.read_bytes()).hexdigest() + str(file.stat().st_mtime_ns) for file in files
        }

    _, first = train()
    before, finished = content(), last(tmp_path / "run")
    assert loop.is_finished(finished, first.step)
    assert not loop.is_finished(finished, first.step + 5)
    _, again = train(resume=finished)
    assert content() == before
    assert (again.step, again.loss, again.tokens) == (first.step, first.loss, first.tokens)


def test_a_folder_with_checkpoints_is_not_overwritten(train: Train) -> None:
    train()
    with pytest.raises(CheckpointError, match="--resume auto"):
        train()


def test_a_checkpoint_of_another_model_is_refused(train: Train, tmp_path: Path) -> None:
    train()
    other = adapt(Bigram(), LoRA(rank=2, targets="all-linear"))
    with pytest.raises(
        CheckpointError, match=r"lora_a is torch.float32 \[4, 12\], the model has torch.float32 \[2, 12\]"
    ):
        train(resume=last(tmp_path / "run"), model=other)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_saves(train: Train, tmp_path: Path, number: int, code: int) -> None:
    """Reliability case 12. The signal comes inside step 3, where an evaluation is due: it is made up for on resume."""
    handler, losses = signal.getsignal(number), [3.0, 2.5, 2.0, 1.5, 1.0, 0.5]
    train(folder=tmp_path / "straight", evaluate=falling(iter(losses)))

    def loss_fn(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
        if len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2:
            os.kill(os.getpid(), number)
        return summed_loss(model, inputs, targets)

    with pytest.raises(StoppedError, match="Stopped after step 3") as caught:
        # SIGINT again would leave at once, so the step must be one micro batch.
        train(loss_fn=loss_fn, evaluate=falling(iter(losses)), micro_batch_tokens=1000)
    assert caught.value.exit_code == code and signal.getsignal(number) is handler
    assert last(tmp_path / "run").step == 3 and not last(tmp_path / "run").state["finished"]
    assert not loop.is_finished(last(tmp_path / "run"), 3)
    train(resume=last(tmp_path / "run"), evaluate=falling(iter(losses)))
    assert [row["step"] for row in rows(tmp_path / "run") if "eval_loss" in row] == [
        row["step"] for row in rows(tmp_path / "straight") if "eval_loss" in row
    ]


@pytest.mark.parametrize("reads", range(6))
def test_whenever_a_signal_comes_what_is_said_to_be_saved_is_saved(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int
) -> None:
    """The signal comes after the loop has looked for one `reads` times: between any two of its decisions."""

    class Stop:
        looked = 0

        @property
        def signal_number(self) -> int | None:
            self.looked += 1
            return signal.SIGINT if self.looked > reads else None

    monkeypatch.setattr(loop, "stop_requests", lambda: nullcontext(Stop()))
    with pytest.raises(StoppedError) as caught:
        train(evaluate=falling(iter([3.0, 2.0, 1.0])))
    assert f"after step {last(tmp_path / 'run').step} of" in str(caught.value)


def test_stopped_in_the_last_step_the_resumed_run_evaluates_and_is_finished(train: Train, tmp_path: Path) -> None:
    num_steps = make_order(make_dataset()).num_steps

    def loss_fn(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
        if last_row(tmp_path / "run") == num_steps - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return summed_loss(model, inputs, targets)

    with pytest.raises(StoppedError):
        train(loss_fn=loss_fn, evaluate=falling(iter([1.0, 2.0, 3.0])))
    stopped = last(tmp_path / "run")
    assert stopped.step == num_steps and not loop.is_finished(stopped, num_steps)
    train(resume=stopped, evaluate=falling(iter([4.0])))
    assert loop.is_finished(last(tmp_path / "run"), num_steps)
    assert rows(tmp_path / "run")[-1]["eval_loss"] == 4.0


def test_a_second_sigint_leaves_at_once_and_the_checkpoint_before_is_valid(train: Train, tmp_path: Path) -> None:

    def work() -> None:
        # The pool of a forked parent has no threads in the child.
        torch.set_num_threads(1)

        def loss_fn(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
            if len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 3:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
            return summed_loss(model, inputs, targets)

        train(loss_fn=loss_fn)

    assert in_child(work) == 130
    assert last(tmp_path / "run").step == 2


def gradient(train: Train, folder: Path, **options: Any) -> dict[str, Tensor]:
    """The gradient of the first step, from AdamW's first moment: (1 - beta1) times it, without dropout and clipping."""
    dataset = make_dataset(8)
    order = Order(dataset.lengths, seed=0, batch_tokens=10_000, epochs=1.0)
    assert order.num_steps == 1
    train(folder=folder, dataset=dataset, order=order, model=make_model(dropout=0.0), clip=0.0, **options)
    tensors = last(folder).tensors["optimizer"]
    return {name.removesuffix(".exp_avg"): t / 0.1 for name, t in tensors.items() if name.endswith(".exp_avg")}


def test_accumulation_gives_the_gradient_of_the_mean_over_all_tokens(train: Train, tmp_path: Path) -> None:
    """Reliability case 16, against autograd in float64 on unequal lengths."""
    dataset, model = make_dataset(8), make_model(dropout=0.0).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index in range(8):
        ids, labels = (torch.from_numpy(array.astype("int64")) for array in dataset[index])
        total = total + nn.functional.cross_entropy(model(ids[:-1]), labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
    (total / count).backward()
    whole = gradient(train, tmp_path / "whole", micro_batch_tokens=10_000)
    single = gradient(train, tmp_path / "single", micro_batch_tokens=1)
    padded = gradient(train, tmp_path / "padded", micro_batch_tokens=30, layout=layouts.padded(5))
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None
        for found in (whole, single, padded):
            torch.testing.assert_close(found[name].double(), parameter.grad, rtol=1e-4, atol=1e-7)
    logged = [rows(tmp_path / kind)[0]["loss"] for kind in ("whole", "single", "padded")]
    assert logged == pytest.approx([(total / count).item()] * 3, rel=1e-6)


def test_an_auxiliary_loss_counts_by_tokens(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gradient(train, tmp_path / "plain", micro_batch_tokens=1)
    monkeypatch.setattr(LoraLinear, "auxiliary_loss", lambda self: self.lora_a.square().sum())
    with_loss = gradient(train, tmp_path / "with", micro_batch_tokens=1)
    model = make_model(dropout=0.0)
    for name, parameter in trainable_parameters(model).items():
        extra = 2 * parameter.detach() if name.endswith("lora_a") else torch.zeros_like(parameter)
        torch.testing.assert_close(with_loss[name], plain[name] + extra, rtol=1e-4, atol=1e-6)
    assert rows(tmp_path / "plain")[0]["loss"] == rows(tmp_path / "with")[0]["loss"]


def spoiled(value: float, steps: range, tmp_path: Path, *, only_gradient: bool = False) -> Any:
    """`summed_loss` that becomes `value`, or has gradients that do, in the given steps (0-based)."""

    def loss_fn(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
        loss = summed_loss(model, inputs, targets)
        if len(read_metrics(tmp_path / "run" / "metrics.jsonl")) not in steps:
            return loss
        if only_gradient:
            loss.register_hook(lambda g: g * value)
            return loss
        return loss * value

    return loss_fn


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("only_gradient", [False, True])
def test_a_loss_that_is_no_number_stops_with_the_good_checkpoint_kept(
    train: Train, tmp_path: Path, value: float, only_gradient: bool
) -> None:
    """Reliability case 17."""
    with pytest.raises(DivergedError, match=r"diverged at step 6.*step-00000004.*train\.lr") as caught:
        train(loss_fn=spoiled(value, range(5, 99), tmp_path, only_gradient=only_gradient))
    assert caught.value.exit_code == 5
    assert last(tmp_path / "run").step == 4
    assert all(tensor.isfinite().all() for tensor in last(tmp_path / "run").tensors["trainable"].values())
    logged = rows(tmp_path / "run")[-1]
    assert logged["step"] == 6 and "gradient norm nan" in logged["skipped"] and logged["grad_norm"] is None
    assert (logged["loss"] is None) != only_gradient


def test_a_skipped_step_changes_nothing_and_the_run_goes_on(train: Train, tmp_path: Path) -> None:
    _, result = train(loss_fn=spoiled(math.nan, range(2, 4), tmp_path), on_nan="skip", keep_checkpoints=99)
    second, fourth = (read_checkpoint(path) for path in find_checkpoints(tmp_path / "run" / "checkpoints")[:2])
    assert (second.step, fourth.step) == (2, 4)
    for stem in ("trainable", "optimizer"):
        assert all(torch.equal(tensor, fourth.tensors[stem][name]) for name, tensor in second.tensors[stem].items())
    assert [row["step"] for row in rows(tmp_path / "run") if "skipped" in row] == [3, 4]
    assert result.step == make_order(make_dataset()).num_steps and result.loss is not None


def test_ten_skips_on_end_are_divergence(train: Train, tmp_path: Path) -> None:
    dataset = make_dataset(60)
    with pytest.raises(DivergedError, match="10 such step"):
        train(loss_fn=spoiled(math.nan, range(1, 99), tmp_path), on_nan="skip", dataset=dataset)
    assert rows(tmp_path / "run")[-1]["step"] == 11


def test_a_batch_without_targets_contributes_nothing(train: Train, tmp_path: Path) -> None:
    """Reliability case 18: neither as a whole step nor as one micro batch among others."""
    plain, masked = make_dataset(), make_dataset(masked=frozenset(range(24)))
    calls: list[list[int]] = []
    model, result = train(dataset=masked, loss_fn=recording(calls))
    assert calls == [] and result.loss is None
    assert all(row["skipped"] == "no trained token in this batch" for row in rows(tmp_path / "run"))
    assert all(torch.equal(p, trainable_parameters(make_model())[n]) for n, p in trainable_parameters(model).items())

    # Samples 0..7 in one step; half of them masked, alone in their micro batches, equals training the others only.
    half = make_dataset(8, masked=frozenset(range(4)))
    order = Order(half.lengths, seed=0, batch_tokens=10_000, epochs=1.0)
    arguments: dict[str, Any] = {"micro_batch_tokens": 1, "clip": 0.0}
    arguments["model"], arguments["loss_fn"] = make_model(dropout=0.0), recording(calls)
    train(folder=tmp_path / "half", dataset=half, order=order, **arguments)
    assert len(calls) == 4
    others = plain.subset([int(i) for i in order.batch(0) if i >= 4])
    train(
        folder=tmp_path / "others",
        dataset=others,
        order=Order(others.lengths, seed=0, batch_tokens=10_000, epochs=1.0),
        **{**arguments, "model": make_model(dropout=0.0)},
    )
    found, expected = (last(tmp_path / name).tensors["optimizer"] for name in ("half", "others"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-8)


def test_the_best_checkpoint_is_kept_and_patience_ends_the_run(train: Train, tmp_path: Path) -> None:
    losses = [2.0, 1.0, math.nan, 1.5, 1.0, 0.1]
    _, result = train(evaluate=falling(iter(losses)), eval_every=1, early_stopping=3, keep_checkpoints=1)
    assert (result.best_step, result.best_loss, result.stopped_early, result.step) == (2, 1.0, True, 5)
    assert [path.name for path in find_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000002",
        "step-00000005",
    ]
    assert last(tmp_path / "run").state["identity"] == IDENTITY
    assert loop.is_finished(last(tmp_path / "run"), 99)


def test_evaluation_runs_in_evaluation_mode_without_gradients_and_the_mode_comes_back(train: Train) -> None:
    modes: list[tuple[bool, bool]] = []
    model = make_model().eval()

    def evaluate() -> dict[str, float]:
        modes.append((model.training, torch.is_grad_enabled()))
        return {"loss": 1.0}

    def loss_fn(model: nn.Module, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
        assert all(module.training for module in model.modules())
        return summed_loss(model, inputs, targets)

    train(model=model, evaluate=evaluate, loss_fn=loss_fn)
    assert len(modes) > 1 and set(modes) == {(False, False)} and not model.training


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError("Unable to allocate 9 GiB"),
    ],
)
def test_running_out_of_memory_says_what_to_try(train: Train, tmp_path: Path, fault: BaseException) -> None:
    """Reliability case 23."""
    with pytest.raises(DoesNotFitError, match=r"micro_batch_tokens=7 .*activation_checkpointing") as caught:
        train(loss_fn=recording([], fail_at=9, fault=fault))
    assert caught.value.exit_code == 4 and last(tmp_path / "run").step == 2
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_other_errors_pass_as_they_are(train: Train) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        train(loss_fn=recording([], fail_at=2, fault=RuntimeError("shapes")))


def test_the_run_folder_holds_json_and_safetensors_only(train: Train, tmp_path: Path) -> None:
    """Reliability case 15."""
    train()
    files = [f for f in (tmp_path / "run").rglob("*") if f.is_file() and "tensorboard" not in f.parts]
    assert {file.suffix for file in files} == {".json", ".jsonl", ".safetensors"}


def test_a_transformer_resumes_bit_for_bit(train: Train, tmp_path: Path, tiny_llama: Callable[..., Any]) -> None:
    def make() -> Any:
        torch.manual_seed(1)
        return adapt(tiny_llama(), LoRA(rank=4, dropout=0.1, targets="all-linear"))

    def run(folder: Path, **arguments: Any) -> None:
        model = make()
        train(folder=folder, model=model, loss_fn=make_loss(model), layout=layouts.padded(3), **arguments)

    run(tmp_path / "straight", keep_checkpoints=99)
    half = find_checkpoints(tmp_path / "straight" / "checkpoints")[1]
    expected, expected_rows = last(tmp_path / "straight"), rows(tmp_path / "straight")
    run(tmp_path / "straight", resume=read_checkpoint(half))
    same_run(last(tmp_path / "straight"), expected)
    assert rows(tmp_path / "straight") == expected_rows


def relora_by_hand(dataset: TokenizedDataset, order: Order, every: int, lr: float) -> dict[str, Tensor]:
    """ReLoRA as its paper writes it: the base is written, and each part of the run is a new LoRA with a new AdamW."""
    model = make_model(dropout=0.0)
    pairs = {name: a for name, a in adapters(model).items() if isinstance(a, LoraLinear)}
    ours: dict[str, Tensor] = {}
    model.double()
    for step in range(order.num_steps):
        if step % every == 0:
            if step:
                for adapter in pairs.values():
                    adapter.base.weight += adapter.scale * adapter.lora_b.detach() @ adapter.lora_a.detach()
                    fresh = nn.init.kaiming_uniform_(torch.empty(adapter.lora_a.shape), a=math.sqrt(5))
                    adapter.lora_a.data, adapter.lora_b.data = fresh.double(), torch.zeros_like(adapter.lora_b)
            optimizer = torch.optim.AdamW(trainable_parameters(model).values(), weight_decay=0.0)
        # A constant rate without a warm-up: the first step of each part but the first is half a one.
        optimizer.param_groups[0]["lr"] = lr * (0.5 if step and step % every == 0 else 1.0)
        total, count = torch.zeros((), dtype=torch.float64), 0
        for index in order.batch(step):
            ids, labels = (torch.from_numpy(array.astype("int64")) for array in dataset[int(index)])
            total = total + nn.functional.cross_entropy(model(ids[:-1]), labels[1:], ignore_index=-100, reduction="sum")
            count += int((labels[1:] != -100).sum())
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    for name, adapter in pairs.items():
        ours[name] = adapter.base.weight + adapter.scale * adapter.lora_b.detach() @ adapter.lora_a.detach()
    return ours


def test_restarts_train_as_relora_does_without_writing_the_base(train: Train) -> None:
    dataset = make_dataset()
    order, model = make_order(dataset), make_model(dropout=0.0)
    assert order.num_steps > 6
    train(model=model, restart_every=3, clip=0.0, schedule="constant", warmup=0.0)
    torch.manual_seed(8)
    expected = relora_by_hand(dataset, order, every=3, lr=0.01)
    for name, adapter in adapters(model).items():
        assert isinstance(adapter, LoraLinear) and adapter.rank == 4 * (1 + (order.num_steps - 1) // 3)
        found = adapter.base.weight.double() + adapter.delta_weight().double()
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(adapter.base.weight, make_model().get_submodule(name).base.weight)


def test_only_what_is_fresh_has_fresh_moments(train: Train, tmp_path: Path) -> None:
    """An embedding's pair does not restart: it goes on as it is."""
    torch.manual_seed(7)
    model = adapt(Bigram(), LoRA(rank=4, alpha=8.0, targets=("embedding", "head")))
    _, result = train(model=model, restart_every=4)
    tensors = last(tmp_path / "run").tensors["optimizer"]
    steps = {name.removesuffix(".step"): int(tensors[name]) for name in tensors if name.endswith(".step")}
    fresh = (result.step - 1) % 4 + 1
    assert steps == {
        f"{n}.lora_{h}": {"embedding": result.step, "head": fresh}[n] for n in ("embedding", "head") for h in "ab"
    }
    assert fresh < result.step


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_run_with_restarts_resumes_bit_for_bit(train: Train, tmp_path: Path, at: int) -> None:
    """From a checkpoint before, at and after a restart, one or several of them away from the end."""
    options: dict[str, Any] = {"restart_every": 4, "keep_checkpoints": 99}
    train(folder=tmp_path / "straight", **options)
    early = read_checkpoint(find_checkpoints(tmp_path / "straight" / "checkpoints")[at])
    assert early.step == 2 * at + 2
    torch.manual_seed(99)
    train(resume=early, model=scrambled(make_model()), **options)
    same_run(last(tmp_path / "run"), last(tmp_path / "straight"))


def test_earlier_weights_with_fewer_restarts_can_be_taken(train: Train, tmp_path: Path) -> None:
    model, _ = train(restart_every=3, keep_checkpoints=99)
    early = read_checkpoint(find_checkpoints(tmp_path / "run" / "checkpoints")[1])
    late = read_checkpoint(find_checkpoints(tmp_path / "run" / "checkpoints")[-1])
    for checkpoint in (early, late, early):
        restore_trained(model, checkpoint.tensors["trainable"])
        state = trained_state(model)
        assert state.keys() == checkpoint.tensors["trainable"].keys()
        assert all(torch.equal(tensor, checkpoint.tensors["trainable"][name]) for name, tensor in state.items())


def test_a_factor_of_the_learning_rate_stays_through_the_schedule(train: Train, tmp_path: Path) -> None:
    """LoRA+ from the options to the step: B moves by its ratio, A as ever."""
    dataset = make_dataset(8)
    order, moves = Order(dataset.lengths, seed=0, batch_tokens=10_000, epochs=1.0), []
    for ratio in (1.0, 8.0):
        torch.manual_seed(7)
        model = adapt(Bigram(), LoRA(rank=4, alpha=8.0, lr_ratio=ratio))
        before = {name: p.detach().clone() for name, p in trainable_parameters(model).items()}
        train(folder=tmp_path / str(ratio), dataset=dataset, order=order, model=model, warmup=3)
        moves.append({name: p.detach() - before[name] for name, p in trainable_parameters(model).items()})
        assert rows(tmp_path / str(ratio))[0]["lr"] == 0.0025
    for name, move in moves[1].items():
        torch.testing.assert_close(move, moves[0][name] * (8.0 if name.endswith("lora_b") else 1.0))
