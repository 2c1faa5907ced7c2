"""Attention and its gradient in C (`csrc/attention.c`), as one torch operator: what a CPU takes for training.

torch's own kernel for CPUs reaches a quarter of the processor's rate in backward, needs every sample as long as the
others, and has no 16-bit gradient worth the name where the processor has no 16-bit arithmetic. This one takes packed
samples where they lie, keys that several heads share, windows and prefixes, in any floating dtype, and computes in
float32.

What it gives up: masks of any other form, dropout and what `kernels/attention.py` calls explicit are torch's; and on a
processor that multiplies bfloat16 matrices with instructions of its own, float32 is not its fastest.

Shapes: B batch, H heads, K key-value heads (K divides H), T queries, Tk keys, D size of queries and keys, V of values,
n prefix keys.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorica.kernels.build import library
from lorica.kernels.linear import cpu_computes

_FLAGS = ("-march=native", "-fopenmp", "-ffp-contract=fast", "-lm")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_WINDOW = 2**40
_P, _I, _L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Tensor4(ctypes.Structure):
    _fields_ = (("data", _P), ("row", _L), ("head", _L), ("token", _L), ("size", _L))

    @classmethod
    def of(cls, tensor: Tensor) -> _Tensor4:
        """From [B, H, T, D] whose last dimension is contiguous."""
        return cls(tensor.data_ptr(), *tensor.stride()[:3], tensor.shape[3])


class _Attention(ctypes.Structure):
    """csrc/attention.c's `Attention`."""

    _fields_ = (
        ("type", _I), ("causal", _I), ("heads", _L), ("key_heads", _L), ("samples", _L), ("prefix", _L), ("window", _L),
        ("scale", ctypes.c_float), ("borders", _P), ("query", _Tensor4), ("key", _Tensor4),
        ("value", _Tensor4), ("out", _Tensor4), ("grad", _Tensor4), ("grad_query", _Tensor4), ("grad_key", _Tensor4),
        ("grad_value", _Tensor4), ("prefix_key", _P), ("prefix_value", _P), ("grad_prefix_key", _P),
        ("grad_prefix_value", _P), ("log_sum", _P),
    )  # fmt: skip


@cache
def compiled() -> Any:
    """The C library, or None where it cannot be."""
    built = library("attention.c", _FLAGS)
    if built is not None:
        for name in ("lorica_attention", "lorica_attention_backward"):
            getattr(built, name).argtypes = (ctypes.POINTER(_Attention), ctypes.c_int)
    return built


def takes(query: Tensor, key: Tensor, causal: bool) -> bool:
    """Whether `attend` is there for these, and the faster way."""
    return (
        query.device.type == "cpu"
        and query.dtype in _TYPES
        and (query.dtype is torch.float32 or not cpu_computes(query.dtype))
        and query.shape[2] > 0
        and not (causal and key.shape[2] < query.shape[2])
        and compiled() is not None
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    prefix_key: Tensor | None = None,
    prefix_value: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v, [B, H, T, V] in the dtype of the query, differentiable in all tensors; sums in float32.

    Args:
        query: [B, H, T, D]; key: [B, K, Tk, D]; value: [B, K, Tk, V]; float32, bfloat16 or float16.
        causal: a query sees its own position and those before it; the last query stands at the last key.
        cu_seqlens: [samples + 1] borders of packed samples, B = 1 and T = Tk; None: each row is a sample.
        window: how many positions a causal query sees, its own included.
        prefix_key, prefix_value: [K, n, D] and [K, n, V], seen by all queries.
    """
    borders = _borders(cu_seqlens, query.shape[0], query.shape[2], key.shape[2])
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    prefixes: tuple[Tensor | None, Tensor | None] = (None, None)
    if prefix_key is not None and prefix_value is not None:
        prefixes = prefix_key.to(key.dtype).contiguous(), prefix_value.to(key.dtype).contiguous()
    limit = window if causal and window is not None else _NO_WINDOW
    out: Tensor = torch.ops.lorica.attention(query, key, value, borders, *prefixes, scale, causal, limit)[0]
    return out


# All layers of a forward pass have the same borders.
_last: tuple[weakref.ref[Tensor], Tensor] | None = None


def _borders(cu_seqlens: Tensor | None, rows: int, num_queries: int, num_keys: int) -> Tensor:
    """int64 [samples, 6]: row, first query, queries, first key, keys, and how many queries come before."""
    global _last
    if cu_seqlens is None:
        row = torch.arange(rows)
        zero, ones = torch.zeros_like(row), torch.ones_like(row)
        return torch.stack([row, zero, ones * num_queries, zero, ones * num_keys, row * num_queries], 1)
    if _last is not None and _last[0]() is cu_seqlens:
        return _last[1]
    ends = np.array(cu_seqlens.tolist(), np.int64)
    starts, lengths = ends[:-1], np.diff(ends)
    if int(lengths.sum()) != num_queries or num_queries != num_keys:
        raise ValueError(f"cu_seqlens cover {int(lengths.sum())} tokens, but the packed batch has {num_queries}.")
    table = torch.from_numpy(np.stack([np.zeros_like(starts), starts, lengths, starts, lengths, starts], 1))
    _last = (weakref.ref(cu_seqlens), table)
    return table


def _described(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    scale: float,
    causal: bool,
    window: int,
) -> _Attention:
    return _Attention(
        type=_TYPES[query.dtype],
        causal=causal,
        heads=query.shape[1],
        key_heads=key.shape[1],
        samples=borders.shape[0],
        prefix=0 if prefix_key is None else prefix_key.shape[1],
        window=window,
        scale=scale,
        borders=borders.data_ptr(),
        query=_Tensor4.of(query),
        key=_Tensor4.of(key),
        value=_Tensor4.of(value),
        out=_Tensor4.of(out),
        prefix_key=None if prefix_key is None else prefix_key.data_ptr(),
        prefix_value=None if prefix_value is None else prefix_value.data_ptr(),
        log_sum=log_sum.data_ptr(),
    )


def _run(name: str, description: _Attention) -> None:
    if not getattr(compiled(), name)(ctypes.byref(description), torch.get_num_threads()):
        raise MemoryError(f"{name}: there is no memory for its blocks")


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    out, log_sum = _fake_forward(query, key, value)
    described = _described(query, key, value, borders, prefix_key, prefix_value, out, log_sum, scale, causal, window)
    _run("lorica_attention", described)
    return out, log_sum


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, heads, tokens = query.shape[:3]
    out = _by_token(query, (rows, heads, tokens, value.shape[3]))
    return out, query.new_empty((rows * tokens, heads), dtype=torch.float32)


def _by_token(like: Tensor, shape: Sequence[int]) -> Tensor:
    """[B, H, T, D], with the heads of a token side by side in memory, as the layers around attention want them."""
    rows, heads, tokens, size = shape
    return like.new_empty((rows, tokens, heads, size)).transpose(1, 2)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = grad.to(query.dtype)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    grads = [_by_token(t, t.shape) for t in (query, key, value)]
    of_prefixes = [torch.empty((borders.shape[0], *_shape(t)), dtype=torch.float32) for t in (prefix_key, prefix_value)]
    described = _described(query, key, value, borders, prefix_key, prefix_value, out, log_sum, scale, causal, window)
    described.grad = _Tensor4.of(grad)
    described.grad_query, described.grad_key, described.grad_value = map(_Tensor4.of, grads)
    described.grad_prefix_key, described.grad_prefix_value = (t.data_ptr() for t in of_prefixes)
    _run("lorica_attention_backward", described)
    in_key, in_value = (t.sum(0).to(key.dtype) for t in of_prefixes)
    return grads[0], grads[1], grads[2], in_key, in_value


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (_by_token(t, t.shape) for t in (query, key, value))
    return q, k, v, key.new_empty(_shape(prefix_key)), key.new_empty(_shape(prefix_value))


def _shape(tensor: Tensor | None) -> tuple[int, ...]:
    """Of a gradient; operators give no None."""
    return (0, 0, 0) if tensor is None else tuple(tensor.shape)


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor borders, Tensor? prefix_key, Tensor? prefix_value{more}, "
    "float scale, bool causal, int window"
)
_LIBRARY = torch.library.Library("lorica", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema, _kernel, _fake in (
    ("attention", f"({_INPUTS.format(more='')}) -> (Tensor, Tensor)", _forward, _fake_forward),
    (
        "attention_backward",
        f"(Tensor grad, {_INPUTS.format(more=', Tensor out, Tensor log_sum')})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
    ),
):
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _kernel, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"lorica::{_name}", _fake, lib=_LIBRARY)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.causal, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _derivative(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, out, log_sum = ctx.saved_tensors
    q, k, v, in_key, in_value = torch.ops.lorica.attention_backward(
        grad, *inputs, out, log_sum, ctx.scale, ctx.causal, ctx.window
    )
    has_prefix = inputs[4] is not None
    return q, k, v, None, in_key if has_prefix else None, in_value if has_prefix else None, None, None, None


torch.library.register_autograd("lorica::attention", _derivative, setup_context=_keep, lib=_LIBRARY)
