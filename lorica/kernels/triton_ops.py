"""The blockwise kernels for CUDA, in Triton. Each does what its namesake in `reference.py` does.

They are bound by memory: what matters is that codes are read once, nothing but the result is written, and accesses lie
side by side. In decoding the product reads codes and x and never writes the weight; with many rows the weight is
written out and a matrix product of the vendor's follows.

State: equal to the reference under Triton's interpreter (tests/kernels/test_nf4_triton.py); not yet tuned on a GPU.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from lorica.kernels import reference

quantize_8bit = reference.quantize_8bit  # scales and optimizer states: a few percent of the elements

_FUSED_ROWS = 8
_BYTES = 512  # of codes a program dequantises
_OUTPUTS = 16  # of the product, a program
_INPUTS = 256  # of a row of the weight, at once


@triton.jit
def _quantize_4bit(x, bounds, order, codes, absmax, count, least, BLOCKSIZE: tl.constexpr, HALF: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    even = block * BLOCKSIZE + 2 * tl.arange(0, HALF)
    odd = even + 1
    first = tl.load(x + even, mask=even < count, other=0).to(tl.float32)
    second = tl.load(x + odd, mask=odd < count, other=0).to(tl.float32)
    most = tl.maximum(tl.max(tl.abs(first)), tl.max(tl.abs(second)))
    num_nan = tl.sum((first != first).to(tl.int32)) + tl.sum((second != second).to(tl.int32))
    most = tl.where(num_nan > 0, float("nan"), most)
    divisor = tl.where(most < least, least, most)
    # A last, partial block divides and keeps the lower limit; the others multiply.
    is_partial = (block + 1) * BLOCKSIZE > count
    tl.store(absmax + block, tl.where(is_partial, divisor, most))
    factor = tl.div_rn(1.0, divisor)
    first = tl.where(is_partial, tl.div_rn(first, divisor), first * factor)
    second = tl.where(is_partial, tl.div_rn(second, divisor), second * factor)
    second = tl.where(odd < count, second, 0.0)  # the half byte behind the last element holds the code of 0
    high = tl.zeros((HALF,), tl.int32)
    low = tl.zeros((HALF,), tl.int32)
    for index in tl.static_range(15):
        bound = tl.load(bounds + index)
        high += tl.where(first <= bound, 0, 1)  # NaN lies above all
        low += tl.where(second <= bound, 0, 1)
    packed = tl.load(order + high).to(tl.int32) * 16 + tl.load(order + low).to(tl.int32)
    tl.store(codes + even // 2, packed.to(tl.uint8), mask=even < count)


@triton.jit
def _dequantize_4bit(codes, absmax, codebook, out, count, BLOCKSIZE: tl.constexpr, BYTES: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BYTES
    byte = start + tl.arange(0, BYTES)
    packed = tl.load(codes + byte, mask=2 * byte < count, other=0).to(tl.int32)
    scale = tl.load(absmax + 2 * byte // BLOCKSIZE, mask=2 * byte < count, other=0)
    high, low = tl.load(codebook + packed // 16) * scale, tl.load(codebook + packed % 16) * scale
    index = 2 * start + tl.arange(0, 2 * BYTES)
    tl.store(out + index, tl.interleave(high, low).to(out.dtype.element_ty), mask=index < count)


@triton.jit
def _dequantize_8bit(codes, absmax, codebook, out, count, BLOCKSIZE: tl.constexpr, ELEMENTS: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    code = tl.load(codes + index, mask=index < count, other=0).to(tl.int32)
    scale = tl.load(absmax + index // BLOCKSIZE, mask=index < count, other=0)
    tl.store(out + index, (tl.load(codebook + code) * scale).to(out.dtype.element_ty), mask=index < count)


@triton.jit
def _linear_4bit(
    x, codes, absmax, codebook, y, inputs, outputs, BLOCKSIZE: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr
):
    """One row of x and OUTPUTS rows of the weight, which may begin in the middle of a byte or a block."""
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        column = start + tl.arange(0, INPUTS)[None, :]
        inside = (output < outputs) & (column < inputs)
        index = output * inputs + column
        packed = tl.load(codes + index // 2, mask=inside, other=0).to(tl.int32)
        code = tl.where(index % 2 == 0, packed // 16, packed % 16)
        weight = tl.load(codebook + code) * tl.load(absmax + index // BLOCKSIZE, mask=inside, other=0)
        total += weight * tl.load(x + row * inputs + column, mask=column < inputs, other=0).to(tl.float32)
    result = tl.sum(total, axis=1, keep_dims=True)
    tl.store(y + row * outputs + output, result.to(y.dtype.element_ty), mask=output < outputs)


def quantize_4bit(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    x, count = x.detach().contiguous(), x.numel()
    bounds, order = reference.midpoints(codebook)
    codes = x.new_empty(((count + 1) // 2, 1), dtype=torch.uint8)
    absmax = x.new_empty(-(-count // blocksize), dtype=torch.float32)
    launch(
        _quantize_4bit, (len(absmax),), x, bounds, order, codes, absmax, count, reference.LEAST_ABSMAX,
        BLOCKSIZE=blocksize, HALF=blocksize // 2,
    )  # fmt: skip
    return codes, absmax


def dequantize_4bit(
    codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    if dtype is torch.float64:
        return reference.dequantize_4bit(codes, absmax, codebook, blocksize, shape, dtype)
    out, count = codes.new_empty(shape, dtype=dtype), math.prod(shape)
    launch(
        _dequantize_4bit, (triton.cdiv(count, 2 * _BYTES),), codes.contiguous(), absmax.contiguous(), codebook, out,
        count, BLOCKSIZE=blocksize, BYTES=_BYTES,
    )  # fmt: skip
    return out


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    if dtype is torch.float64:
        return reference.dequantize_8bit(codes, absmax, codebook, blocksize, dtype)
    codes = codes.contiguous()
    out = torch.empty_like(codes, dtype=dtype)
    launch(
        _dequantize_8bit, (triton.cdiv(codes.numel(), 1024),), codes, absmax.contiguous(), codebook, out,
        codes.numel(), BLOCKSIZE=blocksize, ELEMENTS=1024,
    )  # fmt: skip
    return out


def linear_4bit(
    x: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, out_features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    absmax, in_features = reference.scales(absmax, nested, dequantize_8bit), x.shape[-1]
    num_rows = x.numel() // in_features
    if num_rows > _FUSED_ROWS or x.dtype is torch.float64:
        return F.linear(x, dequantize_4bit(codes, absmax, codebook, blocksize, (out_features, in_features), x.dtype))
    y = x.new_empty((*x.shape[:-1], out_features))
    launch(
        _linear_4bit, (triton.cdiv(out_features, _OUTPUTS), num_rows), x.contiguous(), codes.contiguous(),
        absmax.contiguous(), codebook, y, in_features, out_features, BLOCKSIZE=blocksize, OUTPUTS=_OUTPUTS,
        INPUTS=_INPUTS,
    )  # fmt: skip
    return y


def linear_4bit_input_grad(
    grad: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, in_features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    absmax = reference.scales(absmax, nested, dequantize_8bit)
    return grad @ dequantize_4bit(codes, absmax, codebook, blocksize, (grad.shape[-1], in_features), grad.dtype)


def linear_8bit(
    x: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, out_features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    absmax = reference.scales(absmax, nested, dequantize_8bit)
    weight = dequantize_8bit(codes, absmax, codebook, blocksize, x.dtype)
    return F.linear(x, weight.reshape(out_features, x.shape[-1]))


def linear_8bit_input_grad(
    grad: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, in_features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    absmax = reference.scales(absmax, nested, dequantize_8bit)
    return grad @ dequantize_8bit(codes, absmax, codebook, blocksize, grad.dtype).reshape(grad.shape[-1], in_features)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **sizes: int) -> None:
    """On the device where the tensors are, which need not be the current one."""
    tensor = arguments[0]
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            kernel[grid](*arguments, **sizes)
    else:  # under the interpreter
        kernel[grid](*arguments, **sizes)
