"""The training loop: evaluate, save, stop or step, and again. `run_loop` is the story; the rest is what its lines do.

A run is a function of its identity: the order of the data, the learning rate and dropout all follow from the step and
the saved random state. So a run resumed from any checkpoint equals, on a CPU bit for bit, one never interrupted.

The loss of an optimizer step is the mean over ALL its trained tokens, however they are cut into micro batches: each
gives the sum of its token losses, and the summed gradient is divided by the number of targets of the whole step.

What it gives up: overlap of data and compute (a batch is a few kilobytes of ids), and loss scaling for float16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.data.layouts import PACKED, Layout
from lorica.data.packing import Batch
from lorica.data.sampler import Order
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import CheckpointError, DivergedError, DoesNotFitError, StoppedError
from lorica.methods.attach import adapters, lr_factors, trainable_parameters, trained_state
from lorica.methods.method import Adapter
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
from lorica.training.metrics import MetricsLog, peak_memory_bytes
from lorica.training.optim import (
    clip_gradients,
    forget_moments,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from lorica.training.paged import Tiers
from lorica.training.progress import show_progress
from lorica.training.rng import restore_rng, rng_tensors
from lorica.training.schedule import learning_rate, num_warmup_steps
from lorica.training.signals import stop_requests

MAX_SKIPS = 10
"""Steps skipped one after another before a run with on_nan=skip counts as diverged."""


@dataclass(frozen=True)
class LoopOptions:
    """How to train; the numbers mean what they mean in run.yaml's `train` section.

    Attributes:
        micro_batch_tokens: tokens that go through the model at once.
        warmup: a fraction of the run below 1, steps from 1 on.
        min_lr: where the schedule ends, as a fraction of `lr`.
        restart_every: steps after which the low-rank pairs are folded away and fresh ones start; None: never.
        clip: greatest norm of the gradient; 0 turns clipping off.
        early_stopping: evaluations without improvement before the run ends; None never ends early.
        on_nan: `stop`, or `skip` the step.
        log_every: steps between two rows of metrics.jsonl.
        optimizer_bits: of each of AdamW's moments, 32 or 8.
        optimizer_memory: most bytes for the moments on the device; the others are paged. None: no limit.
        optimizer_host_memory: most bytes of paged moments in main memory, if the device is a GPU.
        layout: how samples become micro batches.
    """

    lr: float
    micro_batch_tokens: int
    schedule: str = "cosine"
    warmup: float = 0.03
    min_lr: float = 0.0
    restart_every: int | None = None
    clip: float = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    eval_every: int = 50
    save_every: int = 50
    keep_checkpoints: int = 2
    early_stopping: int | None = None
    on_nan: str = "stop"
    log_every: int = 1
    optimizer_bits: int = 32
    optimizer_memory: int | None = None
    optimizer_host_memory: int = 0
    layout: Layout = PACKED


@dataclass(frozen=True)
class LoopResult:
    """What a run came to.

    Attributes:
        step: optimizer steps done.
        loss: of the last step that was not skipped.
        best_step: where the evaluation loss was lowest; its checkpoint is kept. None without evaluation.
        tokens: real tokens seen, trained on or not.
        seconds: spent in steps, over all resumptions.
    """

    step: int
    loss: float | None
    best_step: int | None
    best_loss: float | None
    stopped_early: bool
    tokens: int
    seconds: float
    peak_memory_bytes: int


@dataclass
class _Counters:
    """Where a run stands; saved in state.json."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    best_step: int | None = None
    best_loss: float | None = None
    evaluated_step: int = 0
    stale_evaluations: int = 0
    skips_in_a_row: int = 0
    stopped_early: bool = False


@dataclass
class _Run:
    """What the parts of one run share. saved_step: the step whose checkpoint holds all that there is to know of it."""

    model: nn.Module
    loss_fn: LossFunction
    evaluate: Callable[[], Mapping[str, float]] | None
    dataset: TokenizedDataset
    order: Order
    options: LoopOptions
    identity: Mapping[str, Any]
    checkpoints: Path
    counters: _Counters = field(default_factory=_Counters)
    saved_step: int | None = None
    parameters: dict[str, nn.Parameter] = field(init=False)
    wrapped: list[Adapter] = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)
    device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        self.parameters = trainable_parameters(self.model)
        self.wrapped = list(adapters(self.model).values())
        self.device = next(iter(self.parameters.values())).device
        self.optimizer = make_optimizer(
            self.parameters,
            lr=options.lr,
            betas=options.betas,
            epsilon=options.epsilon,
            weight_decay=options.weight_decay,
            lr_factors=lr_factors(self.model),
            bits=options.optimizer_bits,
            tiers=Tiers(options.optimizer_memory, options.optimizer_host_memory, self.checkpoints.parent),
        )


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
    run = _Run(model, loss_fn, evaluate, train_dataset, order, options, identity, folder / "checkpoints")
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

            row = _step(run)
            if _is_logged(run, row):
                log.write(row)
            display.step(row)
            if "skipped" in row:
                display.say(f"step {counters.step}: skipped, {row['skipped']}")
            _refuse_divergence(run, row)


def is_finished(checkpoint: Checkpoint, num_steps: int) -> bool:
    """Whether nothing is left to do for a run of `num_steps` resumed here."""
    counters = _Counters(**checkpoint.state["counters"])
    return bool(checkpoint.state["finished"]) and (counters.stopped_early or counters.step >= num_steps)


def _begin(run: _Run, resume: Checkpoint | None) -> None:
    """Put the run at its start, or where `resume` was saved."""
    clean_leftovers(run.checkpoints)
    if resume is not None:
        _go_on(run, resume)
    elif find_checkpoints(run.checkpoints):
        raise CheckpointError(f"{run.checkpoints} holds a run. Go on with --resume auto, or change train.output.")


def _go_on(run: _Run, resume: Checkpoint) -> None:
    """Put the run where `resume` was saved, and make its folder this run's own."""
    run.counters = counters = _Counters(**resume.state["counters"])
    run.saved_step = resume.step
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


def _awaits_evaluation(run: _Run) -> bool:
    step = run.counters.step
    due = run.evaluate is not None and _is_due(step, run.options.eval_every, run.order.num_steps)
    return due and run.counters.evaluated_step != step


def _is_finished(run: _Run) -> bool:
    ended = run.counters.stopped_early or run.counters.step >= run.order.num_steps
    return ended and not _awaits_evaluation(run)


def _is_at(run: _Run, stop_at: int | None) -> bool:
    return stop_at is not None and run.counters.step >= stop_at and not _awaits_evaluation(run)


def _is_save_due(run: _Run, leaving: bool) -> bool:
    step = run.counters.step
    is_best = run.counters.best_step == step == run.counters.evaluated_step
    due = is_best or leaving or _is_due(step, run.options.save_every, run.order.num_steps)
    return due and run.saved_step != step


def _is_logged(run: _Run, row: Mapping[str, Any]) -> bool:
    step = run.counters.step
    return "skipped" in row or step % run.options.log_every == 0 or step == run.order.num_steps


def _step(run: _Run) -> dict[str, Any]:
    """One optimizer step; its row for metrics.jsonl, with `skipped` and the reason where the weights did not move."""
    started = time.perf_counter()
    options, counters = run.options, run.counters
    batches = _batches(run)
    every = options.restart_every
    if every is not None and counters.step > 0 and counters.step % every == 0:
        _restart(run)
    lr = _learning_rate(run)
    set_learning_rate(run.optimizer, lr)
    with _out_of_memory_explained(options):
        loss, norm, skipped = _optimize(run, batches)

    num_tokens = sum(batch.num_tokens for batch in batches)
    seconds = time.perf_counter() - started
    counters.step += 1
    counters.tokens += num_tokens
    counters.seconds += seconds
    row = {
        "step": counters.step,
        "epoch": run.order.epoch(counters.step),
        "loss": loss,
        "lr": lr,
        "grad_norm": norm,
        "tokens": counters.tokens,
        "tokens_per_second": num_tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(run.device),
        "seconds": counters.seconds,
    }
    return {**row, "skipped": skipped} if skipped else row


def _restart(run: _Run) -> None:
    """Fold what the pairs have learned away and start fresh ones, whose moments start anew (ReLoRA, arXiv 2307.05695).

    Before a step, not after one: a run that goes on beyond what was its last step is the run that was always longer.
    """
    for adapter in run.wrapped:
        forget_moments(run.optimizer, adapter.restart())


def _learning_rate(run: _Run) -> float:
    options, num_steps = run.options, run.order.num_steps
    every = options.restart_every
    return learning_rate(
        run.counters.step,
        num_steps=num_steps,
        peak=options.lr,
        schedule=options.schedule,
        warmup_steps=num_warmup_steps(options.warmup, num_steps),
        min_fraction=options.min_lr,
        restart_every=every,
        # AdamW's first step is one of full size, so there is always some.
        rewarm_steps=0 if every is None else max(1, num_warmup_steps(options.warmup, every)),
    )


def _batches(run: _Run) -> list[Batch]:
    """The micro batches of the next optimizer step."""
    options = run.options
    return options.layout.batches(run.dataset, run.order.batch(run.counters.step), options.micro_batch_tokens)


def _optimize(run: _Run, batches: list[Batch]) -> tuple[float | None, float, str]:
    """Gradients, clipping and the step: (mean loss, gradient norm before clipping, why the step was skipped or "")."""
    counters = run.counters
    num_targets = sum(batch.num_targets for batch in batches)
    if num_targets == 0:
        # Without gradients AdamW would still move the weights by its momentum.
        return None, 0.0, "no trained token in this batch"
    mean = _accumulate_gradients(run, batches, num_targets)
    norm = clip_gradients(run.parameters.values(), run.options.clip)
    # The only wait for the device in a step.
    loss, norm_value = torch.stack([mean, norm]).tolist()
    skipped = "" if math.isfinite(loss) and math.isfinite(norm_value) else f"loss {loss}, gradient norm {norm_value}"
    if skipped:
        counters.skips_in_a_row += 1
    else:
        run.optimizer.step()
        if run.wrapped:
            run.wrapped[0].options.after_step(run.model, counters.step + 1, run.order.num_steps)
        counters.loss, counters.skips_in_a_row = loss, 0
    run.optimizer.zero_grad(set_to_none=True)
    return loss, norm_value, skipped


def _accumulate_gradients(run: _Run, batches: list[Batch], num_targets: int) -> Tensor:
    """Backward through each micro batch; the mean token loss of all, a float32 scalar on the device."""
    total = torch.zeros((), device=run.device)
    for batch in batches:
        if batch.num_targets == 0:
            continue
        loss = run.loss_fn(run.model, batch.to(run.device).model_inputs(), batch.targets)
        total += loss.detach()
        for adapter in run.wrapped:
            extra = adapter.auxiliary_loss()
            if extra is not None:
                # Per forward, so it is weighted as if each of the micro batch's tokens had it.
                loss = loss + batch.num_targets * extra
        loss.backward()  # type: ignore[no-untyped-call]
        # Or its graph would live through the next forward pass.
        del loss
    # Divided once, in the masters' float32: the small gradients of a mean would vanish on their way in float16.
    torch._foreach_div_([p.grad for p in run.parameters.values() if p.grad is not None], num_targets)
    return total / num_targets


def _evaluate(run: _Run) -> dict[str, Any]:
    """Evaluate and note whether this is the best so far; the row for metrics.jsonl."""
    counters = run.counters
    assert run.evaluate is not None
    with _mode(run.model, training=False), torch.no_grad(), _out_of_memory_explained(run.options):
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


def _save(run: _Run) -> None:
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
    state = {"counters": asdict(run.counters), "finished": _is_finished(run), "identity": run.identity}
    save_checkpoint(run.checkpoints, run.counters.step, tensors, state)
    prune(run.checkpoints, run.options.keep_checkpoints, run.counters.best_step)
    run.saved_step = run.counters.step


def _refuse_divergence(run: _Run, row: Mapping[str, Any]) -> None:
    skips = run.counters.skips_in_a_row
    if skips == 0 or (run.options.on_nan == "skip" and skips < MAX_SKIPS):
        return
    samples = run.order.batch(row["step"] - 1)[:8].tolist()
    raise DivergedError(
        f"Training diverged at step {row['step']}: {row['skipped']}, {skips} such step(s) on end; the batch begins "
        f"with the samples {samples}. {_last_good(run)} Try a lower train.lr, a longer train.warmup or a smaller "
        "train.clip."
    )


def _last_good(run: _Run) -> str:
    paths = find_checkpoints(run.checkpoints)
    return f"The last good checkpoint is {paths[-1]}." if paths else "No checkpoint was saved yet."


def _stopped(run: _Run, signal_number: int) -> StoppedError:
    return StoppedError(
        f"Stopped after step {run.counters.step} of {run.order.num_steps}. A checkpoint was saved; --resume auto goes "
        "on from there.",
        signal_number,
    )


def _result(run: _Run) -> LoopResult:
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


@contextmanager
def _out_of_memory_explained(options: LoopOptions) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # On a CPU torch raises a plain RuntimeError; only its text tells.
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        raise DoesNotFitError(
            f"Memory ran out with {options.micro_batch_tokens} tokens at once: "
            f"{str(error).splitlines()[0]}\n"
            f"Try train.micro_batch_tokens={max(1, options.micro_batch_tokens // 2)} (the result stays the same), "
            "train.activation_checkpointing=true, model.dtype=bfloat16 or a smaller data.max_length."
        ) from error
