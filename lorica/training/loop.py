"""The training loop: evaluate, save, stop or step, and again. `run_loop` is the story; the rest is what its lines do.

A run is a function of its identity: the order of the data, the learning rate and dropout all follow from the step and
the saved random state. So a run resumed from any checkpoint equals, on a CPU bit for bit, one never interrupted.

What a step is stands in `step.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorica.data.sampler import Order
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import CheckpointError, DivergedError, StoppedError
from lorica.methods.attach import trained_state
from lorica.models.loss import LossFunction
from lorica.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    clean_leftovers,
    discard_after,
    find_checkpoints,
    prune,
    restore_trained,
    save_checkpoint,
)
from lorica.training.energy import UNMEASURED, Energy
from lorica.training.metrics import MetricsLog, peak_memory_bytes
from lorica.training.optim import load_optimizer_tensors, optimizer_tensors
from lorica.training.progress import show_progress
from lorica.training.rng import restore_rng, rng_tensors
from lorica.training.signals import stop_requests
from lorica.training.step import Counters, LoopOptions, Run, out_of_memory_explained, take_step

MAX_SKIPS = 10
"""Steps skipped one after another before a run with on_nan=skip counts as diverged."""


@dataclass(frozen=True)
class LoopResult:
    """What a run came to.

    Attributes:
        step: optimizer steps done.
        loss: of the last step that was not skipped.
        best_step: where the evaluation loss was lowest; its checkpoint is kept. None without evaluation.
        tokens: real tokens seen, trained on or not.
        seconds: spent in steps, over all resumptions.
        energy: drawn in steps, over all resumptions.
    """

    step: int
    loss: float | None
    best_step: int | None
    best_loss: float | None
    stopped_early: bool
    tokens: int
    seconds: float
    peak_memory_bytes: int
    energy: Energy


def run_loop(
    model: nn.Module,
    loss_fn: LossFunction,
    train_dataset: TokenizedDataset,
    order: Order,
    *,
    folder: Path,
    options: LoopOptions,
    evaluate: Callable[[], Mapping[str, float]] | None,
    resume: Checkpoint | None,
    identity: Mapping[str, Any],
    stop_at: int | None = None,
) -> LoopResult:
    """Train every parameter of `model` that requires a gradient, in place, from the start or from `resume`.

    The caller holds the run folder's lock, has seeded torch, and compared `resume.state["identity"]` with `identity`.

    Args:
        folder: the run folder; gets `metrics.jsonl` and `checkpoints/`.
        evaluate: gives at least `loss`, the mean over the evaluation tokens; each `name` is logged as `eval_name`.
            Called in evaluation mode, without gradients.
        identity: JSON, saved with each checkpoint; see `identity.py`.
        stop_at: leave with a checkpoint once this many steps are done. The schedule stays that of the whole run, which
            goes on when it is resumed.

    Raises:
        DivergedError: loss or gradient is NaN or infinite and `on_nan` is `stop`, or in `MAX_SKIPS` steps on end.
        StoppedError: SIGINT or SIGTERM came; a checkpoint was saved.
        ConfigError: `optimizer_memory` is too small even to page, or the folder cannot be written to.
        DoesNotFitError: memory ran out in a step, or the disk has no room for the moments that are paged.
        CheckpointError: `resume` does not fit the model, a checkpoint cannot be saved, or the folder holds checkpoints
            that nobody resumes.
    """
    run = Run(model, loss_fn, evaluate, train_dataset, order, options, identity, folder / "checkpoints")
    _begin(run, resume)
    counters = run.counters
    with (
        stop_requests() as stop,
        MetricsLog(folder, step=counters.step, evaluated_step=counters.evaluated_step) as log,
        show_progress(order.num_steps, counters.step) as display,
        _mode(model, training=True),
    ):
        while True:
            if _awaits_evaluation(run) and stop.signal_number is None:
                row = _evaluate(run)
                log.write(row)
                display.evaluation(row)
            leaving = _is_finished(run) or _is_at(run, stop_at)
            # Read once: a signal that came between saving and leaving would leave with nothing saved.
            signal_number = stop.signal_number
            if _is_save_due(run, leaving or signal_number is not None):
                log.sync()
                _save(run)
            if leaving:
                return _result(run)
            if signal_number is not None:
                raise _stopped(run, signal_number)

            row = take_step(run)
            if _is_logged(run, row):
                log.write(row)
            display.step(row)
            if "skipped" in row:
                display.say(f"step {counters.step}: skipped, {row['skipped']}")
            _refuse_divergence(run, row)


def is_finished(checkpoint: Checkpoint, num_steps: int) -> bool:
    """Whether nothing is left to do for a run of `num_steps` resumed here."""
    counters = Counters(**checkpoint.state["counters"])
    return bool(checkpoint.state["finished"]) and (counters.stopped_early or counters.step >= num_steps)


def _begin(run: Run, resume: Checkpoint | None) -> None:
    """Put the run at its start, or where `resume` was saved."""
    clean_leftovers(run.checkpoints)
    if resume is not None:
        _go_on(run, resume)
    elif find_checkpoints(run.checkpoints):
        raise CheckpointError(f"{run.checkpoints} holds a run. Go on with --resume auto, or change train.output.")


def _go_on(run: Run, resume: Checkpoint) -> None:
    """Put the run where `resume` was saved, and make its folder this run's own."""
    run.counters = counters = Counters(**resume.state["counters"])
    run.saved_step = resume.step
    run.meter.restore(Energy(**resume.state["energy"]) if "energy" in resume.state else UNMEASURED)
    restore_trained(run.model, resume.tensors["trainable"])
    load_optimizer_tensors(run.optimizer, run.parameters, resume.tensors["optimizer"])
    if not _is_there(run.checkpoints, resume.step):
        # Another folder's: this one's run begins with it, since its weights may stay the best.
        save_checkpoint(run.checkpoints, resume.step, resume.tensors, resume.state)
    if not _is_there(run.checkpoints, counters.best_step):
        # Best in that other folder, or pruned here since: it cannot be taken at the end.
        counters.best_step = counters.best_loss = None
    # This run writes its own future; what an abandoned or damaged one left there would be taken for it.
    discard_after(run.checkpoints, resume.step)
    prune(run.checkpoints, run.options.keep_checkpoints, counters.best_step)
    restore_rng(resume.tensors["rng"])


def _awaits_evaluation(run: Run) -> bool:
    step = run.counters.step
    due = run.evaluate is not None and _is_due(step, run.options.eval_every, run.order.num_steps)
    return due and run.counters.evaluated_step != step


def _is_finished(run: Run) -> bool:
    ended = run.counters.stopped_early or run.counters.step >= run.order.num_steps
    return ended and not _awaits_evaluation(run)


def _is_at(run: Run, stop_at: int | None) -> bool:
    return stop_at is not None and run.counters.step >= stop_at and not _awaits_evaluation(run)


def _is_save_due(run: Run, leaving: bool) -> bool:
    step = run.counters.step
    is_best = run.counters.best_step == step == run.counters.evaluated_step
    due = is_best or leaving or _is_due(step, run.options.save_every, run.order.num_steps)
    return due and run.saved_step != step


def _is_logged(run: Run, row: Mapping[str, Any]) -> bool:
    step = run.counters.step
    return "skipped" in row or step % run.options.log_every == 0 or step == run.order.num_steps


def _evaluate(run: Run) -> dict[str, Any]:
    """Evaluate and note whether this is the best so far; the row for metrics.jsonl."""
    counters = run.counters
    assert run.evaluate is not None
    run.meter.settle()
    with _mode(run.model, training=False), torch.no_grad(), out_of_memory_explained(run.options):
        scores = run.evaluate()
    counters.evaluated_step = counters.step
    # A checkpoint of this very step, saved on a signal, does not know this evaluation.
    run.saved_step = None
    if math.isfinite(scores["loss"]) and (counters.best_loss is None or scores["loss"] < counters.best_loss):
        counters.best_loss, counters.best_step, counters.stale_evaluations = scores["loss"], counters.step, 0
    else:
        counters.stale_evaluations += 1
        patience = run.options.early_stopping
        counters.stopped_early = patience is not None and counters.stale_evaluations >= patience
    epoch = run.order.epoch(counters.step)
    return {"step": counters.step, "epoch": epoch, **{f"eval_{name}": value for name, value in scores.items()}}


def _save(run: Run) -> None:
    run.meter.settle()
    broken = [name for name, parameter in run.parameters.items() if not bool(parameter.isfinite().all())]
    if broken:
        raise DivergedError(
            f"The weights are no longer finite after step {run.counters.step}; the first is {broken[0]}. "
            f"{_last_good(run)} Try a lower train.lr, a longer train.warmup or a smaller train.clip."
        )
    tensors = {
        "trainable": {name: tensor.detach() for name, tensor in trained_state(run.model).items()},
        "optimizer": optimizer_tensors(run.optimizer, run.parameters),
        "rng": rng_tensors(),
    }
    state = {
        "counters": asdict(run.counters),
        "energy": asdict(run.meter.total),
        "finished": _is_finished(run),
        "identity": run.identity,
    }
    save_checkpoint(run.checkpoints, run.counters.step, tensors, state)
    prune(run.checkpoints, run.options.keep_checkpoints, run.counters.best_step)
    run.saved_step = run.counters.step


def _refuse_divergence(run: Run, row: Mapping[str, Any]) -> None:
    skips = run.counters.skips_in_a_row
    if skips == 0 or (run.options.on_nan == "skip" and skips < MAX_SKIPS):
        return
    samples = run.order.batch(row["step"] - 1)[:8].tolist()
    raise DivergedError(
        f"Training diverged at step {row['step']}: {row['skipped']}, {skips} such step(s) on end; the batch begins "
        f"with the samples {samples}. {_last_good(run)} Try a lower train.lr, a longer train.warmup or a smaller "
        "train.clip."
    )


def _last_good(run: Run) -> str:
    paths = find_checkpoints(run.checkpoints)
    return f"The last good checkpoint is {paths[-1]}." if paths else "No checkpoint was saved yet."


def _stopped(run: Run, signal_number: int) -> StoppedError:
    return StoppedError(
        f"Stopped after step {run.counters.step} of {run.order.num_steps}. A checkpoint was saved; --resume auto goes "
        "on from there.",
        signal_number,
    )


def _result(run: Run) -> LoopResult:
    counters = run.counters
    return LoopResult(
        step=counters.step,
        loss=counters.loss,
        best_step=counters.best_step,
        best_loss=counters.best_loss,
        stopped_early=counters.stopped_early,
        tokens=counters.tokens,
        seconds=counters.seconds,
        peak_memory_bytes=peak_memory_bytes(run.device),
        energy=run.meter.result(),
    )


def _is_there(checkpoints: Path, step: int | None) -> bool:
    return step is not None and checkpoint_path(checkpoints, step).is_dir()


def _is_due(step: int, every: int, last: int) -> bool:
    return step > 0 and (step % every == 0 or step >= last)


@contextmanager
def _mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)
