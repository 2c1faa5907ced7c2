"""LoRA: a frozen weight plus a trained low-rank update (Hu et al. 2021, arXiv 2106.09685).

    y = W x + b + s B A x,    A [rank, in],  B [out, rank],  s = alpha / rank   (rsLoRA: alpha / sqrt(rank))

A and B are float32 masters and the product runs in the input's dtype, so a bfloat16 base trains without float32 matrix
products and without losing small updates. The update is added inside the second matrix product (`addmm`), which saves
one pass over y. Dropout acts on x, on the adapter's branch only.

What it gives up: nothing is fused across projections that read the same x, and merging needs the base's dense weight.
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.errors import AdapterError
from lorica.kernels.linear import is_widened, linear
from lorica.methods import inits
from lorica.methods.method import Adapter, MethodOptions, Positive, Probability, Rank, unsupported_kind

# Fields of PEFT's that change what the adapter computes, with the values that mean "not used".
_UNUSED_BY_PEFT: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none", None),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "velora_config": (None,),
}
# These change the base's weights when they start, so the folder alone does not say what was trained.
_BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "kasa")


@dataclass(frozen=True)
class LoRA(MethodOptions):
    """Options of LoRA.

    Attributes:
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping an input feature on the adapter's branch.
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732).
        init: `kaiming` or `gaussian` (see `inits.py`); both leave the output unchanged at the start.
        rank_pattern: other ranks for the modules that match a pattern (as in `targets`); the first match counts.
        alpha_pattern: other alphas, likewise.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    other_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    peft_type: ClassVar[str | None] = "LORA"

    rank: Annotated[Rank, Field(description="rank of the update, 1 to 65536")] = 16
    alpha: Annotated[
        Positive, Field(description="the update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)")
    ] = 32.0
    dropout: Annotated[Probability, Field(description="probability of dropping an input of the adapter")] = 0.0
    rslora: Annotated[
        bool, Field(description="scale by alpha / sqrt(rank), so that high ranks learn as fast as low ones")
    ] = False
    init: Annotated[Literal["kaiming", "gaussian"], Field(description="how lora_a starts; lora_b starts at zero")] = (
        "kaiming"
    )
    rank_pattern: Annotated[
        Mapping[str, Rank], Field(description="other ranks for modules whose name matches: {name or regex: rank}")
    ] = field(default_factory=dict)
    alpha_pattern: Annotated[
        Mapping[str, Positive], Field(description="other alphas for modules whose name matches: {name or regex: alpha}")
    ] = field(default_factory=dict)

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """Rank and scale s of the module at `name`."""
        rank = int(_by_pattern(self.rank_pattern, name, self.rank))
        alpha = _by_pattern(self.alpha_pattern, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def to_peft(self, found: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        ranks = {name: a.rank for name, a in found.items()}
        # PEFT divides alpha by the rank again, or by its root.
        alphas = {n: a.scale * (math.sqrt(a.rank) if self.rslora else a.rank) for n, a in found.items()}
        rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
        return {
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
            "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
            "use_rslora": self.rslora,
            "init_lora_weights": True if self.init == "kaiming" else self.init,
            "fan_in_fan_out": any(isinstance(a.base, Conv1D) for a in found.values()),
            "bias": "none",
            "lora_bias": False,
            "use_dora": False,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], names: Sequence[str]) -> LoRA:
        faults = [
            f"{key} is {config[key]!r}, which is not supported"
            for key, unused in _UNUSED_BY_PEFT.items()
            if key in config and config[key] not in unused
        ]
        init = config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
            faults.append(f"init_lora_weights is {init!r}, which changed the base; let PEFT convert it to plain LoRA")
        if faults:
            raise AdapterError("; ".join(faults) + ".")
        return cls(
            rank=int(config["r"]),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout") or 0.0),
            rslora=bool(config.get("use_rslora", False)),
            targets=tuple(re.escape(name) for name in names),
            init="gaussian" if init == "gaussian" else "kaiming",
            rank_pattern={str(k): int(v) for k, v in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
        )

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        rank, scale = self.rank_and_scale(name)
        if isinstance(module, nn.Embedding):
            return LoraEmbedding(module, self, rank, scale)
        if isinstance(module, nn.Linear | Conv1D):
            return LoraLinear(module, self, rank, scale)
        raise unsupported_kind(module, name, "lora")


def _by_pattern(patterns: Mapping[str, Any], name: str, default: float) -> float:
    return next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", name)), default)


def add_low_rank(y: Tensor, h: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """y + scale * h B^T, written into y: y [rows, out], h [rows, k], lora_b [out, k], in one product.

    The low-rank family shares this line: LoRA with h = A x, HydraLoRA with h = g (x) A x and its heads' B side by side.
    """
    if is_widened(h):
        return y.add_(linear(h, lora_b), alpha=scale)
    return y.addmm_(h, lora_b.to(y.dtype).t(), alpha=scale)


class LoraAdapter(Adapter):
    """A module with a low-rank pair; what Linear and Embedding share.

    `lora_a` [rank, in] and `lora_b` [out, rank] are float32 parameters on the base weight's device.
    """

    def __init__(self, base: nn.Module, options: LoRA, scale: float, in_size: int, out_size: int, rank: int) -> None:
        super().__init__(base, options)
        device = self.weight.device
        self.scale = scale
        self.lora_a = nn.Parameter(torch.empty(rank, in_size, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.empty(out_size, rank, device=device, dtype=torch.float32))

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    def delta_weight(self) -> Tensor:
        """s B A in float32, [out, in]."""
        return self.scale * (self.lora_b.detach() @ self.lora_a.detach())

    def saved_tensors(self) -> dict[str, Tensor]:
        return {"lora_A.weight": self.lora_a, "lora_B.weight": self.lora_b}

    def _with_weight(self, delta: Tensor) -> nn.Module:
        # A shallow copy keeps the base's type, bias and attributes, whatever subclass it is.
        plain = copy.copy(self.base)
        plain._parameters = dict(self.base._parameters)
        plain._buffers = dict(self.base._buffers)
        weight = (self.weight.detach().float() + delta).to(self.weight.dtype)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        return plain

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


class LoraLinear(LoraAdapter):
    """LoRA on nn.Linear, and on transformers' Conv1D, whose weight is stored transposed."""

    def __init__(self, base: nn.Linear | Conv1D, options: LoRA, rank: int, scale: float) -> None:
        self.transposed = isinstance(base, Conv1D)
        in_size, out_size = base.weight.shape if self.transposed else reversed(base.weight.shape)
        super().__init__(base, options, scale, in_size, out_size, rank)
        inits.INITS[options.init](self.lora_a, self.lora_b)
        self.dropout = options.dropout

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = self.base(rows)
        h = linear(F.dropout(rows, self.dropout, self.training), self.lora_a)
        return add_low_rank(y, h, self.lora_b, self.scale).view(*x.shape[:-1], -1)

    def merged(self) -> nn.Module:
        delta = self.delta_weight()
        return self._with_weight(delta.t() if self.transposed else delta)


class LoraEmbedding(LoraAdapter):
    """LoRA on nn.Embedding: `lora_a` [rank, vocabulary] is looked up by column, `lora_b` is [dim, rank]."""

    def __init__(self, base: nn.Embedding, options: LoRA, rank: int, scale: float) -> None:
        super().__init__(base, options, scale, base.num_embeddings, base.embedding_dim, rank)
        inits.embedding(self.lora_a, self.lora_b)
        # Gemma's embedding multiplies what it looks up; the update passes through the same factor.
        # Its tensor would be waited for on a GPU at each call; `scalar_embed_scale` is the number that it was made of.
        self.output_scale = float(getattr(base, "scalar_embed_scale", getattr(base, "embed_scale", 1.0)))

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids.flatten())
        h = F.embedding(ids.flatten(), self.lora_a.t(), padding_idx=self.base.padding_idx)  # type: ignore[arg-type]
        return add_low_rank(y, h.to(y.dtype), self.lora_b, self.scale * self.output_scale).view(*ids.shape, -1)

    def merged(self) -> nn.Module:
        return self._with_weight(self.delta_weight().t())

    def saved_tensors(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.lora_a, "lora_embedding_B": self.lora_b}


OPTIONS = LoRA
