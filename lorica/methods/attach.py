"""Putting adapters on a model and taking them off: `adapt`, `adapters`, `merge`, `detach`.

`adapt` changes the model in place: each target module is replaced by an adapter that holds it as `base`, and everything
else is frozen. The base's tensors are never written, so `detach` gives the model back bit for bit, and `merge`
returns a NEW model that shares every tensor that no adapter touched: its extra memory is the merged weights alone.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorica.errors import ConfigError, TargetError
from lorica.methods.method import Adapter, MethodOptions

Model = TypeVar("Model", bound=nn.Module)

ALL_LINEAR = "all-linear"


def adapt(model: Model, options: MethodOptions) -> Model:
    """Freeze `model`, wrap its target modules in place, and return it.

    Raises:
        TargetError: a pattern of `options.targets` matches no module that the method can wrap; nothing is changed then.
        ConfigError: the model already carries adapters.
    """
    if adapters(model):
        raise ConfigError(
            f"The model already carries {len(adapters(model))} adapters. lorica.detach(model) takes them off, "
            "lorica.merge(model) folds them into a new model."
        )
    names = resolve_targets(model, options)
    wrapped = options.wrap_all(model, names)
    model.requires_grad_(False)
    for name, adapter in wrapped.items():
        _replace(model, name, adapter)
    return model


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """Every adapter of the model by the name of the module that it wraps."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}


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


def detach(model: Model) -> Model:
    """Take every adapter off, in place: the base again, bit for bit. Adapted weights are lost unless they were
    saved.
    """
    for name, adapter in adapters(model).items():
        _replace(model, name, adapter.base)
    return model


def merge(model: Model) -> Model:
    """A new model of plain modules that computes what `model` computes; `model` stays adapted.

    Tensors that no adapter touches are shared between the two.

    Raises:
        NotMergeableError: one of the adapters is not a fixed change of weights.
    """
    found = list(adapters(model).values())
    merged = [adapter.merged() for adapter in found]
    _tie_again(found, merged)
    memo: dict[int, object] = {id(a): plain for a, plain in zip(found, merged, strict=True)}
    memo |= {id(t): t for t in (*model.parameters(), *model.buffers())}
    plain = copy.deepcopy(model, memo)
    _untie(plain)
    return plain


def resolve_targets(model: nn.Module, options: MethodOptions) -> list[str]:
    """The names of the modules that `options.targets` selects, in the model's order.

    Raises:
        TargetError: for every pattern that is no regular expression or matches nothing that can be wrapped.
    """
    # The model itself, whose name is empty, cannot be replaced in place.
    candidates = {name: m for name, m in model.named_modules() if name and options.takes(m)}
    for name in _read_but_not_called(model):
        candidates.pop(name, None)
    targets = options.patterns()
    patterns = (targets,) if isinstance(targets, str) else targets
    if patterns == (ALL_LINEAR,):
        head = _output_head(model)
        names = [n for n, m in candidates.items() if isinstance(m, options.linear_kinds) and m is not head]
        if not names:
            raise TargetError(
                f"targets all-linear: {type(model).__name__} holds no linear layer that an adapter can wrap, "
                "its output head left out."
            )
        return names
    matches = {pattern: _matching(pattern, candidates) for pattern in patterns}
    faults = [_no_match(p, model, candidates) for p, found in matches.items() if not found]
    if faults and targets != options.targets:
        tails = sorted({name.rsplit(".", 1)[-1] for name in candidates})[:12]
        raise TargetError(
            f"targets: {type(model).__name__} has nothing of what {options.targets!r} stands for. "
            f"Names that can be given: {', '.join(tails) or 'none'}."
        )
    if faults or not patterns:
        raise TargetError("\n".join(faults) or "targets: the list is empty; name at least one module, or all-linear.")
    chosen = {name for found in matches.values() for name in found}
    return [name for name in candidates if name in chosen]


def _matching(pattern: str, names: Sequence[str] | dict[str, nn.Module]) -> list[str]:
    try:
        expression = re.compile(rf"(.*\.)?({pattern})")
    except re.error as error:
        raise TargetError(f"targets: {pattern!r} is not a regular expression: {error}.") from None
    return [name for name in names if expression.fullmatch(name)]


def _no_match(pattern: str, model: nn.Module, candidates: dict[str, nn.Module]) -> str:
    everything = dict(model.named_modules())
    unsupported = _matching(pattern, [n for n in everything if n])
    if unsupported:
        kind = type(everything[unsupported[0]]).__name__
        return f"targets: {pattern!r} matches {unsupported[0]}, but a {kind} there cannot be wrapped by this method."
    tails = sorted({name.rsplit(".", 1)[-1] for name in candidates})
    near = difflib.get_close_matches(pattern.rsplit(".", 1)[-1], tails, n=3, cutoff=0.5) or tails[:12]
    return f"targets: {pattern!r} matches no module of {type(model).__name__}. Nearest names: {', '.join(near)}."


def _read_but_not_called(model: nn.Module) -> list[str]:
    """Layers whose weights torch's own modules read without calling them: an adapter there would never run.

    nn.TransformerEncoderLayer does so in evaluation only, on its fast path.
    """
    parts = ((nn.MultiheadAttention, ("out_proj",)), (nn.TransformerEncoderLayer, ("linear1", "linear2")))
    return [
        f"{name}.{child}".removeprefix(".")
        for name, module in model.named_modules()
        for kind, children in parts
        if isinstance(module, kind)
        for child in children
    ]


def _output_head(model: nn.Module) -> nn.Module | None:
    from transformers import PreTrainedModel

    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


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
