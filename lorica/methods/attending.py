"""Which modules of a model attend, and how wide their keys and values are: asked of the model, not of names.

The model runs on two tokens with a function in place of attention that only notes who calls it, and with what: once to
find the modules, once more to see whether they hand on the keywords by which a prefix reaches attention. Nothing is
built for it, so it works on fake tensors as on real ones.

What it gives up: two passes over the weights. And of a model that has both, only the layers that call transformers'
attention interface are found.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from lorica.errors import TargetError
from lorica.kernels import attention

_RECORDER = "lorica_prefix_recorder"
# By model. Asked anew where a module was replaced since.
_found: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[weakref.ref[nn.Module], HeadShape]]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class HeadShape:
    """Key-value heads of an attention module, and the sizes of a key and of a value."""

    num_heads: int
    key_size: int
    value_size: int

    @property
    def width(self) -> int:
        """Numbers in one token's key and value."""
        return self.num_heads * (self.key_size + self.value_size)


def attention_modules(model: nn.Module, method: str) -> dict[str, HeadShape]:
    """The attention modules of `model` by name, in its order. A model is run once for as long as these stay in it.

    Raises:
        TargetError: there is none, or the model is not such that one could be found.
    """
    found, present = _found.get(model), dict(model.named_modules())
    if found is not None and all(present.get(name) is module() for name, (module, _) in found.items()):
        return {name: shape for name, (_, shape) in found.items()}
    shapes = _ask(model, method)
    _found[model] = {name: (weakref.ref(present[name]), shape) for name, shape in shapes.items()}
    return shapes


def _ask(model: nn.Module, method: str) -> dict[str, HeadShape]:
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
        raise TargetError(f"{method}: {kind} does not let its attention be chosen, as models of transformers do.")
    if model.config.is_encoder_decoder:
        raise TargetError(f"{method} takes no encoder-decoder, as {kind} is: it attends in three ways.")
    called = {call.module: call.shape for call in _record(model, method, ())}
    shapes = {name: called[module] for name, module in model.named_modules() if module in called}
    if not shapes:
        raise TargetError(f"{method}: no layer of {kind} calls the attention function that can be chosen.")
    if not all(call.has_prefix for call in _record(model, method, list(called))):
        raise TargetError(f"{method}: the attention layers of {kind} do not hand a prefix on to that function.")
    return shapes


@dataclass(frozen=True)
class _Call:
    module: nn.Module
    shape: HeadShape
    has_prefix: bool


def _record(model: PreTrainedModel, method: str, handing: Sequence[nn.Module]) -> list[_Call]:
    """The calls of the attention function, with the modules `handing` given a prefix."""
    calls: list[_Call] = []

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        shape = HeadShape(key.shape[1], key.shape[3], value.shape[3])
        calls.append(_Call(module, shape, kwargs.get("prefix_key") is key_given and key_given is not None))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    key_given = torch.zeros(1) if handing else None
    given = {"prefix_key": key_given, "prefix_value": key_given}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, kwargs: (args, {**kwargs, **given}), with_kwargs=True)
        for m in handing
    ]
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    try:
        with _attending(model, record), torch.no_grad():
            model(input_ids=ids)
    except Exception as error:
        # An architecture fails here in whatever way it likes; the reason is shown.
        raise TargetError(
            f"{method}: {type(model).__name__} does not run with an attention function of ours "
            f"({type(error).__name__}: {str(error)[:120]})."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextmanager
def _attending(model: PreTrainedModel, function: Any) -> Iterator[None]:
    """The model in evaluation mode with `function` for its attention; both as they were at the end."""
    AttentionInterface.register(_RECORDER, function)
    AttentionMaskInterface.register(_RECORDER, attention.mask)
    before, training = model.config._attn_implementation, model.training
    try:
        model.eval().set_attn_implementation(_RECORDER)
        yield
    finally:
        model.train(training).set_attn_implementation(before)
