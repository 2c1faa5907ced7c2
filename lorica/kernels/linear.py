"""The linear product, also where the CPU has no 16-bit arithmetic: one door, `linear`.

A CPU without AVX-512 BF16 or AMX multiplies bfloat16 matrices by a plain loop: 13 GFLOP/s forward and 2 backward where
its float32 reaches 80 (two cores with AVX2). There the operands are widened to float32 for the product alone and the
result is rounded back, so a bfloat16 base keeps its size in memory and trains at the speed of float32. What is kept for
backward stays in 16 bits. Few rows, as in decoding, go through `ops.linear_16bit`, which reads the weight once and
widens it in registers.

What it gives up: for the moment of a product of many rows its operands exist in float32 as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_IS_STAND_IN = ContextVar("_IS_STAND_IN", default=False)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x: x [..., in], weight [out, in] of any floating dtype, bias [out]."""
    if is_widened(x):
        if not torch.is_grad_enabled():
            return _product(x, weight, bias)
        result: Tensor = _WidenedLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def is_widened(x: Tensor) -> bool:
    """Whether products of `x` are computed in float32 although `x` is not: its CPU has no arithmetic for its dtype."""
    narrow = x.dtype.itemsize == 2 and x.device.type == "cpu" and not cpu_computes(x.dtype)
    return narrow and not _IS_STAND_IN.get()


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


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None and weight.dtype == x.dtype:
        from lorica.kernels import ops  # which has its CPU kernels from cpu.py, and that asks this module

        few: Tensor = ops.linear_16bit(x, weight)
        return few
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
        rows = grad.reshape(-1, grad.shape[-1])
        grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype) if needs_weight else None
        return grad_x, grad_weight, rows.sum(0).to(ctx.bias_dtype) if needs_bias else None


class Linear(nn.Linear):
    """nn.Linear through `linear`. It shares the parameters of the layer that it is made from."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
