"""Attention and its gradient in C (`csrc/attention.c`), as one torch operator: what a CPU takes for training.

torch's own kernel for CPUs reaches a quarter of the processor's rate in backward, needs every sample as long as the
others, and has no 16-bit gradient worth the name where the processor has no 16-bit arithmetic. This one takes packed
samples where they lie, keys that several heads share, windows and prefixes, in any floating dtype, and computes in
float32. Where the processor multiplies bfloat16 matrices itself (AMX, AVX-512 BF16) there is a second kernel that does
(`csrc/attention_bfloat16.c`): it is used only after a small case has come out as from the first.

What it gives up: masks of any other form, dropout and what `kernels/attention.py` calls explicit are torch's, and so is
float16 where the processor has arithmetic for it.

Shapes: B batch, H heads, K key-value heads (K divides H), T queries, Tk keys, D size of queries and keys, V of values,
n prefix keys.
"""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorica.kernels.build import FLAGS, TYPES, library
from lorica.kernels.linear import cpu_computes

# Of attention_bfloat16.c, by what the processor has to have; the faster first.
_TILE_FLAGS = {"amx_bf16": ("-DAMX", "-mamx-tile", "-mamx-bf16"), "avx512_bf16": ("-mavx512bf16",)}
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
    return _loaded("attention.c", FLAGS)


@cache
def tiled() -> Any:
    """The C library that has the processor multiply bfloat16, or None where it cannot, may not or does it wrong."""
    able = torch.cpu.get_capabilities()
    for feature, flags in _TILE_FLAGS.items():
        built = _loaded("attention_bfloat16.c", (*FLAGS, *flags)) if able.get(feature) else None
        if built is not None and built.lorica_tiles_are_lent():
            if _is_right(built):
                return built
            warnings.warn(
                f"attention through {feature} gives wrong numbers on this processor, so it is not used. This is a "
                "fault in Lorica or in the machine: please report it with the processor's name.",
                RuntimeWarning,
                stacklevel=2,
            )
    return None


def _loaded(source: str, flags: tuple[str, ...]) -> Any:
    built = library(source, flags)
    if built is not None:
        for name in ("lorica_attention", "lorica_attention_backward"):
            getattr(built, name).argtypes = (ctypes.POINTER(_Attention), ctypes.c_int)
    return built


def _is_right(built: Any) -> bool:
    """Whether a small case of bfloat16 comes out as the float32 kernel computes it, but for roundings."""
    pairs = zip(_trial(built), _trial(compiled()), strict=True)
    return all(bool(abs(mine - theirs).max() < 0.02 * abs(theirs).max()) for mine, theirs in pairs)


def _trial(built: Any) -> list[npt.NDArray[np.float32]]:
    """Output and gradients of two packed samples behind a prefix. In numpy: torch may be in a mode without numbers."""
    tokens, heads, size, prefix = 150, 2, 40, 3
    random = np.random.default_rng(0)

    def halves(*shape: int) -> npt.NDArray[np.uint16]:
        return (random.standard_normal(shape, np.float32).view(np.uint32) >> 16).astype(np.uint16)

    def described(array: npt.NDArray[np.uint16]) -> _Tensor4:
        return _Tensor4(array.ctypes.data, 0, size, array.shape[1] * size, size)

    borders = np.array([[0, 0, 20, 0, 20, 0], [0, 20, 130, 20, 130, 20]])
    inputs = {
        name: halves(tokens, 1 if name in ("key", "value") else heads, size)
        for name in ("grad", "query", "key", "value")
    }
    results = {
        name: np.zeros_like(inputs[like])
        for name, like in zip(("out", "grad_query", "grad_key", "grad_value"), inputs, strict=True)
    }
    prefixes = [halves(1, prefix, size) for _ in range(2)]
    grads = [np.zeros((len(borders), 1, prefix, size), np.float32) for _ in range(2)]
    log_sum = np.zeros((tokens, heads), np.float32)
    attention = _Attention(
        type=TYPES[torch.bfloat16],
        causal=1,
        heads=heads,
        key_heads=1,
        samples=len(borders),
        prefix=prefix,
        window=100,
        scale=size**-0.5,
        borders=borders.ctypes.data,
        **{name: described(array) for name, array in (inputs | results).items()},
        prefix_key=prefixes[0].ctypes.data,
        prefix_value=prefixes[1].ctypes.data,
        grad_prefix_key=grads[0].ctypes.data,
        grad_prefix_value=grads[1].ctypes.data,
        log_sum=log_sum.ctypes.data,
    )
    if not (built.lorica_attention(attention, 1) and built.lorica_attention_backward(attention, 1)):
        raise MemoryError("there is no memory for a small case of attention")
    return [*((array.astype(np.uint32) << 16).view(np.float32) for array in results.values()), *grads, log_sum]


def takes(query: Tensor, key: Tensor, causal: bool) -> bool:
    """Whether `attend` is there for these, and the faster way."""
    return (
        query.device.type == "cpu"
        and query.shape[2] > 0
        and not (causal and key.shape[2] < query.shape[2])
        and _computes(query.dtype)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _computes(dtype: torch.dtype) -> bool:
    if dtype not in TYPES or compiled() is None:
        return False
    by_torch = dtype is not torch.float32 and cpu_computes(dtype)
    return not by_torch or (dtype is torch.bfloat16 and tiled() is not None)


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


class _Inputs(NamedTuple):
    """The operator's, in the order of its schema."""

    query: Tensor
    key: Tensor
    value: Tensor
    borders: Tensor
    prefix_key: Tensor | None
    prefix_value: Tensor | None
    scale: float
    causal: bool
    window: int

    def described(self, out: Tensor, log_sum: Tensor) -> _Attention:
        return _Attention(
            type=TYPES[self.query.dtype],
            causal=self.causal,
            heads=self.query.shape[1],
            key_heads=self.key.shape[1],
            samples=self.borders.shape[0],
            prefix=_shape(self.prefix_key)[1],
            window=self.window,
            scale=self.scale,
            borders=self.borders.data_ptr(),
            query=_Tensor4.of(self.query),
            key=_Tensor4.of(self.key),
            value=_Tensor4.of(self.value),
            out=_Tensor4.of(out),
            prefix_key=None if self.prefix_key is None else self.prefix_key.data_ptr(),
            prefix_value=None if self.prefix_value is None else self.prefix_value.data_ptr(),
            log_sum=log_sum.data_ptr(),
        )


def _run(name: str, description: _Attention) -> None:
    built = tiled() if description.type == TYPES[torch.bfloat16] else None
    if not getattr(built or compiled(), name)(ctypes.byref(description), torch.get_num_threads()):
        raise MemoryError(f"{name}: there is no memory for its blocks")


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    out, log_sum = _fake_forward(*args)
    _run("lorica_attention", _Inputs(*args).described(out, log_sum))
    return out, log_sum


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, heads, tokens = query.shape[:3]
    out = _by_token(query, (rows, heads, tokens, value.shape[3]))
    return out, query.new_empty((rows * tokens, heads), dtype=torch.float32)


def _by_token(like: Tensor, shape: Sequence[int]) -> Tensor:
    """[B, H, T, D], with the heads of a token side by side in memory, as the layers around attention want them."""
    rows, heads, tokens, size = shape
    return like.new_empty((rows, tokens, heads, size)).transpose(1, 2)


def _shape(prefix: Tensor | None) -> tuple[int, ...]:
    """Of a prefix and of its gradient; operators give no None."""
    return (0, 0, 0) if prefix is None else tuple(prefix.shape)


def _backward(grad: Tensor, out: Tensor, log_sum: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs(*args)
    grad = grad.to(inputs.query.dtype)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    *grads, in_key, in_value = _fake_backward(grad, out, log_sum, *args)
    # Of each sample.
    samples = [in_key.new_empty((len(inputs.borders), *t.shape), dtype=torch.float32) for t in (in_key, in_value)]
    described = inputs.described(out, log_sum)
    described.grad = _Tensor4.of(grad)
    described.grad_query, described.grad_key, described.grad_value = map(_Tensor4.of, grads)
    described.grad_prefix_key, described.grad_prefix_value = (t.data_ptr() for t in samples)
    _run("lorica_attention_backward", described)
    return *grads, *(t.sum(0).to(inputs.key.dtype) for t in samples)


def _fake_backward(grad: Tensor, out: Tensor, log_sum: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs(*args)
    grads = (_by_token(t, t.shape) for t in inputs[:3])
    return *grads, *(inputs.key.new_empty(_shape(t)) for t in (inputs.prefix_key, inputs.prefix_value))


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor borders, Tensor? prefix_key, Tensor? prefix_value, "
    "float scale, bool causal, int window"
)
_LIBRARY = torch.library.Library("lorica", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _kernel, _fake in (
    (f"attention({_INPUTS}) -> (Tensor, Tensor)", _forward, _fake_forward),
    (
        f"attention_backward(Tensor grad, Tensor out, Tensor log_sum, {_INPUTS})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
    ),
):
    _name = _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _kernel, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"lorica::{_name}", _fake, lib=_LIBRARY)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.causal, ctx.window = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _derivative(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.lorica.attention_backward(grad, *saved, ctx.scale, ctx.causal, ctx.window)
    has_prefix = saved[-1] is not None
    return *grads[:3], None, *(grads[3:] if has_prefix else (None, None)), None, None, None


torch.library.register_autograd("lorica::attention", _derivative, setup_context=_keep, lib=_LIBRARY)
