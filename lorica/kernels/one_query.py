"""Attention of one query a row in C (`csrc/one_query.c`): a decoded token's, over the keys in a cache.

torch's attention for CPUs is made for many queries; for one it repeats shared keys or computes in the dtype of a
processor that has no arithmetic for it. This reads keys and values once, whatever their strides, and knows masks,
soft-capping and sinks.

What it gives up: derivatives, prefixes and position biases stay with `attention.py`.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorica.kernels.build import FLAGS, TYPES, library
from lorica.kernels.linear import is_unwatched

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class _OneQuery(ctypes.Structure):
    """csrc/one_query.c's `OneQuery`."""

    _fields_ = (
        ("type", _I), ("threads", _I), ("rows", _L), ("heads", _L), ("key_heads", _L), ("keys", _L), ("size", _L),
        ("value_size", _L), ("scale", _F), ("softcap", _F), ("query", _P), ("key", _P), ("value", _P),
        ("key_row", _L), ("key_head", _L), ("key_token", _L),
        ("value_row", _L), ("value_head", _L), ("value_token", _L),
        ("mask", _P), ("mask_row", _L), ("sinks", _P), ("out", _P),
    )  # fmt: skip


@cache
def compiled(flags: tuple[str, ...] = FLAGS) -> Any:
    """The C function, or None where it cannot be."""
    built = library("one_query.c", flags)
    if built is None:
        return None
    built.lorica_one_query.argtypes = (ctypes.POINTER(_OneQuery),)
    return built.lorica_one_query


def takes(query: Tensor, key: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend` is there for these: decoding on a CPU, with a mask of booleans that all heads share, or none."""
    return (
        query.shape[2] == 1
        and is_unwatched(query)
        and query.device.type == "cpu"
        and query.dtype in TYPES
        and key.dtype is query.dtype
        and (mask is None or (mask.dtype is torch.bool and mask.shape[1:3] == (1, 1)))
        and compiled() is not None
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v, [B, 1, H, V], of query [B, H, 1, D], key [B, K, Tk, D], value [B, K, Tk, V], in float32.

    Args:
        mask: [1 or B, 1, 1, Tk], True where the query sees a key. A row that sees none gets zeros.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: a logit a head that takes part in the softmax and has no value, [H].
    """
    rows, heads, _, size = query.shape
    query = query.contiguous()
    key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (key, value))
    if mask is not None:
        mask = mask.expand(rows, 1, 1, key.shape[2])
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    out = query.new_empty((rows, 1, heads, value.shape[3]))
    described = _OneQuery(
        TYPES[query.dtype], torch.get_num_threads(), rows, heads, key.shape[1], key.shape[2], size, value.shape[3],
        scale, softcap or 0.0, query.data_ptr(), key.data_ptr(), value.data_ptr(), *key.stride()[:3],
        *value.stride()[:3], None if mask is None else mask.data_ptr(), 0 if mask is None else mask.stride(0),
        None if sinks is None else sinks.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    if not compiled()(ctypes.byref(described)):
        raise MemoryError("lorica_one_query: there is no memory for its scores")
    return out
