"""Merging into quantised weights: dequantised, changed, and quantised again.

What it gives up: much of a small change. The levels of NF4 are about a tenth of a block's largest weight apart, and an
update moves a weight by far less, so it is rounded away or made larger. Merging into the weights before they were
quantised loses nothing, which is why `merge` refuses this and only `lorica merge RUN model.quant=nf4` asks for it;
`Drift` and the divergence of the logits say what it cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lorica.methods.attach import adapters, over, with_merged
from lorica.methods.method import Adapter
from lorica.quant.experts import empty_experts, own_experts, put_experts
from lorica.quant.linear import QuantizedLinear, empty_like
from lorica.quant.weight import QuantizedWeight

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
        plain, changes = _requantized(adapter)
        merged.append(plain)
        for before, exact, after in changes:
            distances = (exact, exact - before.dense(), after.dense() - exact)
            sums += torch.stack([d.double().abs().sum().cpu() for d in distances])
            count += exact.numel()
    weight, change, error = (sums / max(1, count)).tolist()
    return with_merged(model, merged), Drift(weight, change, error)


def _requantized(adapter: Adapter) -> tuple[nn.Module, list[tuple[QuantizedWeight, Tensor, QuantizedWeight]]]:
    """The merged module, and each quantised weight of it: as it was, with the change, and quantised again."""
    base = adapter.base
    if isinstance(base, QuantizedLinear):
        plain = over(adapter, base.plain()).merged()
        layer = empty_like(plain, base.scheme, base.nested_absmax is not None)
        exact: Tensor = plain.weight.detach()  # type: ignore[operator]
        return layer, [(base, exact, _filled(layer, exact))]
    merged = adapter.merged()
    changes: list[tuple[QuantizedWeight, Tensor, QuantizedWeight]] = []
    for name, before in own_experts(base).items():
        # Those that the adapter has not changed are the base's.
        if name in merged._parameters:
            exact = merged.get_parameter(name).detach()
            after = empty_experts(exact, before.scheme, before.nested_absmax is not None)
            put_experts(merged, name, after)
            changes.append((before, exact, _filled(after, exact)))
    return merged, changes


def _filled(weight: QuantizedWeight, exact: Tensor) -> QuantizedWeight:
    weight.take({"weight": exact})
    # It is no weight of the original.
    weight.origin = None
    return weight
