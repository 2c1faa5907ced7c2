"""DoRA: LoRA turns each row of the weight, a trained vector sets its length (Liu et al. 2024, arXiv 2402.09353).

    V = W + s B A            A [rank, in],  B [out, rank],  s = alpha / rank   (rsLoRA: alpha / sqrt(rank))
    y = g * (V x) + b        g = m / |V|,   m [out] starting at |W|,   |V| [out] the norms of the rows

|V| is a constant for the gradients (section 4.3). It is found without ever forming V, from A W^T [rank, out]:

    |V|^2 = |W|^2 + 2 s B . (W A^T) + s^2 B . (B A A^T)        summed over each row

so no matrix of W's size is made. The output is the base's plus (g - 1) times W x plus LoRA's product with g * B: at the
start g is one and B zero, and the base's output is kept bit for bit.

What it gives up: one more product with the weight at each forward pass, whose cost is that of `rank` more tokens, and
the memory of W x, [tokens, out], which the gradient of m needs.
Dropout acts on the low-rank branch only; the paper's code and PEFT drop x in (g - 1) W x as well, which takes a second
product with W at the full size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.errors import AdapterError
from lorica.kernels.linear import linear
from lorica.methods import inits
from lorica.methods.lora import LoRA, add_low_rank
from lorica.methods.method import Adapter, MethodOptions, Positive, Probability, Rank, unsupported_kind


@dataclass(frozen=True)
class DoRA(MethodOptions):
    """Options of DoRA.

    Attributes:
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping an input feature on the low-rank branch.
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732).
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    peft_type: ClassVar[str | None] = "LORA"

    rank: Annotated[Rank, Field(description="rank of the update, 1 to 65536")] = 16
    alpha: Annotated[
        Positive, Field(description="the update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)")
    ] = 32.0
    dropout: Annotated[Probability, Field(description="probability of dropping an input of the low-rank branch")] = 0.0
    rslora: Annotated[
        bool, Field(description="scale by alpha / sqrt(rank), so that high ranks learn as fast as low ones")
    ] = False

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        if isinstance(module, nn.Linear | Conv1D):
            return DoraLinear(module, self, *self._lora().rank_and_scale(name))
        raise unsupported_kind(module, name, "dora")

    def _lora(self) -> LoRA:
        """Its low-rank pair alone."""
        return LoRA(rank=self.rank, alpha=self.alpha, dropout=self.dropout, rslora=self.rslora, targets=self.targets)

    @classmethod
    def is_peft(cls, config: Mapping[str, Any]) -> bool:
        # PEFT has it as an option of LoRA.
        return super().is_peft(config) and bool(config.get("use_dora"))

    def to_peft(self, found: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        return {**self._lora().to_peft(found, model), "use_dora": True}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], names: Sequence[str]) -> DoRA:
        lora = LoRA.from_peft({**config, "use_dora": False}, names)
        if lora.rank_pattern or lora.alpha_pattern:
            raise AdapterError("rank_pattern and alpha_pattern are not supported together with use_dora.")
        return cls(rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, rslora=lora.rslora, targets=lora.targets)


class DoraLinear(Adapter):
    """DoRA on nn.Linear, and on transformers' Conv1D, whose weight is stored transposed.

    `lora_a` [rank, in], `lora_b` [out, rank] and `magnitude` [out] are float32.
    """

    base: nn.Linear | Conv1D

    def __init__(self, base: nn.Linear | Conv1D, options: DoRA, rank: int, scale: float) -> None:
        super().__init__(base, options)
        self.transposed = isinstance(base, Conv1D)
        self.rank, self.scale, self.dropout = rank, scale, options.dropout
        out_size, in_size = self._rows().shape
        factory: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.empty(rank, in_size, **factory))
        self.lora_b = nn.Parameter(torch.empty(out_size, rank, **factory))
        inits.kaiming(self.lora_a, self.lora_b)
        self.magnitude = nn.Parameter(self.row_norms())

    def _rows(self) -> Tensor:
        """W as [out, in]."""
        return self.weight.t() if self.transposed else self.weight

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """|W + s B A| of each row in float32, [out]."""
        w, a, b = self._rows(), self.lora_a, self.lora_b
        squares: Tensor = torch.linalg.vector_norm(w, dim=1, dtype=torch.float32).square()
        cross = linear(a.to(w.dtype), w).t().float() * (2 * self.scale) + b @ (a @ a.t()) * self.scale**2
        # A row of zeros has no direction: the smallest number keeps it a row of zeros.
        return (squares + (b * cross).sum(1)).clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        gain = self.magnitude / self.row_norms()
        y = self.base(rows)
        product = y if self.base.bias is None else y - self.base.bias
        y = torch.addcmul(y, product, (gain - 1).to(y.dtype))
        h = linear(F.dropout(rows, self.dropout, self.training), self.lora_a)
        return add_low_rank(y, h, gain[:, None] * self.lora_b, self.scale).view(*x.shape[:-1], -1)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        gain = (self.magnitude / self.row_norms())[:, None]
        weight = gain * (self._rows() + self.scale * (self.lora_b @ self.lora_a))
        plain = copy.deepcopy(self.base)
        plain.weight.copy_(weight.t() if self.transposed else weight)
        return plain

    def saved_tensors(self) -> dict[str, Tensor]:
        return {
            "lora_A.weight": self.lora_a,
            "lora_B.weight": self.lora_b,
            "lora_magnitude_vector": self.magnitude,
        }

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


OPTIONS = DoRA
