"""Attention and its gradient in C (`csrc/attention.c`), as one torch operator: what a CPU takes for training.

torch's own kernel for CPUs reaches a quarter of the processor's rate in backward, needs every sample as long as the
others, and has no 16-bit gradient worth the name where the processor has no 16-bit arithmetic. This one takes packed
samples where they lie, keys that several heads share, windows and prefixes, in any floating dtype, and computes in
float32. Where the processor multiplies bfloat16 matrices itself (AMX, AVX-512 BF16) there is a second kernel that does
(`csrc/attention_bfloat16.c`); see `attention_library.py`.

Dropout keeps no mask: a weight's fate is a function of a seed, the head, the query and the key, and backward draws it
again. The seed comes from torch's default generator, so its state repeats a run; which weights are dropped depends
neither on the number of threads nor on the dtype or the processor.

What it gives up: masks of any other form and position biases are torch's, and so is plain attention in a 16-bit type
that the processor computes in but the second kernel does not.

Shapes: B batch, H heads, K key-value heads (K divides H), T queries, Tk keys, D size of queries and keys, V of values,
n prefix keys.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lorica.kernels.attention_library import Attention, Tensor4, compiled, tiled
from lorica.kernels.build import TYPES
from lorica.kernels.linear import cpu_computes

_NO_WINDOW = 2**40


def takes(query: Tensor, key: Tensor, causal: bool, *, plain: bool = True) -> bool:
    """Whether `attend` is there for these, and the faster way; plain: without dropout, soft-capping and sinks."""
    return (
        query.device.type == "cpu"
        and query.shape[2] > 0
        and not (causal and key.shape[2] < query.shape[2])
        and _computes(query.dtype, plain)
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _computes(dtype: torch.dtype, plain: bool) -> bool:
    if dtype not in TYPES or compiled() is None:
        return False
    if not plain:
        return True  # torch has [T, Tk] matrices for all of that, in any dtype
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
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale q k^T) v, [B, H, T, V] in the dtype of the query, differentiable in all tensors; sums in float32.

    Args:
        query: [B, H, T, D]; key: [B, K, Tk, D]; value: [B, K, Tk, V]; float32, bfloat16 or float16.
        causal: a query sees its own position and those before it; the last query stands at the last key.
        cu_seqlens: [samples + 1] borders of packed samples, B = 1 and T = Tk; None: each row is a sample.
        window: how many positions a causal query sees, its own included.
        prefix_key, prefix_value: [K, n, D] and [K, n, V], seen by all queries.
        softcap: scores become softcap * tanh(scores / softcap).
        sinks: a logit a head that takes part in the softmax and has no value, [H].
        dropout: the probability that a weight becomes zero; the others are divided by 1 - dropout. Which do is drawn
            from torch's default generator.
    """
    borders = _borders(cu_seqlens, query.shape[0], query.shape[2], key.shape[2])
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    prefixes: tuple[Tensor | None, Tensor | None] = (None, None)
    if prefix_key is not None and prefix_value is not None:
        prefixes = prefix_key.to(key.dtype).contiguous(), prefix_value.to(key.dtype).contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    seed = torch.randint(2**63 - 1, ()) if dropout else None
    limit = window if causal and window is not None else _NO_WINDOW
    out: Tensor = torch.ops.lorica.attention(
        query, key, value, borders, *prefixes, sinks, seed, scale, softcap or 0.0, dropout, causal, limit
    )[0]
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
    sinks: Tensor | None
    seed: Tensor | None
    scale: float
    softcap: float
    dropout: float
    causal: bool
    window: int

    def described(self, out: Tensor, log_sum: Tensor) -> Attention:
        return Attention(
            type=TYPES[self.query.dtype],
            causal=self.causal,
            heads=self.query.shape[1],
            key_heads=self.key.shape[1],
            samples=self.borders.shape[0],
            prefix=_shape(self.prefix_key)[1],
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            dropout=self.dropout,
            seed=_place(self.seed),
            borders=self.borders.data_ptr(),
            query=Tensor4.of(self.query),
            key=Tensor4.of(self.key),
            value=Tensor4.of(self.value),
            out=Tensor4.of(out),
            prefix_key=_place(self.prefix_key),
            prefix_value=_place(self.prefix_value),
            sinks=_place(self.sinks),
            log_sum=log_sum.data_ptr(),
        )


def _place(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _run(name: str, description: Attention) -> None:
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
    *grads, in_key, in_value, _ = _fake_backward(grad, out, log_sum, *args)
    # Of each sample, and of each query.
    samples = [in_key.new_empty((len(inputs.borders), *t.shape), dtype=torch.float32) for t in (in_key, in_value)]
    in_sinks = log_sum.new_empty((0, 0) if inputs.sinks is None else log_sum.shape)
    described = inputs.described(out, log_sum)
    described.grad = Tensor4.of(grad)
    described.grad_query, described.grad_key, described.grad_value = map(Tensor4.of, grads)
    described.grad_prefix_key, described.grad_prefix_value = (t.data_ptr() for t in samples)
    described.grad_sinks = None if inputs.sinks is None else in_sinks.data_ptr()
    _run("lorica_attention_backward", described)
    return *grads, *(t.sum(0).to(inputs.key.dtype) for t in samples), in_sinks.sum(0)


def _fake_backward(grad: Tensor, out: Tensor, log_sum: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = _Inputs(*args)
    grads = (_by_token(t, t.shape) for t in inputs[:3])
    in_prefixes = (inputs.key.new_empty(_shape(t)) for t in (inputs.prefix_key, inputs.prefix_value))
    return *grads, *in_prefixes, log_sum.new_empty(0 if inputs.sinks is None else log_sum.shape[1])


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor borders, Tensor? prefix_key, Tensor? prefix_value, "
    "Tensor? sinks, Tensor? seed, float scale, float softcap, float dropout, bool causal, int window"
)
_LIBRARY = torch.library.Library("lorica", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _kernel, _fake in (
    (f"attention({_INPUTS}) -> (Tensor, Tensor)", _forward, _fake_forward),
    (
        f"attention_backward(Tensor grad, Tensor out, Tensor log_sum, {_INPUTS})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _backward,
        _fake_backward,
    ),
):
    _name = _LIBRARY.define(_schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _kernel, "CPU")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _fake, "Meta")  # type: ignore[no-untyped-call]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given = _Inputs(*inputs)
    ctx.save_for_backward(*output, *given[:8])
    ctx.options = given[8:]
    ctx.mark_non_differentiable(output[1])


def _derivative(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *_, prefix_key, _, sinks, _ = saved = ctx.saved_tensors
    grads = torch.ops.lorica.attention_backward(grad, *saved, *ctx.options)
    in_prefixes = (None, None) if prefix_key is None else grads[3:5]
    return *grads[:3], None, *in_prefixes, None if sinks is None else grads[5], None, *(None for _ in ctx.options)


torch.library.register_autograd("lorica::attention", _derivative, setup_context=_keep, lib=_LIBRARY)
