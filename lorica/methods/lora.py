"""LoRA: a frozen weight plus a trained low-rank update (Hu et al. 2021, arXiv 2106.09685).

    y = W x + b + s B A x,    A [rank, in],  B [out, rank],  s = alpha / rank   (rsLoRA: alpha / sqrt(rank))

A and B are float32 masters and the product runs in the input's dtype, so a bfloat16 base trains without float32 matrix
products and without losing small updates. The update is added inside the second matrix product (`addmm`), which saves
one pass over y. Dropout acts on x, on the adapter's branch only.

Three things are a plain LoRA in the end, and `pair()` says which: the forward, merging and saving see only that one.

    convolution       A [rank, in, k...] slides as the base does, B [out, rank, 1...] is pointwise
    slices            A_i, B_i for each trained slice of a fused projection (loralib's MergedLinear): B block-diagonal
    pissa, olora      B A - B0 A0 = [B - B0, B0] [A; A - A0]: rank 2r, and the base is never written

The last form keeps 16 bits exact where it matters: B A and B0 A0 are as large as W, and only their small difference
counts; [B - B0, B0] [A; A - A0] is zero at the start and rounds relative to itself.

What it gives up: nothing is fused across projections that read the same x, and merging needs the base's dense weight.
Slices, pissa and olora are read back from a folder as the plain LoRA that they were saved as: equal logits, but further
training knows neither the blocks nor the start. PEFT's branch of a convolution ignores the base's dilation and padding
mode: with these a folder of ours is right here alone.
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
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.errors import AdapterError, ConfigError, NotMergeableError, TargetError
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
_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _slices(value: object) -> object:
    if isinstance(value, Mapping) and value.keys() == {"sizes", "train"}:
        sizes, train = value["sizes"], value["train"]
        whole = all(isinstance(v, list | tuple) and v and all(type(n) is int for n in v) for v in (sizes, train))
        if whole and min(sizes) >= 1 and len(set(train)) == len(train) and set(train) <= set(range(len(sizes))):
            return {"sizes": tuple(sizes), "train": tuple(sorted(train))}
    raise ValueError(
        "must be as {sizes: [1, 1, 1], train: [0, 2]}: the slices' relative sizes, and which are trained, from 0"
    )


Slices = Annotated[Mapping[str, tuple[int, ...]], BeforeValidator(_slices)]


@dataclass(frozen=True)
class LoRA(MethodOptions):
    """Options of LoRA.

    Attributes:
        rank: rank of the update.
        alpha: the update is scaled by alpha / rank.
        dropout: probability of dropping an input feature on the adapter's branch.
        rslora: scale by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv 2312.03732).
        init: how the pair starts (see `inits.py`); the output is unchanged at the start by all of them. `pissa` and
            `olora` start from the base's weight; an embedding keeps its own start.
        svd_niter: iterations of the randomised SVD of `pissa`, None for the exact one.
        slices: fused projections of which only some slices of the output are trained, by pattern; the first match
            counts. `{"c_attn": {"sizes": [1, 1, 1], "train": [0, 2]}}` is Q and V of thirds; with grouped queries the
            sizes are the numbers of heads, `[32, 8, 8]`. Each trained slice has a pair of `rank` of its own.
        rank_pattern: other ranks for the modules that match a pattern (as in `targets`); the first match counts.
        alpha_pattern: other alphas, likewise.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    other_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    peft_type: ClassVar[str | None] = "LORA"

    rank: Annotated[Rank, Field(description="rank of the update, 1 to 65536")] = 16
    alpha: Annotated[
        Positive, Field(description="the update is scaled by alpha / rank (alpha / sqrt(rank) with rslora)")
    ] = 32.0
    dropout: Annotated[Probability, Field(description="probability of dropping an input of the adapter")] = 0.0
    rslora: Annotated[
        bool, Field(description="scale by alpha / sqrt(rank), so that high ranks learn as fast as low ones")
    ] = False
    init: Annotated[
        Literal["kaiming", "gaussian", "pissa", "olora"],
        Field(description="how the pair starts: lora_a random and lora_b zero, or from the weight's SVD (pissa) or QR"),
    ] = "kaiming"
    svd_niter: Annotated[
        Annotated[int, Field(ge=0, le=4096)] | None,
        Field(description="iterations of a randomised SVD for init pissa, much faster; null: exact"),
    ] = None
    slices: Annotated[
        Mapping[str, Slices],
        Field(description="fused layers to train in part: {name or regex: {sizes: [1, 1, 1], train: [0, 2]}}"),
    ] = field(default_factory=dict)
    rank_pattern: Annotated[
        Mapping[str, Rank], Field(description="other ranks for modules whose name matches: {name or regex: rank}")
    ] = field(default_factory=dict)
    alpha_pattern: Annotated[
        Mapping[str, Positive], Field(description="other alphas for modules whose name matches: {name or regex: alpha}")
    ] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        faults = []
        if self.slices and self.init in inits.FROM_WEIGHT:
            faults.append(f"init {self.init} starts from a whole weight; with slices use kaiming or gaussian")
        if self.svd_niter is not None and self.init != "pissa":
            faults.append(f"svd_niter is {self.svd_niter}, but init {self.init} takes no SVD; only pissa does")
        if faults:
            raise ConfigError("LoRA: " + "; ".join(faults) + ".")

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
            # PEFT's pissa and olora would change the base again; what is saved is the plain LoRA that ours equals.
            "init_lora_weights": "gaussian" if self.init == "gaussian" else True,
            "fan_in_fan_out": any(isinstance(a.base, Conv1D) for a in found.values()),
            "bias": "none",
            "lora_bias": False,
            "use_dora": False,
        }

    @classmethod
    def is_peft(cls, config: Mapping[str, Any]) -> bool:
        # PEFT keeps DoRA under the same type.
        return super().is_peft(config) and not config.get("use_dora")

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

    def wrap_all(self, model: nn.Module, names: Sequence[str]) -> dict[str, Adapter]:
        idle = [pattern for pattern in self.slices if not any(_matches(pattern, name) for name in names)]
        if idle:
            raise TargetError(f"slices: {', '.join(map(repr, idle))} match none of the {len(names)} targets.")
        return super().wrap_all(model, names)

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        rank, scale = self.rank_and_scale(name)
        if not isinstance(module, nn.Linear | Conv1D) and any(_matches(pattern, name) for pattern in self.slices):
            raise TargetError(f"slices: {name} is a {type(module).__name__}; only linear layers have slices.")
        if isinstance(module, nn.Embedding):
            return LoraEmbedding(module, self, rank, scale)
        if not isinstance(module, self.linear_kinds + self.other_kinds):
            raise unsupported_kind(module, name, "lora")
        weight: Tensor = module.weight  # type: ignore[assignment]
        if self.init in inits.FROM_WEIGHT and rank > min(weight.flatten(1).shape):
            raise TargetError(f"init {self.init}: rank {rank} is more than {name} has, {list(weight.shape)}.")
        if isinstance(module, nn.Linear | Conv1D):
            return LoraLinear(module, self, rank, scale, self._slices_of(module, name))
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if rank % module.groups:
            raise TargetError(f"{name} has {module.groups} groups, which must divide the rank; it is {rank}.")
        if module.groups > 1 and self.init in inits.FROM_WEIGHT:
            raise TargetError(f"init {self.init} takes no convolution of {module.groups} groups, as {name} is.")
        return LoraConv(module, self, rank, scale)

    def _slices_of(self, module: nn.Linear | Conv1D, name: str) -> tuple[tuple[int, bool], ...]:
        """(outputs, whether they are trained) of each slice; nothing where the whole is trained."""
        found = next((v for pattern, v in self.slices.items() if _matches(pattern, name)), None)
        if found is None:
            return ()
        out_size, parts = module.weight.shape[isinstance(module, Conv1D)], sum(found["sizes"])
        if out_size % parts:
            raise TargetError(f"slices: the {out_size} outputs of {name} cannot be shared out as {found['sizes']}.")
        return tuple((n * out_size // parts, i in found["train"]) for i, n in enumerate(found["sizes"]))


def _by_pattern(patterns: Mapping[str, Any], name: str, default: float) -> float:
    return next((v for k, v in patterns.items() if _matches(k, name)), default)


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def add_low_rank(y: Tensor, h: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """y + scale * h B^T, written into y: y [rows, out], h [rows, k], lora_b [out, k], in one product.

    The low-rank family shares this line: LoRA with h = A x, HydraLoRA with h = g (x) A x and its heads' B side by side.
    """
    if is_widened(h):
        return y.add_(linear(h, lora_b), alpha=scale)
    return y.addmm_(h, lora_b.to(y.dtype).t(), alpha=scale)


class LoraAdapter(Adapter):
    """A module with a low-rank pair; what all kinds share.

    `lora_a` [rank, in...] and `lora_b` [out, rank...] are float32 parameters on the base weight's device. `start_a` and
    `start_b` are what they were at first where their product was not zero then, None otherwise.
    """

    options: LoRA
    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(
        self, base: nn.Module, options: LoRA, scale: float, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
    ) -> None:
        super().__init__(base, options)
        device = self.weight.device
        self.scale = scale
        self.dropout = options.dropout
        self.lora_a = nn.Parameter(torch.empty(a_shape, device=device, dtype=torch.float32))
        self.lora_b = nn.Parameter(torch.empty(b_shape, device=device, dtype=torch.float32))
        self.register_buffer("start_a", None)
        self.register_buffer("start_b", None)

    def pair(self) -> tuple[Tensor, Tensor]:
        """A [k, in...] and B [out, k...] of the plain LoRA that this adapter equals."""
        if self.start_a is None or self.start_b is None:
            return self.lora_a, self.lora_b
        moved_a, moved_b = self.lora_a - self.start_a, self.lora_b - self.start_b
        return torch.cat([self.lora_a, moved_a]), torch.cat([moved_b, self.start_b], dim=1)

    @property
    def rank(self) -> int:
        """The rank of `pair()`."""
        return self.lora_a.shape[0] * (1 if self.start_a is None else 2)

    def delta_weight(self) -> Tensor:
        """s B A in float32, [out, in]; a kernel's taps are laid out flat."""
        lora_a, lora_b = (tensor.detach().flatten(1) for tensor in self.pair())
        return self.scale * (lora_b @ lora_a)

    def saved_tensors(self) -> dict[str, Tensor]:
        lora_a, lora_b = self.pair()
        return {"lora_A.weight": lora_a, "lora_B.weight": lora_b}

    def _initialise(self, weight: Tensor, rank: int) -> None:
        """Fill the pair as the options say; `weight` is the base's, [out, in...]."""
        if self.options.init in inits.INITS:
            # Each trained slice has its own.
            for lora_a in self.lora_a.detach().view(-1, rank, *self.lora_a.shape[1:]):
                inits.INITS[self.options.init](lora_a, self.lora_b)
        else:
            matrix = weight.detach().flatten(1).float()
            lora_a, lora_b = inits.FROM_WEIGHT[self.options.init](matrix, rank, self.scale, self.options.svd_niter)
            self.start_a, self.start_b = lora_a.view_as(self.lora_a), lora_b.view_as(self.lora_b)
            self.lora_a.data.copy_(self.start_a)
            self.lora_b.data.copy_(self.start_b)

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
    """LoRA on nn.Linear, and on transformers' Conv1D, whose weight is stored transposed.

    With `slices`, n of them trained, `lora_a` [n rank, in] and `lora_b` [their outputs, rank] hold pair after pair.
    """

    def __init__(
        self,
        base: nn.Linear | Conv1D,
        options: LoRA,
        rank: int,
        scale: float,
        slices: tuple[tuple[int, bool], ...] = (),
    ) -> None:
        self.transposed = isinstance(base, Conv1D)
        self.slices = slices
        weight = base.weight.t() if self.transposed else base.weight
        out_size, in_size = weight.shape
        trained = [size for size, is_trained in slices if is_trained] or [out_size]
        super().__init__(base, options, scale, (rank * len(trained), in_size), (sum(trained), rank))
        self._initialise(weight, rank)

    def pair(self) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = super().pair()
        if not self.slices:
            return lora_a, lora_b
        blocks, row = [], 0
        for size, is_trained in self.slices:
            # A block without columns is a slice that is not trained: rows of zeros.
            blocks.append(lora_b[row : row + size] if is_trained else lora_b.new_empty(size, 0))
            row += size if is_trained else 0
        return lora_a, torch.block_diag(*blocks)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        lora_a, lora_b = self.pair()
        rows = x.reshape(-1, x.shape[-1])
        y: Tensor = self.base(rows)
        h = linear(F.dropout(rows, self.dropout, self.training), lora_a)
        return add_low_rank(y, h, lora_b, self.scale).view(*x.shape[:-1], -1)

    def merged(self) -> nn.Module:
        delta = self.delta_weight()
        return self._with_weight(delta.t() if self.transposed else delta)


class LoraConv(LoraAdapter):
    """LoRA on nn.Conv1d, nn.Conv2d and nn.Conv3d: `lora_a` [rank, in, k...], `lora_b` [out, rank / groups, 1...].

    A is the base's convolution but without its groups, B has them and is pointwise: PEFT's shapes. loralib's differ.
    """

    base: nn.Conv1d | nn.Conv2d | nn.Conv3d

    def __init__(self, base: nn.Conv1d | nn.Conv2d | nn.Conv3d, options: LoRA, rank: int, scale: float) -> None:
        pointwise = (1,) * len(base.kernel_size)
        a_shape = (rank, base.in_channels, *base.kernel_size)
        super().__init__(base, options, scale, a_shape, (base.out_channels, rank // base.groups, *pointwise))
        self._initialise(base.weight, rank)

    def forward(self, x: Tensor) -> Tensor:
        base, (lora_a, lora_b) = self.base, self.pair()
        convolve = _CONVOLUTIONS[len(base.kernel_size)]
        y: Tensor = base(x)
        x = F.dropout(x, self.dropout, self.training)
        padding: Any = base.padding
        if base.padding_mode != "zeros":
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
        h = convolve(x, lora_a.to(x.dtype), None, base.stride, padding, base.dilation)
        return y.add_(convolve(h, lora_b.to(x.dtype), groups=base.groups), alpha=self.scale)

    def merged(self) -> nn.Module:
        if self.base.groups > 1:
            raise NotMergeableError(
                f"A convolution of {self.base.groups} groups cannot be merged: its lora_a reads all groups' channels."
            )
        return self._with_weight(self.delta_weight().view_as(self.weight))


class LoraEmbedding(LoraAdapter):
    """LoRA on nn.Embedding: `lora_a` [rank, vocabulary] is looked up by column, `lora_b` is [dim, rank]."""

    def __init__(self, base: nn.Embedding, options: LoRA, rank: int, scale: float) -> None:
        super().__init__(base, options, scale, (rank, base.num_embeddings), (base.embedding_dim, rank))
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
