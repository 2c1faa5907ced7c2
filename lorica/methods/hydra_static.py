"""HydraLoRA with its gates held at their means: a stock LoRA, which every server loads and which can be merged.

    sum_i g_i(x) B_i A x   becomes   (sum_i m_i B_i) A x,    m_i = the mean of g_i over the tokens of some rows

The heads share A, so the sum has the rank of one head. Stacked, [m_1 B_1 ... m_N B_N] [A; ...; A] of rank N r computes
the same and takes N times the room; it keeps the heads apart for who wants to weight them anew.

What it gives up: what the router knows of a token. How much that is, nobody can say but a measurement on rows that the
means were not taken from: `lorica adapter static` reports it as the divergence of the logits.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.errors import AdapterError
from lorica.methods.attach import adapters
from lorica.methods.hydra_linear import HydraLinear
from lorica.methods.hydra_sequence import Sequences
from lorica.methods.lora import LoRA
from lorica.methods.lora_kinds import LoraLinear
from lorica.methods.method import Adapter

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def mean_gates(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The mean gates [N] float32 of each HydraLoRA layer of `model`, by name, in evaluation mode.

    Args:
        batches: keywords for the model's forward; tokens that `attention_mask` [B, T] leaves out do not count.

    Raises:
        AdapterError: the model has no such layer, or one that no batch reaches.
    """
    layers = _layers(model)
    sums = {name: layer.lora_a.new_zeros(layer.num_heads, dtype=torch.float64) for name, layer in layers.items()}
    real: Tensor | None = None

    def watch(name: str, gates: Tensor) -> None:
        counted = gates if real is None or real.numel() != len(gates) else gates[real.flatten()]
        sums[name] += counted.double().sum(0)

    before, training = {name: layer.watch for name, layer in layers.items()}, model.training
    model.eval()
    try:
        for name, layer in layers.items():
            layer.watch = partial(watch, name)
        for batch in batches:
            mask = batch.get("attention_mask")
            real = None if mask is None else mask.bool()
            model(**batch)
    finally:
        model.train(training)
        for name, layer in layers.items():
            layer.watch = before[name]
    for name, layer in layers.items():
        if not layer.is_routed:
            sums[name].fill_(1.0)
    if idle := [name for name, total in sums.items() if not float(total.sum()) > 0]:
        raise AdapterError(f"hydra: the rows reach {len(idle)} layers not once, the first is {idle[0]}.")
    return {name: (total / total.sum()).float() for name, total in sums.items()}


def to_lora(model: Model, gates: Mapping[str, Tensor], *, stacked: bool = False) -> Model:
    """A new model with stock LoRA, alpha = rank, where `model` has HydraLoRA; `model` stays as it is.

    It shares every tensor that no HydraLoRA layer holds, and what is trained beside them.

    Args:
        gates: constant gates [N] for each layer, by name, as `mean_gates` finds them.
        stacked: rank N r, the heads side by side, instead of r.

    Raises:
        AdapterError: the model has no HydraLoRA layer, or `gates` are not those of its layers.
    """
    layers = _layers(model)
    if wrong := [name for name, a in layers.items() if name not in gates or gates[name].shape != (a.num_heads,)]:
        raise AdapterError(f"hydra: {wrong[0]} needs {layers[wrong[0]].num_heads} constant gates.")
    pairs = {name: _pair(layer, gates[name], stacked) for name, layer in layers.items()}
    rank = max(len(a) for a, _ in pairs.values())
    own = next(iter(layers.values())).options
    options = LoRA(
        rank=rank,
        alpha=rank,
        dropout=own.dropout,
        targets=tuple(re.escape(name) for name in layers),
        modules_to_save=own.modules_to_save,
        trainable_tokens=own.trainable_tokens,
    )
    memo: dict[int, object] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    for name, adapter in adapters(model).items():
        memo[id(adapter)] = _lora(layers[name], pairs[name], options) if name in layers else _of(adapter, options)
    plain = copy.deepcopy(model, memo)
    for layer in layers.values():
        # The copy needs no notes of its samples.
        if isinstance(copied := memo.get(id(layer.sequences)), Sequences):
            copied.remove()
    return plain


def _layers(model: nn.Module) -> dict[str, HydraLinear]:
    layers = {name: adapter for name, adapter in adapters(model).items() if isinstance(adapter, HydraLinear)}
    if not layers:
        raise AdapterError("The model carries no HydraLoRA.")
    return layers


def _pair(layer: HydraLinear, gates: Tensor, stacked: bool) -> tuple[Tensor, Tensor]:
    """A [k, in] and B [out, k] with the scale in B."""
    lora_a, gates = layer.lora_a.detach(), gates.to(layer.lora_a) * layer.scale
    if not stacked:
        return lora_a, layer.mixed(gates).detach()
    return lora_a.repeat(layer.num_heads, 1), layer.lora_b.detach() * gates.repeat_interleave(layer.rank)


@torch.no_grad()
def _lora(layer: HydraLinear, pair: tuple[Tensor, Tensor], options: LoRA) -> LoraLinear:
    """One of smaller rank is filled up with zeros."""
    made = LoraLinear(layer.base, options, options.rank, 1.0)
    room = options.rank - len(pair[0])
    made.lora_a.copy_(F.pad(pair[0], (0, 0, 0, room)))
    made.lora_b.copy_(F.pad(pair[1], (0, room)))
    return made.train(layer.training)


def _of(adapter: Adapter, options: LoRA) -> Adapter:
    """What is trained beside the layers, as part of a model with `options`."""
    found = copy.copy(adapter)
    found.options = options
    return found
