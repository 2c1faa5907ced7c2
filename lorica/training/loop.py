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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.data.packing import ROUND_TO, Batch, pack, pad
from lorica.data.sampler import Order, micro_batches
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import CheckpointError, DivergedError, DoesNotFitError, StoppedError
from lorica.methods.attach import adapters, trainable_parameters, trained_state
from lorica.methods.method import Adapter
from lorica.models.loss import LossFunction
from lorica.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    clean_leftovers,
    discard_after,
    find_checkpoints,
    prune,
    restore_parameters,
    save_checkpoint,
)
from lorica.training.metrics import MetricsLog, peak_memory_bytes
from lorica.training.optim import clip_gradients, load_optimizer_tensors, make_optimizer, optimizer_tensors
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
        clip: greatest norm of the gradient; 0 turns clipping off.
        early_stopping: evaluations without improvement before the run ends; None never ends early.
        on_nan: `stop`, or `skip` the step.
        log_every: steps between two rows of metrics.jsonl.
        padded: pad micro batches with `pad_id` instead of packing them.
    """

    lr: float
    micro_batch_tokens: int
    schedule: str = "cosine"
    warmup: float = 0.03
    min_lr: float = 0.0
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
    padded: bool = False
    pad_id: int = 0


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


@dataclass(frozen=True)
class _Run:
    """What the parts of one run share."""

    model: nn.Module
    loss_fn: LossFunction
    dataset: TokenizedDataset
    order: Order
    options: LoopOptions
    checkpoints: Path
    parameters: dict[str, nn.Parameter]
    wrapped: list[Adapter]
    optimizer: torch.optim.AdamW
    device: torch.device
    counters: _Counters


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
        DoesNotFitError: memory ran out in a step.
        CheckpointError: `resume` does not fit the model, a checkpoint cannot be saved, or the folder holds checkpoints
            that nobody resumes.
    """
    run = _begin(model, loss_fn, train_dataset, order, folder / "checkpoints", options, resume)
    counters, num_steps = run.counters, order.num_steps
    saved_step = None if resume is None else resume.step
    with (
        stop_requests() as stop,
        MetricsLog(folder, step=counters.step, evaluated_step=counters.evaluated_step) as log,
        show_progress(num_steps, counters.step) as display,
        _mode(model, training=True),
    ):
        while True:
            improved = False
            pending = evaluate is not None and _is_due(counters.step, options.eval_every, num_steps)
            pending = pending and counters.evaluated_step != counters.step
            if evaluate is not None and pending and stop.signal_number is None:
                row = _evaluate(run, evaluate)
                improved, pending = counters.best_step == counters.step, False
                # A checkpoint of this very step, saved on a signal, does not know this evaluation.
                saved_step = None
                log.write(row)
                display.evaluation(row)

            finished = not pending and (counters.stopped_early or counters.step >= num_steps)
            leaving = finished or (not pending and stop_at is not None and counters.step >= stop_at)
            # Read once: a signal that came between saving and leaving would leave with nothing saved.
            signal_number = stop.signal_number
            due = leaving or signal_number is not None or _is_due(counters.step, options.save_every, num_steps)
            if improved or (due and saved_step != counters.step):
                log.sync()
                _save(run, identity, finished)
                saved_step = counters.step
            if leaving:
                return _result(run)
            if signal_number is not None:
                raise StoppedError(
                    f"Stopped after step {counters.step} of {num_steps}. A checkpoint was saved; --resume auto goes on "
                    "from there.",
                    signal_number,
                )

            row = _step(run)
            if "skipped" in row or counters.step % options.log_every == 0 or counters.step == num_steps:
                log.write(row)
            display.step(row)
            if "skipped" in row:
                display.say(f"step {counters.step}: skipped, {row['skipped']}")
            _refuse_divergence(run, row)


def is_finished(checkpoint: Checkpoint, num_steps: int) -> bool:
    """Whether nothing is left to do for a run of `num_steps` resumed here."""
    counters = _Counters(**checkpoint.state["counters"])
    return bool(checkpoint.state["finished"]) and (counters.stopped_early or counters.step >= num_steps)


def _begin(
    model: nn.Module,
    loss_fn: LossFunction,
    dataset: TokenizedDataset,
    order: Order,
    checkpoints: Path,
    options: LoopOptions,
    resume: Checkpoint | None,
) -> _Run:
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(
        parameters, lr=options.lr, betas=options.betas, epsilon=options.epsilon, weight_decay=options.weight_decay
    )
    clean_leftovers(checkpoints)
    if resume is None:
        if find_checkpoints(checkpoints):
            raise CheckpointError(f"{checkpoints} holds a run. Go on with --resume auto, or change train.output.")
        counters = _Counters()
    else:
        counters = _Counters(**resume.state["counters"])
        restore_parameters(trained_state(model), resume.tensors["trainable"])
        load_optimizer_tensors(optimizer, parameters, resume.tensors["optimizer"])
        if not _is_there(checkpoints, resume.step):
            # Another folder's: this one's run begins with it, since its weights may stay the best.
            save_checkpoint(checkpoints, resume.step, resume.tensors, resume.state)
        if not _is_there(checkpoints, counters.best_step):
            # Best in that other folder, or pruned here since: it cannot be taken at the end.
            counters.best_step = counters.best_loss = None
        # This run writes its own future; what an abandoned or damaged one left there would be taken for it.
        discard_after(checkpoints, resume.step)
        prune(checkpoints, options.keep_checkpoints, counters.best_step)
        restore_rng(resume.tensors["rng"])
    device = next(iter(parameters.values())).device
    wrapped = list(adapters(model).values())
    return _Run(model, loss_fn, dataset, order, options, checkpoints, parameters, wrapped, optimizer, device, counters)


def _step(run: _Run) -> dict[str, Any]:
    """One optimizer step; its row for metrics.jsonl, with `skipped` and the reason where the weights did not move."""
    started = time.perf_counter()
    options, counters = run.options, run.counters
    batches = _batches(run)
    lr = learning_rate(
        counters.step,
        num_steps=run.order.num_steps,
        peak=options.lr,
        schedule=options.schedule,
        warmup_steps=num_warmup_steps(options.warmup, run.order.num_steps),
        min_fraction=options.min_lr,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = lr
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


def _batches(run: _Run) -> list[Batch]:
    """The micro batches of the next optimizer step."""
    options, lengths = run.options, run.dataset.lengths
    parts = micro_batches(run.order.batch(run.counters.step), lengths, options.micro_batch_tokens, options.padded)
    if options.padded:
        return [pad(run.dataset, part, options.pad_id) for part in parts]
    return [pack(run.dataset, part, ROUND_TO) for part in parts]


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


def _evaluate(run: _Run, evaluate: Callable[[], Mapping[str, float]]) -> dict[str, Any]:
    """Evaluate and note whether this is the best so far; the row for metrics.jsonl."""
    counters = run.counters
    with _mode(run.model, training=False), torch.no_grad(), _out_of_memory_explained(run.options):
        scores = evaluate()
    counters.evaluated_step = counters.step
    if math.isfinite(scores["loss"]) and (counters.best_loss is None or scores["loss"] < counters.best_loss):
        counters.best_loss, counters.best_step, counters.stale_evaluations = scores["loss"], counters.step, 0
    else:
        counters.stale_evaluations += 1
        patience = run.options.early_stopping
        counters.stopped_early = patience is not None and counters.stale_evaluations >= patience
    epoch = run.order.epoch(counters.step)
    return {"step": counters.step, "epoch": epoch, **{f"eval_{name}": value for name, value in scores.items()}}


def _save(run: _Run, identity: Mapping[str, Any], finished: bool) -> None:
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
    state = {"counters": asdict(run.counters), "finished": finished, "identity": identity}
    save_checkpoint(run.checkpoints, run.counters.step, tensors, state)
    prune(run.checkpoints, run.options.keep_checkpoints, run.counters.best_step)


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
