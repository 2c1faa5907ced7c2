"""Rehearse a deep model by two shallow ones: where all layers are alike, each of them adds the same to a step.

A step of 80 layers is a hundred thousand operations, which take minutes to rehearse. What each part of the memory needs
at a given moment of the step (`Rehearsal.moments`) lies on a straight line over the number of layers, so models of
three and of four tell it, and the largest of the moments is that of the deep model, which may be another than theirs.

What it gives up: holes between tensors are guessed to grow with the layers as tensors do. Models whose layers differ,
and adapters on some of the layers, are rehearsed whole.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lorica.methods.attach import with_whole
from lorica.methods.beside import resolve_beside
from lorica.methods.method import MethodOptions
from lorica.methods.selection import resolve_targets
from lorica.models.tasks import CAUSAL, Task, head_modules
from lorica.quant.loading import quantize_skeleton
from lorica.training.ledger import Operation
from lorica.training.paged import share_on_device
from lorica.training.rehearsal import Parts, Rehearsal, layer_list, rehearse

_FEW, _MORE = 3, 4
"""With three there is one between the last layer and the first."""

_LEAST = 12
"""Layers from which on it is worth it."""


def rehearse_deep(config: PretrainedConfig, options: MethodOptions, *, task: Task = CAUSAL, **step: Any) -> Rehearsal:
    """As `rehearse`, with its arguments, in time that does not depend on the number of layers if they are alike.

    Raises:
        TargetError: `options.targets` matches nothing in this model.
    """
    depth = getattr(config, "num_hidden_layers", 0)
    if depth < _LEAST or not are_alike(config, options, task):
        return rehearse(config, options, task=task, **step)
    # What a budget leaves on the device is no straight line, and is known without a rehearsal.
    budget, bits = step.pop("optimizer_memory", None), step.get("optimizer_bits", 32)
    few, more = (rehearse(_cut(config, number), options, task=task, **step) for number in (_FEW, _MORE))

    def at_depth(first: int, second: int) -> int:
        return first + (second - first) * (depth - _FEW) // (_MORE - _FEW)

    moments = {
        name: Parts(*map(at_depth, few.moments[name], more.moments[name])) for name in few.moments.keys() & more.moments
    }
    on_device, paged = share_on_device(moments["step"].optimizer, bits, budget)
    moments = {name: parts._replace(optimizer=on_device) for name, parts in moments.items()}
    live = max(map(sum, moments.values()))
    return Rehearsal(
        moments=moments,
        runtime=more.runtime,
        holes=more.holes * live // more.live_bytes,
        loading=at_depth(few.loading, more.loading),
        paged_bytes=paged,
        offloaded_bytes=at_depth(few.offloaded_bytes, more.offloaded_bytes),
        num_parameters=at_depth(few.num_parameters, more.num_parameters),
        num_trainable=at_depth(few.num_trainable, more.num_trainable),
        num_tokens=more.num_tokens,
        work=_work_at_depth(few.work, more.work, at_depth),
        device=more.device,
    )


def skeleton(
    config: PretrainedConfig,
    options: MethodOptions,
    *,
    task: Task = CAUSAL,
    quant: str | None = None,
    double_quant: bool = True,
) -> tuple[PreTrainedModel, set[str]]:
    """The model without weights, in a moment, and the names of what the method wraps or trains beside.

    Raises:
        TargetError: `options.targets` matches nothing in this model.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model: PreTrainedModel = task.auto.from_config(copy.deepcopy(config))
        quantize_skeleton(model, quant, double_quant)
    options = with_whole(options, head_modules(model))
    beside = resolve_beside(model, options).names
    return model, {*resolve_targets(model, options, beside), *beside}


def are_alike(config: PretrainedConfig, options: MethodOptions, task: Task = CAUSAL) -> bool:
    """Whether all layers of the model have the same modules, parameters and adapters.

    Raises:
        TargetError: as `skeleton`.
    """
    model, names = skeleton(config, options, task=task)
    layers = layer_list(model)
    prefix = next((name for name, module in model.named_modules() if module is layers), "")
    described = {
        (
            tuple((name, type(m), f"{prefix}.{number}.{name}" in names) for name, m in layer.named_modules()),
            tuple((name, p.shape) for name, p in layer.named_parameters()),
        )
        for number, layer in enumerate(layers)
    }
    is_plain = config.get_text_config() is config and all(len(set(map(str, each))) == 1 for each in _per_layer(config))
    return is_plain and len(layers) == config.num_hidden_layers and len(described) == 1 and not _names_layers(options)


def _names_layers(options: MethodOptions) -> bool:
    """Whether patterns of the options, as of ranks, may mean some of the layers."""
    tables = [value for value in vars(options).values() if isinstance(value, Mapping)]
    return any(set(str(pattern)) & set("0123456789\\[") for table in tables for pattern in table)


def _cut(config: PretrainedConfig, number: int) -> PretrainedConfig:
    """The configuration of a model of so many layers."""
    cut = copy.deepcopy(config)
    for values in _per_layer(cut):
        del values[number:]
    cut.num_hidden_layers = number
    return cut


def _per_layer(config: PretrainedConfig) -> Iterable[list[Any]]:
    """What the configuration lists layer by layer."""
    return [v for v in vars(config).values() if isinstance(v, list) and len(v) == config.num_hidden_layers]


def _work_at_depth(few: Counter[Operation], more: Counter[Operation], at_depth: Any) -> Counter[Operation]:
    # An operation over all tensors, as of the optimizer, is another one at each depth. Its counts, of which one is
    # negative then, add up all the same.
    return Counter({operation: at_depth(few[operation], more[operation]) for operation in few.keys() | more.keys()})
