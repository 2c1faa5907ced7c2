"""Prefix tuning: learned keys and values in every layer, written by a network (Li and Liang 2021, arXiv 2101.00190).

    [P_K, P_V] of layer l = tanh(E W^T + b) W_l^T + b_l,    E [n, d], W [hidden, d], W_l [2 d, hidden]

d is the width of a token's keys. E, W and b are shared by all layers, and the W_l are the parts of the paper's one last
layer, so a step moves all prefixes together; trained directly they are hard to move (`ptuning_v2.py` does so, and says
how the model sees them). The network is dropped once it is trained: what is saved are the keys and values, read back
as P-tuning v2. A checkpoint of a run keeps the network, so a resumed run is the same run.

What it gives up: what P-tuning v2 gives up; and each layer computes the shared part of the network anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from lorica.methods.attending import HeadShape
from lorica.methods.method import Rank
from lorica.methods.ptuning_v2 import PrefixedAttention, PrefixOptions


@dataclass(frozen=True)
class PrefixTuning(PrefixOptions):
    """Options of prefix tuning.

    Attributes:
        encoder_hidden_size: the network's inner width; None: that of the keys of a token.
    """

    encoder_hidden_size: Annotated[Rank | None, Field(description="the network's inner width; null: that of a key")] = (
        None
    )

    def wrap_shapes(self, modules: Mapping[str, tuple[nn.Module, HeadShape]]) -> Mapping[str, PrefixedAttention]:
        module, shape = next(iter(modules.values()))
        size = shape.num_heads * shape.key_size
        factory: dict[str, Any] = {"device": next(module.parameters()).device, "dtype": torch.float32}
        trunk = nn.Sequential(
            nn.Embedding(self.num_virtual_tokens, size, **factory),
            nn.Linear(size, self.encoder_hidden_size or size, **factory),
            nn.Tanh(),
        )
        return {name: EncodedPrefix(module, self, shape, trunk) for name, (module, shape) in modules.items()}


class EncodedPrefix(PrefixedAttention):
    """Prefix tuning's: `trunk`, one for all layers, and `head` are trained."""

    def __init__(self, base: nn.Module, options: PrefixTuning, shape: HeadShape, trunk: nn.Sequential) -> None:
        super().__init__(base, options, shape)
        self.trunk = trunk
        weight: Tensor = trunk[1].weight  # type: ignore[assignment]
        self.head = nn.Linear(weight.shape[0], shape.width, device=weight.device, dtype=torch.float32)

    def prefix(self) -> Tensor:
        ids = torch.arange(self.options.num_virtual_tokens, device=self.head.weight.device)
        prefix: Tensor = self.head(self.trunk(ids))
        return prefix


OPTIONS = PrefixTuning
