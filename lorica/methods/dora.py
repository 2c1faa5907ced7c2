"""DoRA: LoRA turns each row of the weight, a trained vector sets its length (Liu et al. 2024, arXiv 2402.09353).

    V = W + s B A            A [rank, in],  B [out, rank],  s = alpha / rank   (rsLoRA: alpha / sqrt(rank))
    y = g * (V x) + b        g = m / |V|,   m [out] starting at |W|,   |V| [out] the norms of the rows

|V| is a constant for the gradients (section 4.3). It is found without ever forming V, from A W^T [rank, out]:

    |V|^2 = |W|^2 + 2 s B . (W A^T) + s^2 B . (B A A^T)        summed over each row

so no matrix of W's size is made. The output is the base's plus (g - 1) times W x plus LoRA's product with g * B: at the
start g is one and B zero, and the base's output is kept bit for bit. A convolution's rows are its output channels, an
embedding's its dimensions. With groups, B A is no kernel of the convolution (see `lora_kinds.py`); |V| is that of PEFT
there, which reads the product's numbers in the kernel's shape.

What it gives up: one more product with the weight at each forward pass, whose cost is that of `rank` more tokens, and
the memory of W x, [tokens, out], which the gradient of m needs.
Dropout acts on the low-rank branch only; the paper's code and PEFT drop x in (g - 1) W x as well, which takes a second
product with W at the full size.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.errors import AdapterError, NotMergeableError
from lorica.kernels.linear import linear
from lorica.kernels.low_rank import add_low_rank
from lorica.methods import inits
from lorica.methods.lora import check_peft_fields
from lorica.methods.lora_conv import Convolution, check_groups, conv_low_rank, conv_pair_shapes, grouped_reason
from lorica.methods.lora_kinds import embedding_scale, looked_up, with_parameters
from lorica.methods.low_rank import LowRankOptions, options_from_peft
from lorica.methods.method import Adapter, unsupported_kind


@dataclass(frozen=True)
class DoRA(LowRankOptions):
    """Options of DoRA: those of every low-rank method."""

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    other_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    peft_type: ClassVar[str | None] = "LORA"

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        rank, scale = self.rank_and_scale(name)
        if isinstance(module, nn.Linear | Conv1D):
            return DoraLinear(module, self, rank, scale)
        if isinstance(module, nn.Embedding):
            return DoraEmbedding(module, self, rank, scale)
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            check_groups(module, name, rank)
            return DoraConv(module, self, rank, scale)
        raise unsupported_kind(module, name, "dora")

    @classmethod
    def is_peft(cls, config: Mapping[str, Any]) -> bool:
        # PEFT has it as an option of LoRA.
        return super().is_peft(config) and bool(config.get("use_dora"))

    def to_peft(self, found: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        return {
            **self.peft_scales({name: (a.rank, a.scale) for name, a in found.items()}),
            "init_lora_weights": True,
            "fan_in_fan_out": any(isinstance(a.base, Conv1D) for a in found.values()),
            "bias": "none",
            "lora_bias": False,
            "use_dora": True,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], names: Sequence[str]) -> DoRA:
        check_peft_fields({**config, "use_dora": False})
        if used := [key for key in ("lora_bias", "target_parameters") if config.get(key)]:
            raise AdapterError(f"{' and '.join(used)} together with use_dora is not supported.")
        return cls(**options_from_peft(config), targets=tuple(re.escape(name) for name in names))


class DoraAdapter(Adapter, ABC):
    """A layer with DoRA; what all kinds share.

    `lora_a` [rank, in...], `lora_b` [out, rank...] and `magnitude`, of as many numbers as there are rows, are float32.
    """

    def __init__(
        self, base: nn.Module, options: DoRA, scale: float, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
    ) -> None:
        super().__init__(base, options)
        self.rank, self.scale, self.dropout = a_shape[0], scale, options.dropout
        factory: dict[str, Any] = {"device": self.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.empty(a_shape, **factory))
        self.lora_b = nn.Parameter(torch.empty(b_shape, **factory))
        start = inits.embedding if isinstance(base, nn.Embedding) else inits.kaiming
        start(self.lora_a, self.lora_b)
        self.magnitude = nn.Parameter(self._as_magnitude(self.row_norms()))

    @abstractmethod
    def _rows(self) -> Tensor:
        """W as [out, in], a kernel's taps laid out flat."""

    def _as_magnitude(self, norms: Tensor) -> Tensor:
        """[out] in the shape that PEFT has on disk."""
        return norms

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """|W + s B A| of each row in float32, [out]."""
        w, a, b = self._rows(), self.lora_a.flatten(1), self.lora_b.flatten(1)
        if b.shape[1] == len(a):
            squares: Tensor = torch.linalg.vector_norm(w, dim=1, dtype=torch.float32).square()
            cross = linear(a.to(w.dtype), w).t().float() * (2 * self.scale) + b @ (a @ a.t()) * self.scale**2
            squares = squares + (b * cross).sum(1)
        else:
            squares = (w + self.scale * (b.reshape(-1, len(a)) @ a).view_as(w)).square().sum(1)
        # A row of zeros has no direction: the smallest number keeps it a row of zeros.
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def gain(self) -> Tensor:
        """m / |V|, [out]."""
        return self.magnitude.flatten() / self.row_norms()

    def merged_rows(self) -> Tensor:
        """The merged weight as [out, in]."""
        delta = self.scale * (self.lora_b.flatten(1) @ self.lora_a.flatten(1))
        return self.gain()[:, None] * (self._rows() + delta)

    def saved_tensors(self) -> dict[str, Tensor]:
        return {
            "lora_A.weight": self.lora_a,
            "lora_B.weight": self.lora_b,
            "lora_magnitude_vector": self.magnitude,
        }

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


def _times_gain(y: Tensor, bias: Tensor | None, gain: Tensor) -> Tensor:
    """y + (g - 1) (y - b): exactly y where g is one. `gain` and `bias` are of a shape that spreads over y."""
    return torch.addcmul(y, y if bias is None else y - bias, (gain - 1).to(y.dtype))


class DoraLinear(DoraAdapter):
    """DoRA on nn.Linear, and on transformers' Conv1D, whose weight is stored transposed; `magnitude` is [out]."""

    base: nn.Linear | Conv1D

    def __init__(self, base: nn.Linear | Conv1D, options: DoRA, rank: int, scale: float) -> None:
        self.transposed = isinstance(base, Conv1D)
        out_size, in_size = reversed(base.weight.shape) if self.transposed else base.weight.shape
        super().__init__(base, options, scale, (rank, in_size), (out_size, rank))

    def _rows(self) -> Tensor:
        return self.weight.t() if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        rows, gain = x.reshape(-1, x.shape[-1]), self.gain()
        y = _times_gain(self.base(rows), self.base.bias, gain)
        h = linear(F.dropout(rows, self.dropout, self.training), self.lora_a)
        return add_low_rank(y, h, gain[:, None] * self.lora_b, self.scale).view(*x.shape[:-1], y.shape[-1])

    @torch.no_grad()
    def merged(self) -> nn.Module:
        weight = self.merged_rows().to(self.weight.dtype)
        return with_parameters(self.base, {"weight": weight.t().contiguous() if self.transposed else weight})


class DoraConv(DoraAdapter):
    """DoRA on nn.Conv1d, nn.Conv2d and nn.Conv3d; `magnitude` is [1, out, 1...], the pair as LoRA has it."""

    base: Convolution

    def __init__(self, base: Convolution, options: DoRA, rank: int, scale: float) -> None:
        super().__init__(base, options, scale, *conv_pair_shapes(base, rank))

    def _rows(self) -> Tensor:
        return self.weight.flatten(1)

    def _as_magnitude(self, norms: Tensor) -> Tensor:
        return norms.view(1, -1, *(1,) * len(self.base.kernel_size))

    def forward(self, x: Tensor) -> Tensor:
        over_y = (-1, *(1,) * len(self.base.kernel_size))
        gain, bias = self.gain().view(over_y), None if self.base.bias is None else self.base.bias.view(over_y)
        y = _times_gain(self.base(x), bias, gain)
        low = conv_low_rank(
            self.base, F.dropout(x, self.dropout, self.training), self.lora_a, gain[:, None] * self.lora_b
        )
        return y.add_(low, alpha=self.scale)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        if self.base.groups > 1:
            raise NotMergeableError(grouped_reason(self.base))
        return with_parameters(self.base, {"weight": self.merged_rows().view_as(self.weight).to(self.weight.dtype)})


class DoraEmbedding(DoraAdapter):
    """DoRA on nn.Embedding, a row being a dimension; `magnitude` is [dim], the pair as LoRA has it."""

    base: nn.Embedding

    def __init__(self, base: nn.Embedding, options: DoRA, rank: int, scale: float) -> None:
        super().__init__(base, options, scale, (rank, base.num_embeddings), (base.embedding_dim, rank))
        self.output_scale = embedding_scale(base)

    def _rows(self) -> Tensor:
        return self.weight.t()

    def forward(self, ids: Tensor) -> Tensor:
        gain = self.gain()
        y = _times_gain(self.base(ids.flatten()), None, gain)
        h = looked_up(self.base, ids, self.lora_a).to(y.dtype)
        low = add_low_rank(y, h, gain[:, None] * self.lora_b, self.scale * self.output_scale)
        return low.view(*ids.shape, -1)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        return with_parameters(self.base, {"weight": self.merged_rows().t().contiguous().to(self.weight.dtype)})

    def saved_tensors(self) -> dict[str, Tensor]:
        return {
            "lora_embedding_A": self.lora_a,
            "lora_embedding_B": self.lora_b,
            "lora_magnitude_vector": self.magnitude,
        }


OPTIONS = DoRA
