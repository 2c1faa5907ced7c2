"""IA3: learned factors on the activations that the model computes anyway (Liu et al. 2022, arXiv 2205.05638).

    keys and values:        y = l * (W x + b),    l [out]
    feed-forward layers:    y = W (l * x) + b,    l [in]    (the down projection's input is the inner activation)

A convolution has a factor for each channel. All factors start at one. They are multiplied in float32 and the product is
rounded to the input's dtype, because bfloat16 cannot hold 1.001. Llama-2-7B trains 614,400 of them, and merging them
into W and b is exact.

What it gives up: capacity. It can strengthen or silence what a layer computes, not compute anything new.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorica.methods.method import Adapter, MethodOptions, Targets, unsupported_kind

# By the names that transformers' models give them. A fused projection is scaled whole, its queries too.
_KEYS_AND_VALUES = (
    r"[kv]_proj|key|value|(key|value)_proj|[kv]_lin|\w*Attention\.[kv]|query_key_value|qkv_proj|c_attn|Wqkv"
)
_FEEDFORWARD = (
    r"down_proj|fc2|fc_out|dense_4h_to_h|mlp\.(c_proj|Wo)|ffn\.lin2|ffn_output|DenseReluDense\.wo|"
    r"layer\.\d+\.output\.dense"
)


@dataclass(frozen=True)
class IA3(MethodOptions):
    """Options of IA3.

    Attributes:
        targets: modules to scale; `auto` means the key, value and down projections of the usual architectures.
        feedforward: those of them that match, as in `targets`, scale their input instead of their output; `auto` means
            the down projections.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    other_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, nn.Conv3d)
    peft_type: ClassVar[str | None] = "IA3"

    targets: Annotated[
        Targets, Field(description="modules to scale: auto (keys, values, down projections), all-linear, or patterns")
    ] = "auto"
    feedforward: Annotated[
        Targets,
        Field(description="which of them scale their input, not their output: auto (down projections), or patterns"),
    ] = "auto"

    def patterns(self) -> str | tuple[str, ...]:
        return f"{_KEYS_AND_VALUES}|{_FEEDFORWARD}" if self.targets == "auto" else self.targets

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        scales_input = re.fullmatch(self._feedforward(), name) is not None
        if isinstance(module, nn.Linear | Conv1D):
            return IA3Linear(module, self, scales_input)
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            return IA3Conv(module, self, scales_input)
        raise unsupported_kind(module, name, "ia3")

    def _feedforward(self) -> str:
        """One regular expression for the whole name."""
        given = _FEEDFORWARD if self.feedforward == "auto" else self.feedforward
        patterns = (given,) if isinstance(given, str) else given
        return rf"(.*\.)?({'|'.join(patterns)})"

    def to_peft(self, found: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        return {
            "feedforward_modules": self._feedforward(),
            "fan_in_fan_out": any(isinstance(a.base, Conv1D) for a in found.values()),
            "init_ia3_weights": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], names: Sequence[str]) -> IA3:
        # A string is an expression for PEFT, a list holds ends of names. (?!) matches nothing.
        feedforward = config.get("feedforward_modules") or "(?!)"
        if not isinstance(feedforward, str):
            feedforward = tuple(f".*{re.escape(end)}" for end in feedforward)
        return cls(targets=tuple(re.escape(name) for name in names), feedforward=feedforward)


class IA3Adapter(Adapter, ABC):
    """A layer with factors `ia3_l` of its inputs or outputs, float32; what all kinds share."""

    base: nn.Linear | Conv1D | nn.Conv2d | nn.Conv3d
    leaves_base = True

    def __init__(self, base: nn.Module, options: IA3, scales_input: bool, shape: tuple[int, ...]) -> None:
        super().__init__(base, options)
        self.scales_input = scales_input
        self.ia3_l = nn.Parameter(torch.ones(shape, device=self.weight.device, dtype=torch.float32))

    @abstractmethod
    def _over_activations(self) -> Tensor:
        """The factors in a shape that spreads over what they scale."""

    @abstractmethod
    def _over_weight(self) -> Tensor:
        """The factors in a shape that spreads over the weight."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(self._scaled(x)) if self.scales_input else self._scaled(self.base(x))
        return y

    def _scaled(self, x: Tensor) -> Tensor:
        return (x * self._over_activations()).to(x.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        plain = copy.deepcopy(self.base)
        plain.weight.mul_(self._over_weight())
        if plain.bias is not None and not self.scales_input:
            plain.bias.mul_(self.ia3_l.flatten())
        return plain

    def extra_repr(self) -> str:
        return f"scales_input={self.scales_input}"


class IA3Linear(IA3Adapter):
    """A linear layer with a factor for each output, `ia3_l` [out, 1], or for each input, [1, in]: PEFT's shapes."""

    def __init__(self, base: nn.Linear | Conv1D, options: IA3, scales_input: bool) -> None:
        self.transposed = isinstance(base, Conv1D)
        out_size, in_size = reversed(base.weight.shape) if self.transposed else base.weight.shape
        super().__init__(base, options, scales_input, (1, in_size) if scales_input else (out_size, 1))

    def _over_activations(self) -> Tensor:
        return self.ia3_l.flatten()

    def _over_weight(self) -> Tensor:
        return self.ia3_l.t() if self.transposed else self.ia3_l


class IA3Conv(IA3Adapter):
    """nn.Conv2d and nn.Conv3d with a factor for each channel that goes out or comes in: `ia3_l` [1, channels, 1...]."""

    base: nn.Conv2d | nn.Conv3d

    def __init__(self, base: nn.Conv2d | nn.Conv3d, options: IA3, scales_input: bool) -> None:
        self.taps = (1,) * len(base.kernel_size)
        num_channels = base.in_channels if scales_input else base.out_channels
        super().__init__(base, options, scales_input, (1, num_channels, *self.taps))

    def _over_activations(self) -> Tensor:
        return self.ia3_l[0]

    def _over_weight(self) -> Tensor:
        if not self.scales_input:
            return self.ia3_l.view(-1, 1, *self.taps)
        # The kernels of a group read the channels of that group alone.
        groups = self.base.groups
        return self.ia3_l.view(groups, -1, *self.taps).repeat_interleave(self.base.out_channels // groups, 0)


OPTIONS = IA3
