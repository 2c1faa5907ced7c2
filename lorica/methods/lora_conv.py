"""LoRA on convolutions: A is the base's convolution without its groups, B is pointwise and has them.

    y = W * x + b + s B * (A * x),    A [rank, in, k...] sliding as W does,  B [out, rank / groups, 1...]

These are PEFT's shapes; loralib's differ. Without groups B A is a kernel like W, and merging is exact. With groups each
group of B reads its share of the rank, but A reads the channels of all groups, which no grouped kernel does.

What it gives up: PEFT's branch ignores the base's dilation and padding mode: with these a folder of ours is right here
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from lorica.errors import NotMergeableError, TargetError
from lorica.methods.lora_kinds import LoraAdapter

if TYPE_CHECKING:
    from lorica.methods.lora import LoRA

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoraConv(LoraAdapter):
    """LoRA on nn.Conv1d, nn.Conv2d and nn.Conv3d: `lora_a` [rank, in, k...], `lora_b` [out, rank / groups, 1...]."""

    base: Convolution

    def __init__(self, base: Convolution, options: LoRA, rank: int, scale: float) -> None:
        super().__init__(base, options, scale, *conv_pair_shapes(base, rank))
        self._initialise(base.weight, rank)

    def forward(self, x: Tensor) -> Tensor:
        lora_a, lora_b = self.pair()
        y: Tensor = self.base(x)
        low = conv_low_rank(self.base, F.dropout(x, self.dropout, self.training), lora_a, lora_b)
        added = self.added_bias()
        if added is not None:
            y = y.add_(added.to(y.dtype).view(-1, *(1,) * len(self.base.kernel_size)))
        return y.add_(low, alpha=self.scale)

    def restart(self) -> Sequence[nn.Parameter]:
        # Where there are groups the order of a pair's channels matters, and pairs cannot be stacked.
        return super().restart() if self.base.groups == 1 else ()

    def merged(self) -> nn.Module:
        if self.base.groups > 1:
            raise NotMergeableError(grouped_reason(self.base))
        return self._with_weight(self.delta_weight().view_as(self.weight))


def conv_pair_shapes(base: Convolution, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B on a convolution."""
    pointwise = (1,) * len(base.kernel_size)
    return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank // base.groups, *pointwise)


def conv_low_rank(base: Convolution, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """B (A x), where A slides over x as `base` does."""
    convolve = _CONVOLVE[len(base.kernel_size)]
    padding: Any = base.padding
    if base.padding_mode != "zeros":
        x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
    h = convolve(x, lora_a.to(x.dtype), None, base.stride, padding, base.dilation)
    return convolve(h, lora_b.to(x.dtype), groups=base.groups)


def check_groups(module: Convolution, name: str, rank: int) -> None:
    """Refuse, with a TargetError, a rank that a convolution's groups cannot share."""
    if rank % module.groups:
        raise TargetError(f"{name} has {module.groups} groups, which must divide the rank; it is {rank}.")


def grouped_reason(base: Convolution) -> str:
    """Why a convolution with groups cannot be merged."""
    return f"A convolution of {base.groups} groups cannot be merged: its lora_a reads all groups' channels."
