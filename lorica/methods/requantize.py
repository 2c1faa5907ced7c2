"""Merging into quantised weights: dequantised, changed, and quantised again.

What it gives up: much of a small change. The levels of NF4 are about a tenth of a block's largest weight apart, and an
update moves a weight by far less, so it is rounded away or made larger. Merging into the weights before they were
quantised loses nothing, which is why `merge` refuses this and only `lorica merge RUN model.quant=nf4` asks for it;
`Drift` and the divergence of the logits say what it cost.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorica.methods.attach import adapters, with_merged
from lorica.methods.method import Adapter
from lorica.quant.linear import QuantizedLinear, empty_like

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Drift:
    """Mean absolute values over all elements of the quantised weights that were merged into.

    weight: of the merged weight. change: of what the adapters add. error: of what quantising it again adds.
    """

    weight: float
    change: float
    error: float


@torch.no_grad()
def merge_requantized(model: Model) -> tuple[Model, Drift]:
    """As `merge`, with quantised weights quantised again in their own scheme; `model` stays adapted.

    Raises:
        NotMergeableError: one of the adapters is not a fixed change of weights.
    """
    merged, sums, count = [], torch.zeros(3, dtype=torch.float64), 0
    for adapter in adapters(model).values():
        if not isinstance(adapter.base, QuantizedLinear):
            merged.append(adapter.merged())
            continue
        base = adapter.base
        exact = _over(adapter, base.plain()).merged()
        made = empty_like(exact, base.scheme, base.nested_absmax is not None)
        made.take({"weight": _weight(exact)})
        made.origin = None
        merged.append(made)
        distances = (_weight(exact), _weight(exact) - base.weight, made.weight - _weight(exact))
        sums += torch.stack([d.double().abs().sum().cpu() for d in distances])
        count += base.in_features * base.out_features
    weight, change, error = (sums / max(1, count)).tolist()
    return with_merged(model, merged), Drift(weight, change, error)


def _over(adapter: Adapter, base: nn.Module) -> Adapter:
    """The same adapter around another base."""
    other = copy.copy(adapter)
    other._modules = {**adapter._modules, "base": base}
    return other


def _weight(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.detach()
