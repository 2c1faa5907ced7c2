"""One optimizer step of a run: gradients over micro batches, clipping, the update, and the row that tells of it.

The loss of a step is the mean over ALL its trained tokens, however they are cut into micro batches: each gives the sum
of its token losses, and the summed gradient is divided by the number of targets of the whole step.

What it gives up: overlap of data and compute (a batch is a few kilobytes of ids), and loss scaling for float16.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.data.layouts import PACKED, Layout
from lorica.data.packing import Batch
from lorica.data.sampler import Order
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import DoesNotFitError
from lorica.methods.attach import adapters, lr_factors, trainable_parameters
from lorica.methods.method import Adapter
from lorica.models.loss import LossFunction
from lorica.training.energy import Meter, meter_of
from lorica.training.metrics import peak_memory_bytes
from lorica.training.optim import clip_gradients, forget_moments, make_optimizer, set_learning_rate
from lorica.training.paged import Tiers
from lorica.training.schedule import learning_rate, num_warmup_steps


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


@dataclass
class Counters:
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
class Run:
    """What the parts of one run share. saved_step: the step whose checkpoint holds all that there is to know of it."""

    model: nn.Module
    loss_fn: LossFunction
    evaluate: Callable[[], Mapping[str, float]] | None
    dataset: TokenizedDataset
    order: Order
    options: LoopOptions
    identity: Mapping[str, Any]
    checkpoints: Path
    counters: Counters = field(default_factory=Counters)
    saved_step: int | None = None
    parameters: dict[str, nn.Parameter] = field(init=False)
    wrapped: list[Adapter] = field(init=False)
    optimizer: torch.optim.AdamW = field(init=False)
    device: torch.device = field(init=False)
    meter: Meter = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        self.parameters = trainable_parameters(self.model)
        self.wrapped = list(adapters(self.model).values())
        self.device = next(iter(self.parameters.values())).device
        self.meter = meter_of(self.device)
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


def take_step(run: Run) -> dict[str, Any]:
    """One optimizer step; its row for metrics.jsonl, with `skipped` and the reason where the weights did not move."""
    run.meter.begin()
    started = time.perf_counter()
    options, counters = run.options, run.counters
    batches = _batches(run)
    every = options.restart_every
    if every is not None and counters.step > 0 and counters.step % every == 0:
        _restart(run)
    lr = _learning_rate(run)
    set_learning_rate(run.optimizer, lr)
    with out_of_memory_explained(options):
        loss, norm, skipped = _optimize(run, batches)

    num_tokens = sum(batch.num_tokens for batch in batches)
    seconds = time.perf_counter() - started
    run.meter.note()
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
    if run.meter.total.joules is not None:
        row["joules"] = run.meter.total.joules
    return {**row, "skipped": skipped} if skipped else row


def _restart(run: Run) -> None:
    """Fold what the pairs have learned away and start fresh ones, whose moments start anew (ReLoRA, arXiv 2307.05695).

    Before a step, not after one: a run that goes on beyond what was its last step is the run that was always longer.
    """
    for adapter in run.wrapped:
        forget_moments(run.optimizer, adapter.restart())


def _learning_rate(run: Run) -> float:
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


def _batches(run: Run) -> list[Batch]:
    """The micro batches of the next optimizer step."""
    options = run.options
    return options.layout.batches(run.dataset, run.order.batch(run.counters.step), options.micro_batch_tokens)


def _optimize(run: Run, batches: list[Batch]) -> tuple[float | None, float, str]:
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


def _accumulate_gradients(run: Run, batches: list[Batch], num_targets: int) -> Tensor:
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


@contextmanager
def out_of_memory_explained(options: LoopOptions) -> Iterator[None]:
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
            "train.activation_checkpointing=true or =offload, model.dtype=bfloat16 or a smaller data.max_length."
        ) from error
