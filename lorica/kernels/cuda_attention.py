"""Attention of packed batches on CUDA, by the flash attention that torch brings: `torch.nn.attention.varlen`.

It takes the samples where they lie, so none is copied or filled up to the length of another, shares keys among heads,
and knows causal windows. From torch 2.11 on it has all of that; before, and for what it does not do, the samples go
through scaled_dot_product_attention in groups of one length (`attention.py`).

What it gives up: float32, dropout, prefixes, head sizes that are no multiple of 8, values of another size than keys.

State: which calls it gets, and their arguments, are tested by a stand-in; not yet run on a GPU.

Shapes: H heads, K key-value heads (K divides H), T tokens of all samples, D head size.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attend` is there for these."""
    size = query.shape[3]
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and key.dtype == value.dtype == query.dtype
        and size == value.shape[3]
        and size % 8 == 0
        # Between, the backward of FlashAttention 2 asks for more shared memory than consumers' GPUs have.
        and (size <= 192 or 224 < size <= 256)
        and _has_flash(query.device)
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool,
    cu_seqlens: Tensor,
    window: int | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of each sample, [1, H, T, D] in the dtype of the query, differentiable.

    Args:
        query: [1, H, T, D]; key, value: [1, K, T, D]; bfloat16 or float16.
        cu_seqlens: [samples + 1] borders, on any device.
        window: how many positions a causal query sees, its own included.
    """
    borders, longest, num_tokens = _borders(cu_seqlens, query.device)
    if num_tokens != query.shape[2]:
        raise ValueError(f"cu_seqlens cover {num_tokens} tokens, but the packed batch has {query.shape[2]}.")
    # Its window counts the positions before a query's own; a shorter sample is no window at all.
    before = -1 if window is None or window >= longest else window - 1
    rows = [t[0].transpose(0, 1) for t in (query, key, value)]
    varlen = _varlen_attn()
    assert varlen is not None
    out: Tensor = varlen(
        *(t if t.stride(2) == 1 else t.contiguous() for t in rows), borders, borders, longest, longest,
        scale=scale, window_size=(before, 0) if causal else (-1, -1), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(0, 1)[None]


@cache
def _varlen_attn() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"scale", "window_size", "enable_gqa"} <= known.keys() else None


@cache
def _has_flash(device: torch.device) -> bool:
    if _varlen_attn() is None or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


# All layers of a forward pass have the same borders.
_last: tuple[weakref.ref[Tensor], tuple[Tensor, int, int]] | None = None


def _borders(cu_seqlens: Tensor, device: torch.device) -> tuple[Tensor, int, int]:
    """The borders on the device, int32; the longest sample; and how many tokens there are."""
    global _last
    if _last is not None and _last[0]() is cu_seqlens and _last[1][0].device == device:
        return _last[1]
    ends = np.array(cu_seqlens.tolist(), np.int64)
    found = cu_seqlens.to(device, torch.int32), int(np.diff(ends).max()), int(ends[-1])
    _last = (weakref.ref(cu_seqlens), found)
    return found
