"""HydraLoRA with constant gates: a stock LoRA, which every server loads and which can be merged.

    sum_i g_i(x) B_i h   becomes   sum_i B_i W_i h,    h = A x

W_i = m_i, the mean of g_i over the tokens of some rows, is what comes to mind. The best W_i [r, r] is that of least
squares: with M_i the mean of g_i h h^T over the same tokens, W_i = M_i (sum_j M_j)^-1 makes the expected square of the
difference as small as it can be for any B. It costs the same pass. Directions of h that are hardly seen take m_i.

The heads share A, so the sum has the rank of one head. Stacked, [B_1 W_1 ... B_N W_N] [A; ...; A] of rank N r computes
the same and takes N times the room; it keeps the heads apart for who wants to weight them anew.

What it gives up: what the router knows of a token. How much that is, nobody can say but a measurement on rows that the
calibration has not seen: `lorica adapter static` reports it as the divergence of the logits.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.errors import AdapterError
from lorica.kernels.linear import linear
from lorica.methods.attach import adapters
from lorica.methods.hydra_linear import HydraLinear
from lorica.methods.hydra_sequence import Sequences
from lorica.methods.lora import LoRA
from lorica.methods.lora_kinds import LoraLinear
from lorica.methods.method import Adapter

Model = TypeVar("Model", bound=nn.Module)

_PRIOR = 1e-3
"""How much the means weigh in directions of h that calibration has hardly seen, as a share of an average one."""


@dataclass(frozen=True)
class Constants:
    """What stands for a layer's gates: their means, gates [N], or what weights the heads best, mixes [N, r, r]."""

    gates: Tensor
    mixes: Tensor


def mean_gates(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The `gates` of `calibrated` alone."""
    return {name: constants.gates for name, constants in calibrated(model, batches).items()}


@torch.no_grad()
def calibrated(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, Constants]:
    """The constants, float32, of each HydraLoRA layer of `model`, by name, in evaluation mode.

    Args:
        batches: keywords for the model's forward; tokens that `attention_mask` [B, T] leaves out do not count.

    Raises:
        AdapterError: the model has no such layer, or one that no batch reaches.
    """
    layers = _layers(model)
    # Sums over tokens of g_i (h, 1) (h, 1)^T: the last number of each is that of the gate alone.
    sums = {n: a.lora_a.new_zeros(a.num_heads, a.rank + 1, a.rank + 1, dtype=torch.float64) for n, a in layers.items()}
    inputs: dict[str, Tensor] = {}
    real: Tensor | None = None

    def read(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0]

    def watch(name: str, gates: Tensor) -> None:
        x = inputs.pop(name)
        h = F.pad(linear(x.reshape(len(gates), -1), layers[name].lora_a).double(), (0, 1), value=1.0)
        if real is not None and real.numel() == len(gates):
            gates, h = gates[real.flatten()], h[real.flatten()]
        weighted = gates.double()[:, :, None] * h[:, None, :]
        sums[name] += (weighted.flatten(1).t() @ h).view_as(sums[name])

    before, training = {name: layer.watch for name, layer in layers.items()}, model.training
    hooks = [layer.register_forward_pre_hook(partial(read, name)) for name, layer in layers.items()]
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
        for hook in hooks:
            hook.remove()
        for name, layer in layers.items():
            layer.watch = before[name]
    for name, layer in layers.items():
        if not layer.is_routed:
            sums[name][:] = torch.eye(layer.rank + 1)
    if idle := [name for name, total in sums.items() if not float(total[:, -1, -1].sum()) > 0]:
        raise AdapterError(f"hydra: the rows reach {len(idle)} layers not once, the first is {idle[0]}.")
    return {name: _constants(total) for name, total in sums.items()}


def _constants(sums: Tensor) -> Constants:
    moments, counts = sums[:, :-1, :-1], sums[:, -1, -1]
    gates = counts / counts.sum()
    total = moments.sum(0)
    prior = _PRIOR * total.diagonal().mean().clamp(min=torch.finfo(total.dtype).tiny) * torch.eye(len(total)).to(total)
    # Both sides are symmetric: W_i (total + prior) = M_i + m_i prior.
    mixes = torch.linalg.solve(total + prior, moments + gates[:, None, None] * prior).transpose(1, 2)
    return Constants(gates.float(), mixes.float())


def to_lora(model: Model, gates: Mapping[str, Tensor], *, stacked: bool = False) -> Model:
    """A new model with stock LoRA, alpha = rank, where `model` has HydraLoRA; `model` stays as it is.

    It shares every tensor that no HydraLoRA layer holds, and what is trained beside them.

    Args:
        gates: for each layer, by name, constant gates [N] or mixes [N, r, r], as `calibrated` finds them.
        stacked: rank N r, the heads side by side, instead of r.

    Raises:
        AdapterError: the model has no HydraLoRA layer, or `gates` are not those of its layers.
    """
    layers = _layers(model)
    if wrong := [name for name, layer in layers.items() if name not in gates or not _fits(gates[name], layer)]:
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


def _fits(gates: Tensor, layer: HydraLinear) -> bool:
    return gates.shape in ((layer.num_heads,), (layer.num_heads, layer.rank, layer.rank))


def _pair(layer: HydraLinear, gates: Tensor, stacked: bool) -> tuple[Tensor, Tensor]:
    """A [k, in] and B [out, k] with the scale in B."""
    lora_a, gates = layer.lora_a.detach(), gates.to(layer.lora_a) * layer.scale
    mixes = gates[:, None, None] * torch.eye(layer.rank).to(gates) if gates.dim() == 1 else gates
    heads = layer.heads().detach() @ mixes
    if not stacked:
        return lora_a, heads.sum(0)
    return lora_a.repeat(layer.num_heads, 1), heads.transpose(0, 1).flatten(1)


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
