"""Linear products of few rows in C (`csrc/rows.c`), for decoding: a token passes through one for each weight.

There every microsecond of Python counts. So `linear_rows` is called as it is where nothing looks on, and as the
operator `torch.ops.lorica.linear_rows` where something may (`ops.py`, `linear.py`); and a gated MLP is one call, as is
what a low-rank adapter adds.

What it gives up: derivatives.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorica.kernels import reference
from lorica.kernels.build import FLAGS, TYPES, library

ACTS = ("silu", "gelu_tanh")
_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float


@cache
def compiled(flags: tuple[str, ...] = FLAGS) -> Any:
    """The C library, or None where it cannot be."""
    built = library("rows.c", flags)
    if built is not None:
        built.lorica_linear_rows.argtypes = (_P, _I, _L, _L, _L, _P, _I, _P, _P, _I)
        built.lorica_gated_rows.argtypes = (_P, _I, _L, _L, _L, _L, _P, _P, _P, _I, _I, _P, _I)
        built.lorica_argmax.argtypes, built.lorica_argmax.restype = (_P, _L, _L, _P, _I), None
        built.lorica_add_low_rank.argtypes = (_P, _I, _L, _L, _L, _L, _L, _P, _P, _P, _F, _F, _P, _I)
    return built


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x: x [..., in], W [out, in], b [out], with sums in float32.

    The weight is read once, and becomes float32 in registers only. Without a compiler, and for dtypes other than
    float32, bfloat16 and float16, the reference answers.
    """
    built, kind, held = compiled(), TYPES.get(x.dtype), TYPES.get(weight.dtype)
    out_features, in_features = weight.shape
    num_rows = x.numel() // in_features if in_features else 0
    if built is None or kind is None or held is None or not num_rows:
        return reference.linear_rows(x, weight, bias)
    x, weight, bias = x.contiguous(), weight.contiguous(), None if bias is None else bias.float().contiguous()
    y = torch.empty(*x.shape[:-1], out_features, dtype=x.dtype)
    is_done = built.lorica_linear_rows(
        x.data_ptr(), kind, num_rows, in_features, out_features, weight.data_ptr(), held,
        None if bias is None else bias.data_ptr(), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if not is_done:
        raise MemoryError("lorica_linear_rows: there is no memory for its rows")
    return y


def argmax(x: Tensor) -> Tensor:
    """The place of the largest number of each row, [rows] int64, the first of several; x [rows, n] float32.

    A NaN counts as the largest. torch's takes longer than some small models for a token.
    """
    built = compiled()
    if built is None or x.dtype is not torch.float32 or not x.is_cpu:
        return x.argmax(-1)
    x, places = x.contiguous(), torch.empty(len(x), dtype=torch.int64)
    built.lorica_argmax(x.data_ptr(), len(x), x.shape[1], places.data_ptr(), torch.get_num_threads())
    return places


def gated_rows(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, act: str) -> Tensor:
    """down (act(gate x) * (up x)) in the dtype of x, and in float32 till then; contiguous weights of one dtype.

    Args:
        x: [..., in]; gate, up: [inner, in]; down: [out, inner]; act: one of `ACTS`.
    """
    x, num_rows = x.contiguous(), x.numel() // x.shape[-1]
    y = torch.empty(*x.shape[:-1], down.shape[0], dtype=x.dtype)
    is_done = compiled().lorica_gated_rows(
        x.data_ptr(), TYPES[x.dtype], num_rows, x.shape[-1], gate.shape[0], down.shape[0], gate.data_ptr(),
        up.data_ptr(), down.data_ptr(), TYPES[gate.dtype], ACTS.index(act), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if not is_done:
        raise MemoryError("lorica_gated_rows: there is no memory for its rows")
    return y


def add_low_rank(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    router: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """y + scale B (g (x) A x), written into y; g is softmax(R x / temperature), or 1 without a router.

    Args:
        y: [rows, out], x: [rows, in], of one dtype, y contiguous. The others are contiguous and float32: lora_a
            [r, in], lora_b [out, N r] with head i in columns i r to (i + 1) r, router [N, in].
    """
    x = x.contiguous()
    (num_rows, in_features), (rank, num_heads) = x.shape, (lora_a.shape[0], 1 if router is None else router.shape[0])
    is_done = compiled().lorica_add_low_rank(
        x.data_ptr(), TYPES[x.dtype], num_rows, in_features, y.shape[1], rank, num_heads, lora_a.data_ptr(),
        lora_b.data_ptr(), None if router is None else router.data_ptr(), temperature, scale, y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if not is_done:
        raise MemoryError("lorica_add_low_rank: there is no memory for its rows")
    return y
