"""The linear product, also where the CPU has no 16-bit arithmetic: one door, `linear`.

A CPU without AVX-512 BF16 or AMX multiplies bfloat16 matrices by a plain loop: 13 GFLOP/s forward and 2 backward where
its float32 reaches 80 (two cores with AVX2). There the operands are widened to float32 for the product alone and the
result is rounded back, so a bfloat16 base keeps its size in memory and trains at the speed of float32. What is kept for
backward stays in 16 bits.

In inference mode few rows, as in decoding, go through `ops.linear_rows` in every dtype: it reads the weight once, as
fast as memory gives it, and widens it in registers. Libraries are made for many rows.

What it gives up: for the moment of a product of many rows its operands exist in float32 as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D as PlainConv1D

from lorica.kernels import rows
from lorica.kernels.build import TYPES

_IS_STAND_IN = ContextVar("_IS_STAND_IN", default=False)
_PART = 1 << 20
"""Elements of a weight that are widened at once without a gradient. As large as they come, they would leave the caches,
and the memory for them be taken from the system and given back each time: three times as slow."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x: x [..., in], weight [out, in] of any floating dtype, bias [out]."""
    if _is_for_rows(x, weight):
        return rows.linear_rows(x, weight, bias) if is_unwatched(x) else _watched_rows(x, weight, bias)
    if is_widened(x):
        if not torch.is_grad_enabled():
            return _product(x, weight, bias)
        result: Tensor = _WidenedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    bias = None if bias is None else bias.to(x.dtype)
    if weight.dtype.itemsize < x.dtype.itemsize and weight.numel() > _PART and not torch.is_grad_enabled() and x.is_cpu:
        return _in_parts(x, weight, bias)
    return F.linear(x, weight.to(x.dtype), bias)


@cache
def most_rows(dtype: torch.dtype) -> int:
    """Up to how many rows of this dtype `linear_rows` is the faster way on a CPU (measured, benchmarks/decode.py).

    Where the processor has arithmetic of its own for 16 bits, only while reading the weight is all that counts.
    """
    if dtype not in TYPES or rows.compiled() is None:
        return 0
    if dtype is torch.float32:
        return 64
    return 4 if cpu_computes(dtype) else 64


def gated(x: Tensor, layers: Sequence[nn.Module], act: str | None) -> Tensor | None:
    """A gated MLP's output where it is for `rows.gated_rows`: few rows, and plain layers (gate, up, down) in front."""
    if not (act in rows.ACTS and is_unwatched(x) and all(type(m) is Linear and _is_alone(m) for m in layers)):
        return None
    gate, up, down = (m._parameters["weight"] for m in layers)
    assert gate is not None and up is not None and down is not None
    fits = gate.dtype is up.dtype is down.dtype and gate.is_contiguous() and up.is_contiguous() and down.is_contiguous()
    return rows.gated_rows(x, gate, up, down, str(act)) if fits and _is_for_rows(x, gate) else None


def is_low_rank_for_rows(y: Tensor, x: Tensor, *weights: Tensor) -> bool:
    """Whether what a low-rank adapter of `weights` adds to y is for `rows.add_low_rank`."""
    return (
        is_unwatched(x)
        and y.dtype is x.dtype
        and y.is_contiguous()
        and all(t.dtype is torch.float32 and t.is_contiguous() for t in weights)
        and _is_for_rows(x, weights[0])
    )


def _is_alone(layer: nn.Module) -> bool:
    """Whether nothing but its weight takes part in its output."""
    return layer._parameters["bias"] is None and not layer._forward_hooks and not layer._forward_pre_hooks


def is_unwatched(x: Tensor) -> bool:
    """Whether a function of ours may be called without torch's dispatcher: nothing records, traces or simulates."""
    return torch.is_inference_mode_enabled() and type(x) is Tensor and not torch.compiler.is_compiling()


def _is_for_rows(x: Tensor, weight: Tensor) -> bool:
    return (
        torch.is_inference_mode_enabled()
        and 0 < x.numel() <= x.shape[-1] * most_rows(x.dtype)
        and weight.dtype in TYPES
        and x.is_cpu
        and not is_stand_in()
    )


def is_widened(x: Tensor) -> bool:
    """Whether products of `x` are computed in float32 although `x` is not: its CPU has no arithmetic for its dtype."""
    narrow = x.dtype.itemsize == 2 and x.device.type == "cpu" and not cpu_computes(x.dtype)
    return narrow and not is_stand_in()


def is_stand_in() -> bool:
    """Whether the CPU is pretending to be a GPU (`never_widened`), so that its own kernels do not count."""
    return _IS_STAND_IN.get()


@contextmanager
def never_widened() -> Iterator[None]:
    """Inside, the CPU's products are taken as a GPU would compute them: for a rehearsal that stands for one."""
    token = _IS_STAND_IN.set(True)
    try:
        yield
    finally:
        _IS_STAND_IN.reset(token)


@cache
def cpu_computes(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of this dtype with instructions of their own."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def _watched_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from lorica.kernels import ops  # which has its CPU kernels from cpu.py, and that asks this module

    result: Tensor = ops.linear_rows(x, weight, bias)
    return result


def _in_parts(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, a few rows of the narrow W widened after the others."""
    # In parts of whole tiles the library's sums are those of the whole.
    flat, step = x.reshape(-1, x.shape[-1]), max(64, _PART // x.shape[-1] // 64 * 64)
    out, wide = x.new_empty(len(flat), len(weight)), x.new_empty(step, x.shape[-1])
    for begin in range(0, len(weight), step):
        rows_of = slice(begin, min(begin + step, len(weight)))
        part = wide[: rows_of.stop - begin].copy_(weight[rows_of]).t()
        if bias is None:
            torch.mm(flat, part, out=out[:, rows_of])
        else:
            torch.addmm(bias[rows_of], flat, part, out=out[:, rows_of])
    return out.view(*x.shape[:-1], len(weight))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


class _WidenedLinear(torch.autograd.Function):
    """x W^T + b in float32, kept and given out in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].float()
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = (grad @ weight.float()).to(grads[0].dtype) if needs_x else None
        flat = grad.reshape(-1, grad.shape[-1])
        grad_weight = (flat.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype) if needs_weight else None
        return grad_x, grad_weight, flat.sum(0).to(ctx.bias_dtype) if needs_bias else None


class Linear(nn.Linear):
    """nn.Linear through `linear`. It shares the parameters of the layer that it is made from."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        # Not `self.weight`: finding parameters so takes a microsecond, which counts in decoding.
        held = self._parameters
        return linear(input, held["weight"], held["bias"])  # type: ignore[arg-type]


class Conv1D(PlainConv1D):  # type: ignore[misc]
    """transformers' Conv1D, W [in, out] and b [out], through `linear`. It shares the bias of the layer it is made from,
    and its weight is written to memory as [out, in], where products of few rows read it along the inputs.
    """

    def __init__(self, layer: PlainConv1D) -> None:
        nn.Module.__init__(self)
        self.nf, self.nx, self.bias = layer.nf, layer.nx, layer.bias
        weight = layer.weight.detach().t().contiguous().t()
        self.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.t(), self.bias)
