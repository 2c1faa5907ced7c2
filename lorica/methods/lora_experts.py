"""LoRA on the expert tensors of transformers' MoE blocks: a pair for each expert, and no adapted weight in memory.

    tokens of expert e:    y = W_e x + b_e + s B_e A_e x

transformers keeps all experts of a block in 3-D parameters, `gate_up_proj` [E, 2 I, H] and `down_proj` [E, H, I]
(gpt-oss: transposed, with biases), and its experts interface lets a function compute a block from its flags:
`has_gate`, `has_bias`, `is_transposed`, `_apply_gate`. The rows, one for each token and chosen expert, are sorted by
expert; then each product is one grouped product, the base's and the two small ones of the update. That is transformers'
`grouped_mm` with the update in between, and in float32 its result bit for bit at the start; its other implementations
round otherwise.

What it gives up: the rows of the inputs, tokens x chosen experts of them, are kept for the gradient of A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.kernels.linear import linear
from lorica.methods.lora_weights import LoraWeights, nested_sites
from lorica.quant.experts import QuantizedExperts, group_sizes, grouped_product, parameter_of

if TYPE_CHECKING:
    from lorica.methods.lora import LoRA

_FLAGS = {"has_gate", "has_bias", "has_post_expert_norm", "is_transposed"}


def is_experts(module: nn.Module, parameters: Sequence[str]) -> bool:
    """Whether `module` is a block of transformers' experts interface, and `parameters` are its experts' weights."""
    return vars(module).keys() >= _FLAGS and {*parameters} <= {"gate_up_proj", "up_proj", "down_proj"}


class LoraExperts(LoraWeights):
    """LoRA on a block of experts, [tokens, hidden] to [tokens, hidden]."""

    def __init__(self, base: nn.Module, options: LoRA, name: str, parameters: Sequence[str]) -> None:
        super().__init__(base, options, nested_sites(options, name, parameters))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Shapes: hidden_states [T, H], top_k_index and top_k_weights [T, K]."""
        num_chosen = top_k_index.shape[-1]
        experts, order = top_k_index.reshape(-1).sort()
        rows = hidden_states[order // num_chosen]
        inner = self._project("gate_up_proj" if self.base.has_gate else "up_proj", rows, experts)
        inner = self.base._apply_gate(inner) if self.base.has_gate else self.base.act_fn(inner)  # type: ignore[operator]
        y = self._project("down_proj", inner, experts)
        if self.base.has_post_expert_norm:
            y = self.base.post_expert_norm(y)  # type: ignore[operator]
        y = y * top_k_weights.reshape(-1)[order, None]
        unsorted = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return y[unsorted].view(-1, num_chosen, y.shape[-1]).sum(1).to(hidden_states.dtype)

    def _project(self, name: str, rows: Tensor, experts: Tensor) -> Tensor:
        """W x + b + s B A x for rows [S, in] of `experts` [S], which ascend."""
        weight = parameter_of(self.base, name)
        ends = torch.searchsorted(experts, torch.arange(1, len(weight) + 1, device=experts.device), out_int32=True)
        if isinstance(weight, QuantizedExperts):
            y = grouped_product(rows, weight, ends, self.transposed)
        else:
            y = grouped_linear(rows, weight.mT if self.transposed else weight, ends)
        if self.base.has_bias:
            y = y.add_(self.base.get_parameter(f"{name}_bias")[experts])
        if name not in self.sites:
            return y
        # Grouped products take rows or columns that lie together; B's lie apart.
        lora_a, lora_b = (factor.to(rows.dtype).contiguous() for factor in self.factors(name))
        h = grouped_linear(F.dropout(rows, self.dropout, self.training), lora_a, ends)
        return y.add_(grouped_linear(h, lora_b, ends), alpha=self.sites[name].scale)


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """W_e x for rows [S, in] from ends[e - 1] to ends[e]: weight [E, out, in], ends [E] int32; [S, out]."""
    # The kernel takes rows of whole 16 bytes. On a CPU it is a loop too, and in 16 bits one 36 times slower.
    if rows.device.type != "cpu" and all(size * rows.itemsize % 16 == 0 for size in weight.shape[1:]):
        return F.grouped_mm(rows, weight.to(rows.dtype).mT, offs=ends)
    parts = torch.split(rows, group_sizes(ends, len(rows)))
    return torch.cat([linear(part, matrix) for part, matrix in zip(parts, weight, strict=True)])
