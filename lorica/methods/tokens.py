"""Trained rows of an embedding: new tokens learn their vectors while all the others stay as they are.

    embedding:       y[i] = rows[id[i]] where id[i] is a trained token, else W[id[i]]          rows [n, d] float32
    output head:     y[t] = x rows[t]^T for a trained token t, else x W[t]^T

Only n rows have gradients and optimizer state, where training the whole embedding would take 16 bytes for each of its
numbers. A head whose weight is the embedding's shares the rows: a token is read and predicted by one vector. The rows
themselves are kept, not their change, as in PEFT: what a freshly resized embedding held there does not matter.

What it gives up: a head computes the logits of these tokens twice, and at the start they equal the base's within
rounding only, being a product of another shape.

This is no method of its own: every method has it as the option `trainable_tokens` (see `beside.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorica.kernels.linear import linear
from lorica.methods.full import master
from lorica.methods.method import Adapter, MethodOptions


@dataclass(frozen=True)
class TokenRows(MethodOptions):
    """The rows of one module. Attributes: tokens: their ids, in the order of the trained rows."""

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    other_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    tokens: tuple[int, ...] = ()

    def wrap(self, module: nn.Module, name: str) -> TokenAdapter:
        return self.share(module, None)

    def share(self, module: nn.Module, rows: nn.Parameter | None) -> TokenAdapter:
        """Wrap `module` with rows of its own, or with `rows` of another one, which saves them."""
        if isinstance(module, nn.Embedding):
            return TokenEmbedding(module, self, rows)
        assert isinstance(module, nn.Linear)
        return TokenHead(module, self, rows)


class TokenAdapter(Adapter):
    """A module of which some `rows` [n, d] are trained; `token_ids` [n] says which."""

    token_ids: Tensor
    replaced = ("weight",)

    def __init__(self, base: nn.Embedding | nn.Linear, options: TokenRows, rows: nn.Parameter | None) -> None:
        super().__init__(base, options)
        self.register_buffer("token_ids", torch.tensor(options.tokens, device=base.weight.device))
        self.rows = master(base.weight.detach()[self.token_ids]) if rows is None else rows
        self.is_saved = rows is None

    @torch.no_grad()
    def merged(self) -> nn.Module:
        # A shallow copy keeps the base's type and attributes, whatever class it is.
        plain = copy.copy(self.base)
        plain._parameters = dict(self.base._parameters)
        plain._buffers = dict(self.base._buffers)
        weight = self.weight.detach().index_copy(0, self.token_ids, self.rows.to(self.weight.dtype))
        plain.weight = nn.Parameter(weight, requires_grad=False)
        return plain

    def saved_tensors(self) -> dict[str, Tensor]:
        # PEFT's name; it too holds the rows, not a difference.
        return {"token_adapter.trainable_tokens_delta": self.rows} if self.is_saved else {}

    def extra_repr(self) -> str:
        return f"num_tokens={len(self.token_ids)}"


class TokenEmbedding(TokenAdapter):
    """An nn.Embedding, its subclasses that scale what they look up among them."""

    base: nn.Embedding

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids)
        known, order = self.token_ids.sort()
        at = torch.searchsorted(known, ids.contiguous()).clamp_(max=len(known) - 1)
        rows = self.rows.to(y.dtype)
        # Gemma's and BART's embeddings multiply what they look up, by a number or a tensor.
        scale = getattr(self.base, "embed_scale", None)
        if scale is not None:
            rows = rows * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((known[at] == ids)[..., None], F.embedding(order[at], rows), y)


class TokenHead(TokenAdapter):
    """A linear layer that gives one logit a token."""

    base: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        bias = None if self.base.bias is None else self.base.bias[self.token_ids]
        return y.index_copy_(-1, self.token_ids, linear(x, self.rows, bias))


def tokens_of(found: Mapping[str, Adapter]) -> dict[str, list[int]]:
    """The trained tokens by the module that they are saved with."""
    return {name: a.token_ids.tolist() for name, a in found.items() if isinstance(a, TokenAdapter) and a.is_saved}
