"""Attention for padded and for packed batches, behind transformers' own attention interface.

A packed batch is several samples in one row with their borders in `cu_seqlens`. The samples are cut apart here, so no
attention can cross a border, no [tokens, tokens] mask exists, and no padding is computed; it works on a CPU as on CUDA.
Prefix methods hand over keys and values that stand in front of every sample: all its queries see all of them, whatever
mask or window holds among the tokens themselves.

What it gives up: samples of one group of lengths are filled up to the longest of it, inside attention only; and behind
a prefix causality is a mask, which the kernels keep for backward (four bytes a pair of tokens, layer by layer).

Shapes: B batch, H heads, K key-value heads (K divides H), T tokens, D head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from lorica.kernels import cpu_attention, cuda_attention, one_query
from lorica.kernels.linear import is_widened

NAME = "lorica"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' layers call it.

    Args:
        query: [B, H, T, D]; key, value: [B, K, Tk, D], not repeated.
        attention_mask: [B, 1, T, Tk], True where a query may look, or None.
        sliding_window: a query sees this many positions, itself included. A mask that came has it already.
        softcap: scores become softcap * tanh(scores / softcap) (Gemma 2).
        position_bias: added to the scores, [1 or B, H, T, Tk] (T5).
        s_aux: one logit a head that takes part in the softmax and has no value (gpt-oss "sinks"), [H].
        cu_seq_lens_q: [samples + 1] borders of the packed samples; B is 1 then.
        prefix_key, prefix_value: [K, n, D], seen by every query of every sample beside what it sees else; or neither.

    Returns:
        [B, T, H, D], and no attention weights.
    """
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = softcap is None and s_aux is None and position_bias is None
    if one_query.takes(query, key, attention_mask) and not dropout and position_bias is None and prefix_key is None:
        if attention_mask is None and causal and sliding_window:
            key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
        return one_query.attend(query, key, value, attention_mask, scale=scale, softcap=softcap, sinks=s_aux), None
    if plain and attention_mask is None and not dropout and cpu_attention.takes(query, key, causal):
        fused = cpu_attention.attend(
            query,
            key,
            value,
            scale=scale,
            causal=causal,
            cu_seqlens=cu_seq_lens_q,
            window=sliding_window,
            prefix_key=prefix_key,
            prefix_value=prefix_value,
        )
        return fused.transpose(1, 2), None
    is_simple = plain and not dropout and prefix_key is None
    if cu_seq_lens_q is not None and is_simple and cuda_attention.takes(query, key, value):
        fused = cuda_attention.attend(
            query, key, value, scale=scale, causal=causal, cu_seqlens=cu_seq_lens_q, window=sliding_window
        )
        return fused.transpose(1, 2), None

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        bias, window = position_bias, sliding_window or k.shape[2]
        if mask is None and causal and (k.shape[2] > window or prefix_key is not None):
            mask = _band(q.shape[2], k.shape[2], window, q.device)
        if prefix_key is not None and prefix_value is not None:
            k, v = _behind(prefix_key, k), _behind(prefix_value, v)
            # A causal mask has come or was made; None is full sight. A mask of numbers is added: 0 changes nothing.
            mask, bias = (
                t if t is None else F.pad(t, (prefix_key.shape[1], 0), value=float(t.dtype is torch.bool))
                for t in (mask, bias)
            )
        if plain:
            return _sdpa(q, k, v, mask, scale, dropout, causal and prefix_key is None)
        return _explicit(q, k, v, mask, scale, dropout, causal and prefix_key is None, softcap, bias, s_aux)

    if cu_seq_lens_q is None:
        out = attend(query, key, value, attention_mask)
    else:
        out = _packed(attend, query, key, value, cu_seq_lens_q, causal)
    return out.transpose(1, 2).contiguous(), None


def mask(
    *,
    attention_mask: Tensor | None = None,
    q_length: int,
    kv_length: int,
    use_vmap: bool = False,
    q_offset: int | Tensor = 0,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that transformers asks for: none for plain causal attention, else [B, 1, T, Tk] of booleans.

    `local_size` is a window or a chunk (Llama 4), which are told apart by the mask alone: a row longer than that gets
    one. Packed rows, for which transformers forbids the skip, get none: `cu_seqlens` and the layer's window say it all.
    A single query, as in decoding, needs none but for padding while it sees all that the cache has kept.
    """
    if q_length == 1 and not use_vmap and not torch.is_tensor(q_offset):
        begin = kwargs.get("kv_offset", 0)
        if attention_mask is None and _sees_all(q_offset, **kwargs):
            return None
        is_known = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
        if attention_mask is not None and is_known and attention_mask.shape[-1] >= begin + kv_length:
            return attention_mask[:, None, None, begin : begin + kv_length]
    plain = attention_mask is None and not use_vmap and not torch.is_tensor(q_offset) and q_offset == 0
    is_local = local_size is not None and kv_length > local_size and allow_is_causal_skip
    if plain and q_length == kv_length and not is_local:
        return None
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    result: Tensor | None = sdpa_mask(
        attention_mask=attention_mask,
        q_length=q_length,
        kv_length=kv_length,
        use_vmap=use_vmap,
        q_offset=q_offset,
        local_size=local_size,
        **kwargs,
    )
    return result


def _sees_all(
    position: int, mask_function: Callable[..., Tensor] = causal_mask_function, kv_offset: int = 0, **_: Any
) -> bool:
    """Whether the query at `position` sees every key of a row without padding.

    What it sees ends with itself and has no gap, be it a window, a chunk or everything: so the first key tells.
    """
    if mask_function is causal_mask_function:
        return True
    zero = torch.tensor(0)
    return bool(mask_function(zero, zero, torch.tensor(position), torch.tensor(kv_offset)))


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


def _packed(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, causal: bool
) -> Tensor:
    """[1, H, T, D] from packed [1, H, T, D], [1, K, T, D] twice.

    Samples of about one length share a call: they are gathered into [samples, H, length, D], the shorter ones filled up
    behind their end, where causal attention never looks and a mask keeps other attention from looking. Kernels see a
    few shapes and a few calls, not one a sample.
    """
    layout = _layout_of(cu_seqlens, query.shape[2], query.device, causal)
    rows = [t[0].transpose(0, 1) for t in (query, key, value)]
    if layout.gather is not None:
        rows = [_reordered(t, layout.gather, layout.inverse, None) for t in rows]
    sizes = [count * length for count, length in layout.groups]
    parts = []
    splits = (torch.split(t, sizes) for t in rows)
    for (count, length), seen, *group in zip(layout.groups, layout.masks, *splits, strict=True):
        # [samples * length, H, D] -> [samples, H, length, D], a view.
        out = attend(*(t.unflatten(0, (count, length)).transpose(1, 2) for t in group), seen)
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


def _behind(prefix: Tensor, rows: Tensor) -> Tensor:
    """[B, K, n + Tk, D]: the prefix [K, n, D] in front of each sample's rows [B, K, Tk, D]."""
    return torch.cat([prefix.to(rows.dtype).expand(rows.shape[0], -1, -1, -1), rows], dim=2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout: float, causal: bool) -> Tensor:
    if is_widened(q):

        def wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _sdpa(q.float(), k.float(), v.float(), mask, scale, dropout, causal).to(q.dtype)

        # Kept in 16 bits for backward, which makes the float32 tensors again.
        out: Tensor = checkpoint(wide, q, k, v, use_reentrant=False) if torch.is_grad_enabled() else wide(q, k, v)
        return out
    causal = causal and mask is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=causal, enable_gqa=grouped
    )


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    causal: bool,
    softcap: float | None,
    position_bias: Tensor | None,
    s_aux: Tensor | None,
) -> Tensor:
    """The formula itself, for what the fused kernels do not know: soft-capping, sinks, position biases."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if mask is None and causal and q.shape[2] > 1:
        mask = _band(q.shape[2], k.shape[2], k.shape[2], q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sink = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1, dtype=torch.float32)[..., :-1]
    else:
        weights = scores.softmax(-1, dtype=torch.float32)
    return F.dropout(weights.to(v.dtype), dropout, training=dropout > 0) @ v


def _band(q_length: int, kv_length: int, window: int, device: torch.device) -> Tensor:
    """[1, 1, T, Tk]: True where a query sees a key, itself and the window - 1 positions before it."""
    behind = (
        torch.arange(q_length, device=device)[:, None] + (kv_length - q_length) - torch.arange(kv_length, device=device)
    )
    return ((behind >= 0) & (behind < window))[None, None]


def register() -> None:
    """Make `attn_implementation="lorica"` known to transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
