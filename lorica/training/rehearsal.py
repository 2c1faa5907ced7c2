"""Rehearse a training step on fake tensors: its memory and its work, without weights and without doing the work.

The real model class, adapters, loss, backward, clipping and AdamW run on tensors that have shapes but no contents. A
dispatch mode below autograd sees every operation and follows every storage from birth to death, views included, so
activation checkpointing, tied weights and the loss's chunks need no formula of their own. Fake CPU tensors take the
CPU's own kernels, its attention among them, so what is kept for backward is what is really kept.

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
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count
from transformers import PretrainedConfig, PreTrainedModel

from lorica.data.layouts import class_batch, pair_batch
from lorica.data.packing import ROUND_TO, Batch, pack, pad
from lorica.data.tokenized import IGNORE, TokenizedDataset
from lorica.kernels.cpu import WIDE_ROWS
from lorica.kernels.linear import cpu_computes, is_widened, never_widened
from lorica.methods.attach import adapters, attach, trainable_parameters, with_whole
from lorica.methods.method import MethodOptions
from lorica.models.load import equip
from lorica.models.loss import make_loss
from lorica.models.tasks import CAUSAL, CLASSIFICATION, SEQ2SEQ, Task, head_modules
from lorica.quant.linear import layers, num_parameters
from lorica.quant.loading import quantize_skeleton
from lorica.training.heap import filled_bytes
from lorica.training.optim import clip_gradients, held_tensors, make_optimizer, num_paged_bytes
from lorica.training.paged import Tiers

RUNTIME_BYTES = 20 << 20
"""What the first steps bring in besides tensors, in float32: kernels, their scratch and caches, autograd's nodes."""

RUNTIME_BYTES_16_BIT = 80 << 20
"""The same where the CPU has 16-bit kernels, which are built for each shape: 64 MiB for one, 14 to 20 for a second."""

MENDING_BYTES = 20
"""Of each element of a square weight whose quantisation error is decomposed: the error, and what LAPACK needs."""

aten = torch.ops.aten
_QUANTISED_PRODUCTS = (
    torch.ops.lorica.linear_4bit, torch.ops.lorica.linear_4bit_input_grad,
    torch.ops.lorica.linear_8bit, torch.ops.lorica.linear_8bit_input_grad,
)  # fmt: skip

# Operations a byte: an adapter of rank 16 has about 15 in bfloat16, a square product of the smallest models 80.
_NARROW = 40


class Operation(NamedTuple):
    """How much one call of a kind of operation does.

    Kinds: `matmul`, `narrow_matmul` (few operations a byte: an adapter's, which run far below a kernel's best),
    `attention`, `attention_backward` and `memory`, all that has no flops. `moved_bytes` are read and written.
    """

    kind: str
    flops: int
    moved_bytes: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Books every storage that operations give out and drop while the mode is on, and the work that they do.

    Storages are numbered from 0 in the order of birth: `sizes` are their bytes, `events` holds (number, +1 for its
    birth or -1 for its death) in order. `work` counts operations.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []
        self.events: list[tuple[int, int]] = []
        self.work: Counter[Operation] = Counter()
        self._numbers: dict[int, int] = {}

    def add(self, tensor: Tensor) -> int:
        """The number of the tensor's storage, which is born now if it was not known."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._numbers:
            self._numbers[key] = len(self.sizes)
            self.events.append((len(self.sizes), 1))
            self.sizes.append(storage.nbytes())
            weakref.finalize(storage, self._died, key).atexit = False
        return self._numbers[key]

    def alive(self, end: int | None = None) -> set[int]:
        """The storages alive before event `end`."""
        changes = Counter[int]()
        for number, change in self.events[:end]:
            changes[number] += change
        return {number for number, change in changes.items() if change}

    def peak(self, begin: int = 0, end: int | None = None) -> int:
        """The `end` for `alive` at which most bytes are alive, after event `begin` and not after `end`."""
        changes = np.array([self.sizes[number] * change for number, change in self.events])
        return begin + 1 + int(np.argmax(np.cumsum(changes)[begin:end]))

    def _died(self, key: int) -> None:
        self.events.append((self._numbers.pop(key), -1))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {self.add(t) for t in inputs}
        born = [t for t in tree_leaves(out) if isinstance(t, Tensor) and self.add(t) not in known]
        if inside := _bytes_inside(func._overloadpacket, args, out):
            self.events += [(len(self.sizes), 1), (len(self.sizes), -1)]
            self.sizes.append(inside)
        if born or func._schema.is_mutable:
            kind, flops = _work(func._overloadpacket, args, kwargs or {}, out)
            moved_bytes = sum(t.numel() * t.element_size() for t in inputs + born)
            if kind == "matmul" and flops < _NARROW * moved_bytes:
                kind = "narrow_matmul"
            self.work[Operation(kind, flops, moved_bytes)] += 1
        return out


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
        num_tokens: of the micro batch, without padding.
        work: what one micro batch does, forward and backward, and the optimizer after it.
        device: whose accounting this is, `cpu` or `cuda`.
    """

    moments: dict[str, Parts]
    runtime: int
    holes: int
    loading: int
    paged_bytes: int
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
    activation_checkpointing: bool = False,
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
    ledger = Ledger()
    marks: list[int] = []
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
        if activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        trained = trainable_parameters(model.train())
        for layer in layer_list(model)[1:]:
            layer.register_forward_pre_hook(partial(_mark_backward, ledger, marks), with_kwargs=True)
        optimizer = make_optimizer(
            trained,
            lr=1e-4,
            betas=(0.9, 0.999),
            epsilon=1e-8,
            weight_decay=0.0,
            bits=optimizer_bits,
            tiers=Tiers(optimizer_memory),
        )
        with ledger:
            held = {ledger.add(t) for t in (*model.parameters(), *model.buffers())}
            adapter = {ledger.add(t) for t in trained.values()}
            # What is looked at is a later step, which finds the optimizer's state and, after another micro batch, the
            # gradients.
            for parameter in trained.values():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            moments = {ledger.add(t) for t in held_tensors(optimizer)}
            if num_micro_batches == 1:
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
    groups = _disjoint(held - adapter, adapter, gradients, moments, kept, set(range(len(ledger.sizes))))
    ends = {"forward": forward_end, "last layer": backward_end, "step": len(ledger.events)}
    if marks:
        ends |= {"last layer": marks[0], "between": marks[-1], "first layer": backward_end}
    step_moments, first = {}, begin
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if first < end:
            peak = ledger.alive(ledger.peak(first, end))
            step_moments[name] = Parts(*(sum(ledger.sizes[n] for n in group & peak) for group in groups))
        first = end
    live = max(map(sum, step_moments.values()))
    return Rehearsal(
        moments=step_moments,
        runtime=RUNTIME_BYTES_16_BIT if dtype.itemsize == 2 and cpu_computes(dtype) else RUNTIME_BYTES,
        holes=filled_bytes(ledger.sizes, ledger.events, begin, repeats=2) - live if wanted.type == "cpu" else 0,
        loading=_loading_bytes(config, dtype, step_moments["forward"].weights, place, model),
        paged_bytes=num_paged_bytes(optimizer),
        num_parameters=num_parameters(model),
        num_trainable=sum(p.numel() for p in trained.values()),
        num_tokens=batch.num_tokens,
        work=ledger.work,
        device=place.type,
    )


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
        return class_batch(dataset, everything, 0, token_types=False)
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


def _work(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[str, int]:
    """Kind and floating-point operations of one call. torch has no count for the CPU's attention."""
    if op is aten._scaled_dot_product_flash_attention_for_cpu:
        return "attention", _attention_flops(args[:3])
    if op is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return "attention_backward", _attention_flops(args[1:4]) * 5 // 2
    if op in _QUANTISED_PRODUCTS:
        return "matmul", 2 * args[0].numel() * args[5]
    if op not in flop_registry:
        return "memory", 0
    kind = "matmul"
    if "attention" in str(op):
        kind = "attention_backward" if "backward" in str(op) else "attention"
    return kind, int(flop_registry[op](*args, **kwargs, out_val=out))


def _bytes_inside(op: Any, args: Sequence[Any], out: Tensor) -> int:
    """Of what an operation writes out inside for a moment.

    For a product that is a quantised weight, its scales if they are quantised too, and what is widened to float32 for
    it, the result among that. `logsumexp` writes out the exponentials of all its input.
    """
    if op is aten.logsumexp:
        return int(args[0].nbytes)
    if op not in (torch.ops.lorica.linear_16bit, *_QUANTISED_PRODUCTS):
        return 0
    x: Tensor = args[0]
    wide = 4 if is_widened(x) else 0
    if op is torch.ops.lorica.linear_16bit:
        return 0 if x.numel() // x.shape[-1] <= WIDE_ROWS else wide * (x.numel() + args[1].numel() + out.numel())
    absmax: Tensor = args[2]
    weight = x.shape[-1] * int(args[5]) * (wide or x.element_size())
    scales = 0 if absmax.dtype == torch.float32 else 4 * absmax.numel()
    return weight + scales + wide * (x.numel() + out.numel())


def _attention_flops(query_key_value: Sequence[Tensor]) -> int:
    return int(sdpa_flop_count(*(t.shape for t in query_key_value)))  # type: ignore[no-untyped-call]
