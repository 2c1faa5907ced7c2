"""LoRA's adapters for layers that compute x -> W x + b: what all of them share, linear layers and embeddings.

Three things are a plain LoRA in the end, and `pair()` says which: the forward, merging and saving see only that one.

    convolution       A [rank, in, k...] slides as the base does, B [out, rank, 1...] is pointwise
    slices            A_i, B_i for each trained slice of a fused projection (loralib's MergedLinear): B block-diagonal
    pissa, olora      B A - B0 A0 = [B - B0, B0] [A; A - A0]: rank 2r, and the base is never written (lora_ga as well)
    restarts          ReLoRA (arXiv 2307.05695): [B, B_1, ...] [A; A_1; ...] with all earlier pairs, frozen: rank r more
                      each time, where the paper adds them to the base. They pass the same dropout

The third form keeps 16 bits exact where it matters: B A and B0 A0 are as large as W, and only their small difference
counts; [B - B0, B0] [A; A - A0] is zero at the start and rounds relative to itself.

What it gives up: nothing is fused across projections that read the same x, and merging needs the base's dense weight.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.errors import NotMergeableError
from lorica.kernels.linear import is_low_rank_for_rows, linear
from lorica.kernels.low_rank import add_low_rank, low_rank_linear, takes
from lorica.kernels.rows import add_low_rank as add_low_rank_now
from lorica.methods import inits
from lorica.methods.method import Adapter
from lorica.quant.experts import put_plain
from lorica.quant.linear import QuantizedLinear

if TYPE_CHECKING:
    from lorica.methods.lora import LoRA


_BUFFERS = ("start_a", "start_b", "past_a", "past_b")


class LoraAdapter(Adapter):
    """A module with a low-rank pair; what all kinds share.

    `lora_a` [rank, in...] and `lora_b` [out, rank...] are float32 parameters on the base weight's device. `start_a` and
    `start_b` are what they were at first where their product was not zero then, None otherwise. `past_a` and `past_b`
    are what was learned before the last restart, None without. `lora_bias` [out] is B's bias, scaled as the product is,
    and `base_bias` [out] what the layer's own bias is trained to; both may be None.
    """

    options: LoRA
    start_a: Tensor | None
    start_b: Tensor | None
    past_a: Tensor | None
    past_b: Tensor | None

    def __init__(
        self, base: nn.Module, options: LoRA, scale: float, a_shape: tuple[int, ...], b_shape: tuple[int, ...]
    ) -> None:
        super().__init__(base, options)
        factory: dict[str, Any] = {"device": self.weight.device, "dtype": torch.float32}
        self.scale = scale
        self.dropout = options.dropout
        self.lora_a = nn.Parameter(torch.empty(a_shape, **factory))
        self.lora_b = nn.Parameter(torch.empty(b_shape, **factory))
        self.lora_bias = nn.Parameter(torch.zeros(self.out_size(), **factory)) if options.lora_bias else None
        bias = self._bias() if options.bias == "lora_only" else None
        self.base_bias = None if bias is None else nn.Parameter(bias.detach().to(torch.float32, copy=True))
        for name in _BUFFERS:
            self.register_buffer(name, None)

    def out_size(self) -> int:
        """How many outputs B's bias is added to."""
        return self.lora_b.shape[0]

    def _bias(self) -> Tensor | None:
        """The layer's own bias [out], if it has one."""
        return self.base._parameters.get("bias")

    def added_bias(self) -> Tensor | None:
        """What is added to the outputs beside the product, float32 [out]; None where nothing is."""
        added = None if self.lora_bias is None else self.scale * self.lora_bias
        if self.base_bias is None:
            return added
        bias = self._bias()
        assert bias is not None
        return self.base_bias - bias if added is None else self.base_bias - bias + added

    def pair(self) -> tuple[Tensor, Tensor]:
        """A [k, in...] and B [out, k...] of the plain LoRA that this adapter equals."""
        lora_a, lora_b = self.trained_pair()
        if self.past_a is None or self.past_b is None:
            return lora_a, lora_b
        return torch.cat([lora_a, self.past_a]), torch.cat([lora_b, self.past_b], dim=1)

    def trained_pair(self) -> tuple[Tensor, Tensor]:
        """As `pair`, without what was learned before the last restart."""
        if self.start_a is None or self.start_b is None:
            return self.lora_a, self.lora_b
        moved_a, moved_b = self.lora_a - self.start_a, self.lora_b - self.start_b
        return torch.cat([self.lora_a, moved_a]), torch.cat([moved_b, self.start_b], dim=1)

    @property
    def rank(self) -> int:
        """The rank of `pair()`."""
        past = 0 if self.past_a is None else self.past_a.shape[0]
        return past + self.lora_a.shape[0] * (1 if self.start_a is None else 2)

    @torch.no_grad()
    def restart(self) -> Sequence[nn.Parameter]:
        self.past_a, self.past_b = (tensor.clone() for tensor in self.pair())
        self.start_a = self.start_b = None
        self._draw(self.lora_b.shape[1])
        return self.lora_a, self.lora_b

    def make_room(self, saved: Mapping[str, Tensor]) -> None:
        for name in _BUFFERS:
            setattr(self, name, self.lora_a.new_empty(saved[name].shape) if name in saved else None)

    def ranks_and_scales(self, name: str) -> dict[str, tuple[int, float]]:
        """Rank and scale by the names to which PEFT's patterns are compared, where the adapter stands at `name`."""
        return {name: (self.rank, self.scale)}

    def delta_weight(self) -> Tensor:
        """s B A in float32, [out, in]; a kernel's taps are laid out flat."""
        lora_a, lora_b = (tensor.detach().flatten(1) for tensor in self.pair())
        return self.scale * (lora_b @ lora_a)

    def saved_tensors(self) -> dict[str, Tensor]:
        lora_a, lora_b = self.pair()
        biases = {"lora_B.bias": self.lora_bias, "base_layer.bias": self.base_bias}
        own = {name: bias for name, bias in biases.items() if bias is not None}
        return {"lora_A.weight": lora_a, "lora_B.weight": lora_b, **own}

    def _initialise(self, weight: Tensor, rank: int) -> None:
        """Fill the pair as the options say; `weight` is the base's, [out, in...]."""
        if self.options.init in inits.FROM_WEIGHT:
            matrix = weight.detach().flatten(1).float()
            lora_a, lora_b = inits.FROM_WEIGHT[self.options.init](matrix, rank, self.scale, self.options.svd_niter)
            self.start_a, self.start_b = lora_a.view_as(self.lora_a), lora_b.view_as(self.lora_b)
            self.lora_a.data.copy_(self.start_a)
            self.lora_b.data.copy_(self.start_b)
            return
        self._draw(rank)
        if self.options.init == "loftq" and isinstance(self.base, QuantizedLinear):
            self._mend(self.base, rank)
        if self.options.init == "lora_ga":
            # Room for what its data will give, so that a rehearsal, which has none, counts it.
            self.start_a, self.start_b = torch.zeros_like(self.lora_a), torch.zeros_like(self.lora_b)

    def _draw(self, rank: int) -> None:
        """Fill the pair at random, with a product of zero."""
        # Each trained slice has its own.
        for lora_a in self.lora_a.detach().view(-1, rank, *self.lora_a.shape[1:]):
            inits.INITS.get(self.options.init, inits.kaiming)(lora_a, self.lora_b)

    def _mend(self, base: QuantizedLinear, rank: int) -> None:
        """Start from what quantising took from the base, and let the base forget it."""
        self.mends = True
        if base.mended is None:
            # A rehearsal has nothing to take it from.
            return
        (lora_a, lora_b), root = base.mended, math.sqrt(self.scale)
        self.lora_a.data.copy_(lora_a[:rank] / root)
        self.lora_b.data.copy_(lora_b[:, :rank] / root)
        base.mender = base.mended = None

    def _with_weight(self, delta: Tensor) -> nn.Module:
        weight = (self.weight.detach().float() + delta).to(self.weight.dtype)
        added, bias = self.added_bias(), self._bias()
        if added is None:
            return with_parameters(self.base, {"weight": weight})
        if bias is None:
            raise NotMergeableError("B has a bias (lora_bias) and the layer has none to add it to.")
        moved = (bias.detach() + added.detach()).to(bias.dtype)
        return with_parameters(self.base, {"weight": weight, "bias": moved})

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}"


def with_parameters(module: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    """A copy of `module` that has these tensors as frozen parameters, and shares everything else with it.

    It keeps the type and the attributes, whatever subclass it is. A name may lead to a child: `out_proj.weight`.
    """
    plain = _shallow(module)
    for name, value in values.items():
        *children, key = name.split(".")
        holder = plain
        for child in children:
            inner = holder._modules[child]
            assert inner is not None
            holder._modules[child] = holder = _shallow(inner)
        parameter = nn.Parameter(value, requires_grad=False)
        if key in holder._modules:
            put_plain(holder, key, parameter)
        holder._parameters[key] = parameter
    return plain


def _shallow(module: nn.Module) -> nn.Module:
    plain = copy.copy(module)
    plain._parameters = dict(module._parameters)
    plain._buffers = dict(module._buffers)
    plain._modules = dict(module._modules)
    return plain


class LoraLinear(LoraAdapter):
    """LoRA on nn.Linear, and on transformers' Conv1D, whose weight is stored transposed.

    With `slices`, n of them trained, `lora_a` [n rank, in] and `lora_b` [their outputs, rank] hold pair after pair.
    """

    leaves_base = True

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

    def out_size(self) -> int:
        return sum(size for size, _ in self.slices) or self.lora_b.shape[0]

    def trained_pair(self) -> tuple[Tensor, Tensor]:
        lora_a, lora_b = super().trained_pair()
        if not self.slices:
            return lora_a, lora_b
        blocks, row = [], 0
        for size, is_trained in self.slices:
            # A block without columns is a slice that is not trained: rows of zeros.
            blocks.append(lora_b[row : row + size] if is_trained else lora_b.new_empty(size, 0))
            row += size if is_trained else 0
        return lora_a, torch.block_diag(*blocks)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor) -> Tensor:
        (lora_a, lora_b), added = self.pair(), self.added_bias()
        if not torch.is_inference_mode_enabled() and takes(self.base):
            y = low_rank_linear(x, self.base, lora_a, lora_b, self.scale, self.dropout if self.training else 0.0)
            return y if added is None else y + added.to(y.dtype)
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(rows)
        if added is not None:
            y = y.add_(added.to(y.dtype))
        if not self.training and is_low_rank_for_rows(y, rows, lora_a, lora_b):
            return add_low_rank_now(y, rows, lora_a, lora_b, self.scale).view(*x.shape[:-1], y.shape[-1])
        h = linear(F.dropout(rows, self.dropout, self.training), lora_a)
        return add_low_rank(y, h, lora_b, self.scale).view(*x.shape[:-1], y.shape[-1])

    def merged(self) -> nn.Module:
        delta = self.delta_weight()
        return self._with_weight(delta.t() if self.transposed else delta)


class LoraEmbedding(LoraAdapter):
    """LoRA on nn.Embedding: `lora_a` [rank, vocabulary] is looked up by column, `lora_b` is [dim, rank]."""

    base: nn.Embedding

    def __init__(self, base: nn.Embedding, options: LoRA, rank: int, scale: float) -> None:
        super().__init__(base, options, scale, (rank, base.num_embeddings), (base.embedding_dim, rank))
        inits.embedding(self.lora_a, self.lora_b)
        self.output_scale = embedding_scale(base)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids.flatten())
        h = looked_up(self.base, ids, self.lora_a)
        return add_low_rank(y, h.to(y.dtype), self.lora_b, self.scale * self.output_scale).view(*ids.shape, -1)

    def restart(self) -> Sequence[nn.Parameter]:
        # A past of the whole vocabulary's size would be copied at each step.
        return ()

    def merged(self) -> nn.Module:
        return self._with_weight(self.delta_weight().t())

    def saved_tensors(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.lora_a, "lora_embedding_B": self.lora_b}


def embedding_scale(base: nn.Embedding) -> float:
    """What the embedding multiplies by what it looks up, as Gemma's does; an update passes through the same factor."""
    # Its tensor would be waited for on a GPU at each call; `scalar_embed_scale` is the number that it was made of.
    return float(getattr(base, "scalar_embed_scale", getattr(base, "embed_scale", 1.0)))


def looked_up(base: nn.Embedding, ids: Tensor, lora_a: Tensor) -> Tensor:
    """The columns of A [rank, vocabulary] at `ids`, [ids, rank]; the padding id gets no gradient."""
    return F.embedding(ids.flatten(), lora_a.t(), padding_idx=base.padding_idx)
