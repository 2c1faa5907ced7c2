"""Putting adapters on a model and taking them off: `adapt`, `adapters`, `merge`, `detach`.

`adapt` changes the model in place: each target module is replaced by an adapter that holds it as `base`, and everything
else is frozen. The base's tensors are never written, so `detach` gives the model back bit for bit, and `merge`
returns a NEW model that shares every tensor that no adapter touched: its extra memory is the merged weights alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorica.errors import ConfigError, LoricaError, NotMergeableError
from lorica.methods.beside import Beside, resolve_beside
from lorica.methods.method import Adapter, MethodOptions, StartBatches, StartLoss
from lorica.methods.selection import resolve_targets
from lorica.quant.linear import QuantizedLinear, format_of, layers, stored_layer
from lorica.quant.loading import dequantize

Model = TypeVar("Model", bound=nn.Module)


def adapt(
    model: Model, options: MethodOptions, loss_fn: StartLoss | None = None, batches: StartBatches | None = None
) -> Model:
    """Freeze `model`, wrap its target modules in place, and return it.

    Args:
        loss_fn: (model, inputs, targets) -> a scalar loss. It and `batches` are for options that start from data, such
            as `LoRA(init="eva")`.
        batches: (inputs, targets) each, `inputs` the keywords for the model's forward; (inputs, targets, component) for
            `HydraLoRA(init="components")`, rows of one component alone.

    Raises:
        TargetError: a pattern of `options.targets` matches no module that the method can wrap, or what should be
            trained beside the adapters cannot be; nothing is changed then.
        ConfigError: the model already carries adapters, or the data that the options start from is missing.
    """
    if options.num_start_batches and (loss_fn is None or not batches):
        raise ConfigError(
            f"{type(options).__name__} starts from data, which must be given: lorica.adapt(model, options, loss_fn, "
            "batches), or train with lorica.train, which takes them from the run's data."
        )
    attach(model, options)
    if loss_fn is not None and batches:
        try:
            options.start(model, loss_fn, batches)
        except LoricaError:
            detach(model)
            raise
    return model


def attach(model: Model, options: MethodOptions, beside: Beside | None = None) -> Model:
    """As `adapt`, without the start from data: for a run that is resumed, or rehearsed.

    Args:
        beside: what is trained beside the method's own adapters, where `options` do not say it all.
    """
    if adapters(model):
        raise ConfigError(
            f"The model already carries {len(adapters(model))} adapters. lorica.detach(model) takes them off, "
            "lorica.merge(model) folds them into a new model."
        )
    beside = resolve_beside(model, options) if beside is None else beside
    own = options.wrap_all(model, resolve_targets(model, options, beside.names))
    others = beside.wrap()
    model.requires_grad_(False)
    for adapter in others.values():
        adapter.is_beside, adapter.options = True, options
    for name, adapter in {**own, **others}.items():
        _replace(model, name, adapter)
    return model


def with_whole(options: MethodOptions, names: Sequence[str]) -> MethodOptions:
    """The options with which the modules called `names`, a new head, are trained whole too."""
    named = tuple(re.escape(name) for name in names)
    return replace(options, modules_to_save=(*options.modules_to_save, *named)) if named else options


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapter of the model by the name of the module that it wraps."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


def in_front(model: nn.Module) -> tuple[range, int]:
    """What the method of an adapted model wants in front of every sample: ids without a label, and the position of the
    first of all. A plain model wants nothing.
    """
    options = next((adapter.options for adapter in adapters(model).values()), None)
    if options is None or not options.num_virtual_ids:
        return range(0), 0 if options is None else options.position_offset
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return options.in_front(embedding.weight.shape[0])  # type: ignore[index, arg-type]


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that a training step would change, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """What a run changes, by name: every trainable parameter, and the buffers that adapters hold beside theirs."""
    buffers = {
        f"{name}.{key}": buffer
        for name, adapter in adapters(model).items()
        for key, buffer in adapter.named_buffers()
        if not key.startswith("base.")
    }
    return {**trainable_parameters(model), **buffers}


def lr_factors(model: nn.Module) -> dict[str, float]:
    """The factors of the learning rate that are not 1, by the parameters' names."""
    factors = {
        f"{name}.{key}": adapter.options.lr_factor(adapter, key)
        for name, adapter in adapters(model).items()
        for key, parameter in adapter.named_parameters()
        if parameter.requires_grad
    }
    return {name: factor for name, factor in factors.items() if factor != 1.0}


def detach(model: Model) -> Model:
    """Take every adapter off, in place: the base again, bit for bit. Adapted weights are lost unless they were
    saved.
    """
    for name, adapter in adapters(model).items():
        _replace(model, name, adapter.base)
        adapter.taken_off(model)
    return model


def merge(model: Model) -> Model:
    """A new model of plain modules that computes what `model` computes; `model` stays adapted.

    Tensors that no adapter touches are shared between the two. Adapters that mend what quantising took away are merged
    into what their base is dequantised to, since no other base is theirs, and nothing is quantised in the new model.

    Raises:
        NotMergeableError: one of the adapters is not a fixed change of weights, or stands on quantised ones.
    """
    if any(adapter.mends for adapter in adapters(model).values()):
        return dequantize(with_merged(model, [_merged_dense(adapter) for adapter in adapters(model).values()]))
    _refuse_quantised(model)
    return with_merged(model, [adapter.merged() for adapter in adapters(model).values()])


def _merged_dense(adapter: Adapter) -> nn.Module:
    base = adapter.base
    if not isinstance(base, QuantizedLinear):
        return adapter.merged()
    return stored_layer(over(adapter, base.plain()).merged(), base.transposed)


def over(adapter: Adapter, base: nn.Module) -> Adapter:
    """The same adapter around another base."""
    other = copy.copy(adapter)
    other._modules = {**adapter._modules, "base": base}
    return other


def with_merged(model: Model, merged: Sequence[nn.Module]) -> Model:
    """A new model with the modules `merged` in the places of its adapters, which are in the same order."""
    found = list(adapters(model).values())
    _tie_again(found, merged)
    memo: dict[int, object] = {id(a): plain for a, plain in zip(found, merged, strict=True)}
    memo |= {id(t): t for t in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, memo)
    _untie(plain)
    return plain


def _refuse_quantised(model: nn.Module) -> None:
    name = next((n for n, a in adapters(model).items() for _ in layers(a)), None)
    if name is not None:
        raise NotMergeableError(
            f"{name} is quantised ({format_of(model)}), and rounding what the adapter changes to its levels would lose "
            "much of it. The adapter fits the base that was quantised, too: load that without quant "
            "(lorica.load_model(base), or model.quant=null), then the adapter, and merge there; or use it unmerged. "
            "`lorica merge RUN model.quant=nf4` rounds all the same, and says what it lost."
        )


def _tie_again(found: Sequence[Adapter], merged: Sequence[nn.Module]) -> None:
    """Make parameters that were one in the base one again where merging gave them the same values."""
    first: dict[int, nn.Parameter] = {}
    for adapter, plain in zip(found, merged, strict=True):
        for name, parameter in adapter.base.named_parameters(recurse=False):
            mine = plain._parameters.get(name)
            if mine is not None and mine is not parameter:
                same = first.setdefault(id(parameter), mine)
                if same is not mine and torch.equal(same, mine):
                    plain._parameters[name] = same


def _untie(model: nn.Module) -> None:
    """Say in the config that input and output embeddings differ when merging changed one of a tied pair.

    Otherwise transformers ties them again on loading, and the merged model is silently another one.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not getattr(model.config, "tie_word_embeddings", False):
        return
    head = model.get_output_embeddings()
    if head is not None and head.weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    module.train(model.training)
    setattr(model.get_submodule(parent), child, module)
