"""Rehearse a training step on fake tensors: its memory and its work, without weights and without doing the work.

The real model class, adapters, loss, backward, clipping and AdamW run on tensors that have shapes but no contents. A
`Ledger` follows every storage from birth to death, so activation checkpointing, tied weights and the loss's chunks need
no formula of their own. Fake CPU tensors take the CPU's own kernels, its attention among them, so what is kept for
backward is what is really kept.

On a GPU that torch can see the rehearsal runs on fake CUDA tensors. torch cannot pretend a GPU that is not there; the
CPU's accounting stands in then.

What the process holds is more than what is alive, by holes between tensors. The step's births and deaths are replayed
through the algorithm of the pool that they will live in (`heap.py`), twice, since the second step finds the first
one's holes. Two numbers stand for the rest, set by repeated steps in 11 settings of four models (8 to 135 million
parameters). It gives up the holes that steps of changing row lengths leave for each other.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from lorica.data.layouts import classes, pair_batch
from lorica.data.packing import ROUND_TO, Batch, pack, pad
from lorica.data.tokenized import IGNORE, TokenizedDataset
from lorica.kernels.linear import cpu_computes, never_widened
from lorica.methods.attach import adapters, attach, trainable_parameters, with_whole
from lorica.methods.method import MethodOptions
from lorica.models.load import equip
from lorica.models.loss import LossFunction, make_loss
from lorica.models.tasks import CAUSAL, CLASSIFICATION, SEQ2SEQ, Task, head_modules
from lorica.quant.linear import layers, num_parameters
from lorica.quant.loading import quantize_skeleton
from lorica.training.heap import filled_bytes
from lorica.training.ledger import Ledger, Operation
from lorica.training.offload import Checkpointing, checkpoint_layers
from lorica.training.optim import clip_gradients, held_tensors, make_optimizer, num_paged_bytes
from lorica.training.paged import Tiers

RUNTIME_BYTES = 20 << 20
"""What the first steps bring in besides tensors, in float32: kernels, their scratch and caches, autograd's nodes."""

RUNTIME_BYTES_16_BIT = 80 << 20
"""The same where the CPU has 16-bit kernels, which are built for each shape: 64 MiB for one, 14 to 20 for a second."""

MENDING_BYTES = 20
"""Of each element of a square weight whose quantisation error is decomposed: the error, and what LAPACK needs."""


class Parts(NamedTuple):
    """Bytes of live tensors at one moment.

    Attributes:
        weights: the base's parameters and buffers.
        adapter: what is trained, in float32.
        gradients: of what is trained; most peaks come before they exist.
        optimizer: AdamW's moments, as far as they are on the device.
        activations: kept by the forward pass for backward.
        workspace: all else: the loss's chunk, gradients of activations on their way, temporaries.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int


@dataclass(frozen=True)
class Rehearsal:
    """What an optimizer step needs.

    Attributes:
        moments: what is live when a part of the step needs most: `forward` with the loss, backward of the `last layer`,
            of those `between`, of the `first layer` with the embedding, and the optimizer's `step`.
        runtime: what the first steps bring in besides tensors.
        holes: what the process holds beyond live tensors because they come and go between others.
        loading: most that loading holds, if the checkpoint's dtype is not the run's and both are there for a while.
        paged_bytes: of AdamW's moments, that are not on the device.
        offloaded_bytes: of the inputs of checkpointed layers, that wait for backward elsewhere.
        num_tokens: of the micro batch, without padding.
        work: what one micro batch does, forward and backward, and the optimizer after it.
        device: whose accounting this is, `cpu` or `cuda`.
    """

    moments: dict[str, Parts]
    runtime: int
    holes: int
    loading: int
    paged_bytes: int
    offloaded_bytes: int
    num_parameters: int
    num_trainable: int
    num_tokens: int
    work: Counter[Operation]
    device: str

    @property
    def parts(self) -> Parts:
        """The parts at the moment when their sum is greatest."""
        return max(self.moments.values(), key=sum)

    @property
    def live_bytes(self) -> int:
        """Bytes of live tensors at the peak."""
        return sum(self.parts)

    @property
    def overhead(self) -> int:
        """What the process holds beyond live tensors."""
        return self.runtime + self.holes

    @property
    def peak_bytes(self) -> int:
        """By how much the process's memory grows, from before the base is loaded to the worst moment of the run."""
        return max(self.live_bytes + self.overhead, self.loading)


def rehearse(
    config: PretrainedConfig,
    options: MethodOptions,
    *,
    dtype: torch.dtype,
    lengths: Sequence[int],
    device: torch.device | str = "cpu",
    trained_fraction: float = 1.0,
    padded: bool = False,
    num_micro_batches: int = 1,
    activation_checkpointing: Checkpointing = False,
    num_restarts: int = 0,
    task: Task = CAUSAL,
    optimizer_bits: int = 32,
    optimizer_memory: int | None = None,
    quant: str | None = None,
    double_quant: bool = True,
) -> Rehearsal:
    """Rehearse an optimizer step of micro batches that hold samples of `lengths` tokens; no weights are read.

    The random state and `config` are left as they are. `trained_fraction` is the share of tokens that are targets,
    `num_restarts` how often the adapters have been started anew. A classifier's classes are those of `config`.

    Raises:
        TargetError: `options.targets` matches nothing in this model.
    """
    wanted = torch.device(device)
    # torch cannot pretend a GPU that is not there. The CPU stands in, without what only a CPU does.
    stands_in = wanted.type == "cuda" and not torch.cuda.is_available()
    place = torch.device("cpu") if stands_in else wanted
    batch = example_batch(lengths, trained_fraction=trained_fraction, padded=padded, task=task)
    with (
        torch.random.fork_rng(devices=[]),
        FakeTensorMode(allow_non_fake_inputs=True),
        never_widened() if stands_in else contextlib.nullcontext(),
    ):
        model = _build(config, task, dtype, place, quant, double_quant, options)
        loss_fn = make_loss(model)
        attach(model, with_whole(options, head_modules(model)))
        for wrapped in list(adapters(model).values()) * num_restarts:
            wrapped.restart()
        store = checkpoint_layers(model, activation_checkpointing, None)
        trained = trainable_parameters(model.train())
        tiers = Tiers(optimizer_memory)
        optimizer = make_optimizer(
            trained, lr=1e-4, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.0, bits=optimizer_bits, tiers=tiers
        )
        step = _take_step(model, loss_fn, optimizer, batch, place, accumulates=num_micro_batches > 1)
    moments = step.moments()
    holes = step.filled_bytes() - max(map(sum, moments.values())) if wanted.type == "cpu" else 0
    return Rehearsal(
        moments=moments,
        runtime=RUNTIME_BYTES_16_BIT if dtype.itemsize == 2 and cpu_computes(dtype) else RUNTIME_BYTES,
        holes=holes,
        loading=_loading_bytes(config, dtype, moments["forward"].weights, place, model),
        paged_bytes=num_paged_bytes(optimizer),
        offloaded_bytes=0 if store is None else store.num_bytes,
        num_parameters=num_parameters(model),
        num_trainable=sum(p.numel() for p in trained.values()),
        num_tokens=batch.num_tokens,
        work=step.ledger.work,
        device=place.type,
    )


@dataclass(frozen=True)
class _Step:
    """A step in its ledger: the storages of each of `Parts`, the event it begins at, and those that end its moments."""

    ledger: Ledger
    groups: list[set[int]]
    begin: int
    ends: dict[str, int]

    def moments(self) -> dict[str, Parts]:
        """What is live at the worst of each moment; one in which nothing happens is left out."""
        sizes, first, result = self.ledger.sizes, self.begin, {}
        for name, end in sorted(self.ends.items(), key=lambda item: item[1]):
            if first < end:
                peak = self.ledger.alive(self.ledger.peak(first, end))
                result[name] = Parts(*(sum(sizes[n] for n in group & peak) for group in self.groups))
            first = end
        return result

    def filled_bytes(self) -> int:
        """The pool that such steps fill, one after another."""
        return filled_bytes(self.ledger.sizes, self.ledger.events, self.begin, repeats=2)


def _take_step(
    model: PreTrainedModel,
    loss_fn: LossFunction,
    optimizer: torch.optim.AdamW,
    batch: Batch,
    place: torch.device,
    *,
    accumulates: bool,
) -> _Step:
    """The last micro batch of a later step, which finds the optimizer's state and, if it `accumulates`, gradients."""
    ends = [0] if batch.cu_seqlens is None else batch.cu_seqlens.tolist()
    ledger, marks, trained = Ledger(np.diff(ends).tolist()), list[int](), trainable_parameters(model)
    for layer in layer_list(model)[1:]:
        layer.register_forward_pre_hook(partial(_mark_backward, ledger, marks), with_kwargs=True)
    with ledger:
        held = {ledger.add(t) for t in (*model.parameters(), *model.buffers())}
        adapter = {ledger.add(t) for t in trained.values()}
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        moments = {ledger.add(t) for t in held_tensors(optimizer)}
        if not accumulates:
            optimizer.zero_grad(set_to_none=True)
        ledger.work.clear()
        begin = len(ledger.events)
        loss = loss_fn(model, batch.to(place).model_inputs(), batch.targets)
        kept, forward_end = ledger.alive(), len(ledger.events)
        (loss / max(1, batch.num_targets)).backward()  # type: ignore[no-untyped-call]
        del loss
        backward_end = len(ledger.events)
        gradients = {ledger.add(p.grad) for p in trained.values() if p.grad is not None}
        clip_gradients(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    moments_end = {"forward": forward_end, "last layer": backward_end, "step": len(ledger.events)}
    if marks:
        moments_end |= {"last layer": marks[0], "between": marks[-1], "first layer": backward_end}
    groups = _disjoint(held - adapter, adapter, gradients, moments, kept, set(range(len(ledger.sizes))))
    return _Step(ledger, groups, begin, moments_end)


def layer_list(model: nn.Module) -> nn.ModuleList:
    """The model's layers: the longest list of modules in it, or an empty one."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def _mark_backward(ledger: Ledger, marks: list[int], layer: nn.Module, args: Any, kwargs: Any) -> None:
    """Put down in `marks` when the backward pass has gone through `layer`."""
    hidden = args[0] if args else kwargs.get("hidden_states")
    if isinstance(hidden, Tensor) and hidden.requires_grad:
        hidden.register_hook(lambda _: marks.append(len(ledger.events)))  # type: ignore[no-untyped-call]


def example_batch(
    lengths: Sequence[int], *, trained_fraction: float = 1.0, padded: bool = False, task: Task = CAUSAL
) -> Batch:
    """A batch of samples of `lengths` tokens, all of token 0, the trained ones spread evenly, or at the end of each
    where they are a pair's target.
    """
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    position = np.arange(offsets[-1])
    trained = np.floor((position + 1) * trained_fraction) > np.floor(position * trained_fraction)
    ids = np.zeros(offsets[-1], np.int32)
    if task is not CAUSAL:
        # A class stands at the last token; of a pair at least one token is read and one written.
        share = 0.0 if task is CLASSIFICATION else trained_fraction
        first = [end - max(1, min(round(n * share), n - 1)) for end, n in zip(offsets[1:], lengths, strict=True)]
        trained = position >= np.repeat(first, lengths)
    dataset = TokenizedDataset(ids, np.where(trained, ids, IGNORE).astype(np.int32), offsets)
    everything = np.arange(len(lengths), dtype=np.int64)
    if task is CLASSIFICATION:
        layout = classes(0, token_types=False, packing=not padded)
        return layout.make(dataset, everything)
    if task is SEQ2SEQ:
        return pair_batch(dataset, everything, 0, 0)
    return pad(dataset, everything, 0) if padded else pack(dataset, everything, ROUND_TO)


def _build(
    config: PretrainedConfig,
    task: Task,
    dtype: torch.dtype,
    device: torch.device,
    quant: str | None,
    double_quant: bool,
    options: MethodOptions,
) -> PreTrainedModel:
    with device:
        model: PreTrainedModel = task.auto.from_config(copy.deepcopy(config), dtype=dtype)
    quantize_skeleton(model, quant, double_quant, options)
    return equip(model)


def _disjoint(*groups: Iterable[int]) -> list[set[int]]:
    """The groups, each without what an earlier one has."""
    seen: set[int] = set()
    result = []
    for group in groups:
        result.append(set(group) - seen)
        seen |= result[-1]
    return result


def _loading_bytes(
    config: PretrainedConfig, dtype: torch.dtype, weights: int, device: torch.device, model: PreTrainedModel
) -> int:
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else dtype
    if sizes := [layer.shape.numel() for _, layer in layers(model)]:
        # They are quantised one after another.
        mended = max((layer.shape.numel() for _, layer in layers(model) if layer.mender is not None), default=0)
        each = max(sizes) * (stored.itemsize + (0 if stored == dtype else dtype.itemsize))
        return weights + each + mended * MENDING_BYTES
    if device.type != "cpu" or stored == dtype:
        return weights
    return weights + weights * stored.itemsize // dtype.itemsize
