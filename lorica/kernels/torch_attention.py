"""Attention by what torch brings: its scaled_dot_product_attention, or the formula itself where that lacks something.

Packed samples of about one length share a call: they are gathered into [samples, H, length, D], the shorter ones filled
up behind their end, where causal attention never looks and a mask keeps other attention from looking. Kernels see a few
shapes and a few calls, not one a sample.

What it gives up: the filler is computed, inside attention only; behind a prefix causality is a mask, which the kernels
keep for backward (four bytes a pair of tokens, layer by layer); the formula itself makes matrices [T, Tk].

Shapes: B batch, H heads, K key-value heads (K divides H), T tokens, Tk keys, D head size, n prefix keys.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorica.kernels.linear import is_widened


class Call(NamedTuple):
    """What a call of attention asks for beside query, key, value and mask; `attention.py` says what each is."""

    scale: float
    causal: bool
    dropout: float
    window: int | None
    softcap: float | None
    position_bias: Tensor | None
    sinks: Tensor | None
    prefix_key: Tensor | None
    prefix_value: Tensor | None


def attend(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """[B, H, T, D] of query [B, H, T, D], key and value [B, K, Tk, D]; cu_seqlens: the borders of packed samples."""
    return _attend(call, q, k, v, mask) if cu_seqlens is None else _packed(call, q, k, v, cu_seqlens)


def _attend(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    num_queries, num_keys, window = q.shape[2], k.shape[2], call.window or k.shape[2]
    if mask is None and call.causal and (num_keys > window or call.prefix_key is not None):
        mask = _band(num_queries, num_keys, window, q.device)
    if call.prefix_key is not None and call.prefix_value is not None:
        k, v = _behind(call.prefix_key, k), _behind(call.prefix_value, v)
        # A causal mask has come or was made; None is full sight. A mask of numbers is added: 0 changes nothing.
        mask, bias = (
            t if t is None else F.pad(t, (call.prefix_key.shape[1], 0), value=float(t.dtype is torch.bool))
            for t in (mask, call.position_bias)
        )
        call = call._replace(causal=False, position_bias=bias)
    if call.softcap is None and call.sinks is None and call.position_bias is None:
        return _sdpa(call, q, k, v, mask)
    return _explicit(call, q, k, v, mask)


def _sdpa(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    if is_widened(q):

        def wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _sdpa(call, q.float(), k.float(), v.float(), mask).to(q.dtype)

        # Kept in 16 bits for backward, which makes the float32 tensors again.
        out: Tensor = checkpoint(wide, q, k, v, use_reentrant=False) if torch.is_grad_enabled() else wide(q, k, v)
        return out
    causal = call.causal and mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=call.dropout, scale=call.scale, is_causal=causal, enable_gqa=grouped
    )


def _explicit(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The formula itself, for what torch's kernels do not know: soft-capping, sinks, position biases."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.position_bias is not None:
        scores = scores + call.position_bias
    if mask is None and call.causal and q.shape[2] > 1:
        mask = _band(q.shape[2], k.shape[2], k.shape[2], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if call.sinks is not None:
        sink = call.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32)
    return F.dropout(weights.to(v.dtype), call.dropout, training=call.dropout > 0) @ v


def _band(q_length: int, kv_length: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, T, Tk]: True where a query sees a key, itself and the window - 1 positions before it."""
    behind = (
        torch.arange(q_length, device=device)[:, None] + (kv_length - q_length) - torch.arange(kv_length, device=device)
    )
    return ((behind >= 0) & (behind < window))[None, None]


def _behind(prefix: Tensor, rows: Tensor) -> Tensor:
    """[B, K, n + Tk, D]: the prefix [K, n, D] in front of each sample's rows [B, K, Tk, D]."""
    return torch.cat([prefix.to(rows.dtype).expand(rows.shape[0], -1, -1, -1), rows], dim=2)


@dataclass(frozen=True)
class _Layout:
    """How the samples of one packed batch are cut into groups of one length each.

    groups: (samples, length) of each; a group's rows follow each other in the gathered tensor.
    masks: of each group, where keys are filler that a query would see: True for the real ones [samples, 1, 1, length].
    gather [M]: the token that goes to each of the M rows, filler rows repeating a token. inverse [T]: each token's row.
    filler: the rows that are filler. All None where the batch is one group as it stands.
    """

    groups: tuple[tuple[int, int], ...]
    masks: tuple[Tensor | None, ...]
    gather: Tensor | None
    inverse: Tensor | None
    filler: Tensor | None


def _packed(call: Call, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[1, H, T, D] from packed [1, H, T, D], [1, K, T, D] twice."""
    layout = _layout_of(cu_seqlens, q.shape[2], q.device, call.causal)
    rows = [t[0].transpose(0, 1) for t in (q, k, v)]
    if layout.gather is not None:
        rows = [_reordered(t, layout.gather, layout.inverse, None) for t in rows]
    sizes = [count * length for count, length in layout.groups]
    parts = []
    splits = (torch.split(t, sizes) for t in rows)
    for (count, length), seen, *group in zip(layout.groups, layout.masks, *splits, strict=True):
        # [samples * length, H, D] -> [samples, H, length, D], a view.
        q, k, v = (t.unflatten(0, (count, length)).transpose(1, 2) for t in group)
        out = _attend(call, q, k, v, seen)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    if layout.gather is not None:
        out = _reordered(out, layout.inverse, layout.gather, layout.filler)
    return out.transpose(0, 1)[None]


class _Reorder(torch.autograd.Function):
    """Rows by an index whose inverse is known: backward gathers too, where index_select would scatter and add.

    `dead` rows of the gradient belong to nothing and are zero.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor, dead: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.dead = dead
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        return grad if ctx.dead is None else grad.index_fill_(0, ctx.dead, 0), None, None, None


def _reordered(rows: Tensor, index: Tensor | None, inverse: Tensor | None, dead: Tensor | None) -> Tensor:
    result: Tensor = _Reorder.apply(rows, index, inverse, dead)  # type: ignore[no-untyped-call]
    return result


# All layers of a forward pass ask for the layout of the same borders.
_last_layout: tuple[weakref.ref[Tensor], torch.device, bool, _Layout] | None = None


def _layout_of(cu_seqlens: Tensor, num_tokens: int, device: torch.device, causal: bool) -> _Layout:
    global _last_layout
    if _last_layout is not None:
        borders, place, direction, layout = _last_layout
        if borders() is cu_seqlens and place == device and direction == causal:
            return layout
    layout = _make_layout(np.array(cu_seqlens.tolist()), num_tokens, device, causal)
    _last_layout = (weakref.ref(cu_seqlens), device, causal, layout)
    return layout


def _make_layout(borders: npt.NDArray[np.int64], num_tokens: int, device: torch.device, causal: bool) -> _Layout:
    starts, lengths = borders[:-1].astype(np.int64), np.diff(borders).astype(np.int64)
    if int(lengths.sum()) != num_tokens:
        raise ValueError(f"cu_seqlens cover {int(lengths.sum())} tokens, but the packed batch has {num_tokens}.")
    if (lengths == lengths[0]).all():
        return _Layout(((len(lengths), int(lengths[0])),), (None,), None, None, None)
    rounded = _round_up(lengths)
    groups, masks, tokens, real = list[tuple[int, int]](), list[Tensor | None](), [], []
    for length in np.unique(rounded):
        members = np.flatnonzero(rounded == length)
        groups.append((len(members), int(length)))
        within = np.arange(length)
        tokens.append((starts[members, None] + np.minimum(within, lengths[members, None] - 1)).ravel())
        is_real = within < lengths[members, None]
        masks.append(None if causal or is_real.all() else torch.from_numpy(is_real[:, None, None]).to(device))
        real.append(is_real.ravel())
    gather, is_real = np.concatenate(tokens), np.concatenate(real)
    inverse = np.empty(num_tokens, np.int64)
    inverse[gather[is_real]] = np.flatnonzero(is_real)
    filler = np.flatnonzero(~is_real)
    index = [torch.from_numpy(t).to(device) for t in (gather, inverse, filler)]
    return _Layout(tuple(groups), tuple(masks), *index)


def _round_up(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Up to the next multiple of 16, 64 or 256, whichever adds at most about an eighth to a long sample."""
    step = np.where(lengths <= 128, 16, np.where(lengths <= 1024, 64, 256))
    return -(-lengths // step) * step
