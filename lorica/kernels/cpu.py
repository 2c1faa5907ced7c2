"""The blockwise kernels in C (`csrc/blockwise.c`) as functions of tensors: pointers go through ctypes.

Each function does what its namesake in `reference.py` does, and is replaced by it where there is no compiler, where
LORICA_KERNELS=reference says so, and for dtypes that the C does not know. How many threads work is torch's setting.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.kernels import reference
from lorica.kernels.build import TYPES, library
from lorica.kernels.linear import cpu_computes, is_widened

# Contraction would fuse the steps of the 8-bit search into one rounding, and bitsandbytes does not.
_FLAGS = ("-march=native", "-fopenmp", "-ffp-contract=off", "-lm")

_P, _I, _L = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ARGUMENTS = {
    "lorica_quantize_4bit": (_P, _I, _L, _L, _P, _P, _P, _P, _I),
    "lorica_quantize_8bit": (_P, _I, _L, _L, _P, _P, _P, _I),
    "lorica_dequantize_4bit": (_P, _P, _P, _L, _L, _P, _I, _I),
    "lorica_dequantize_8bit": (_P, _P, _P, _L, _L, _P, _I, _I),
    "lorica_linear_4bit": (_P, _I, _L, _L, _L, _P, _P, _P, _L, _P, _I, _P, _P, _P),
    "lorica_linear_8bit": (_P, _I, _L, _L, _L, _P, _P, _P, _L, _P, _I, _P, _P, _P),
}


@cache
def compiled(flags: tuple[str, ...] = _FLAGS) -> Any:
    """The C library, or None where it cannot be."""
    built = library("blockwise.c", flags)
    if built is not None:
        for name, arguments in _ARGUMENTS.items():
            function = getattr(built, name)
            function.argtypes, function.restype = arguments, _I if "linear" in name else None
    return built


def quantize_4bit(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    built = compiled()
    if built is None or x.dtype not in TYPES:
        return reference.quantize_4bit(x, codebook, blocksize)
    x, count = x.detach().contiguous(), x.numel()
    codes, absmax = _bytes((count + 1) // 2, 1), _floats(-(-count // blocksize))
    bounds, order = reference.midpoints(codebook)
    built.lorica_quantize_4bit(
        x.data_ptr(), TYPES[x.dtype], count, blocksize, bounds.data_ptr(), order.data_ptr(), codes.data_ptr(),
        absmax.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return codes, absmax


def quantize_8bit(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    built = compiled()
    if built is None or x.dtype not in TYPES:
        return reference.quantize_8bit(x, codebook, blocksize)
    x, nearest = x.detach().contiguous(), reference.nearest_codes(codebook)
    codes, absmax = _bytes(*x.shape), _floats(-(-x.numel() // blocksize))
    built.lorica_quantize_8bit(
        x.data_ptr(), TYPES[x.dtype], x.numel(), blocksize, nearest.data_ptr(), codes.data_ptr(), absmax.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return codes, absmax


def dequantize_4bit(
    codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    built = compiled()
    if built is None or dtype not in TYPES:
        return reference.dequantize_4bit(codes, absmax, codebook, blocksize, shape, dtype)
    codes, absmax, codebook = codes.contiguous(), absmax.contiguous(), codebook.contiguous()
    out = torch.empty(shape, dtype=dtype)
    built.lorica_dequantize_4bit(
        codes.data_ptr(), absmax.data_ptr(), codebook.data_ptr(), math.prod(shape), blocksize, out.data_ptr(),
        TYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    built = compiled()
    if built is None or dtype not in TYPES:
        return reference.dequantize_8bit(codes, absmax, codebook, blocksize, dtype)
    codes, absmax, codebook = codes.contiguous(), absmax.contiguous(), codebook.contiguous()
    out = torch.empty(codes.shape, dtype=dtype)
    built.lorica_dequantize_8bit(
        codes.data_ptr(), absmax.data_ptr(), codebook.data_ptr(), codes.numel(), blocksize, out.data_ptr(),
        TYPES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def linear_4bit(
    x: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, out_features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    """With few rows the codes meet x in registers; with many, the weight is written out once for a matrix product."""
    if 0 < x.numel() // x.shape[-1] <= fused_rows(x.dtype):
        return fused_linear_4bit(x, codes, absmax, codebook, blocksize, out_features, *nested)
    shape, dtype, absmax = (out_features, x.shape[-1]), _product_dtype(x), _scales(absmax, nested)
    return F.linear(x.to(dtype), dequantize_4bit(codes, absmax, codebook, blocksize, shape, dtype)).to(x.dtype)


def linear_4bit_input_grad(
    grad: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, in_features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    shape, dtype, absmax = (grad.shape[-1], in_features), _product_dtype(grad), _scales(absmax, nested)
    return (grad.to(dtype) @ dequantize_4bit(codes, absmax, codebook, blocksize, shape, dtype)).to(grad.dtype)


def linear_8bit(
    x: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, out_features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    """With few rows and evenly spaced levels (int8) the codes meet x in registers."""
    if 0 < x.numel() // x.shape[-1] <= min(4, fused_rows(x.dtype)):
        y = _fused("lorica_linear_8bit", x, codes, absmax, codebook, blocksize, out_features, *nested)
        if y is not None:
            return y
    dtype, absmax = _product_dtype(x), _scales(absmax, nested)
    weight = dequantize_8bit(codes, absmax, codebook, blocksize, dtype).reshape(out_features, x.shape[-1])
    return F.linear(x.to(dtype), weight).to(x.dtype)


def linear_8bit_input_grad(
    grad: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, in_features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    dtype, absmax = _product_dtype(grad), _scales(absmax, nested)
    weight = dequantize_8bit(codes, absmax, codebook, blocksize, dtype).reshape(grad.shape[-1], in_features)
    return (grad.to(dtype) @ weight).to(grad.dtype)


def _scales(absmax: Tensor, nested: Sequence[Tensor]) -> Tensor:
    return reference.scales(absmax, nested, dequantize_8bit)


def _product_dtype(x: Tensor) -> torch.dtype:
    """In which dtype a matrix product of x is computed here (kernels/linear.py)."""
    return torch.float32 if is_widened(x) else x.dtype


def fused_rows(dtype: torch.dtype) -> int:
    """Up to how many rows of x `fused_linear_4bit` is the faster way (measured, benchmarks/quant.py); 0: never."""
    if dtype not in TYPES or compiled() is None:
        return 0
    return 16 if cpu_computes(dtype) else 64


def fused_linear_4bit(
    x: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, out_features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    """x W^T without W ever being written out. x float32, bfloat16 or float16; sums are in float32."""
    y = _fused("lorica_linear_4bit", x, codes, absmax, codebook, blocksize, out_features, *nested)
    assert y is not None
    return y


def _fused(
    name: str, x: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, out_features: int,
    *nested: Tensor,
) -> Tensor | None:  # fmt: skip
    """None where the C function says that this is not for it."""
    built, in_features = compiled(), x.shape[-1]
    assert built is not None and x.dtype in TYPES
    x, codes, absmax, codebook = x.contiguous(), codes.contiguous(), absmax.contiguous(), codebook.contiguous()
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype)
    is_done = getattr(built, name)(
        x.data_ptr(), TYPES[x.dtype], x.numel() // in_features, in_features, out_features, codes.data_ptr(),
        absmax.data_ptr(), codebook.data_ptr(), blocksize, y.data_ptr(), torch.get_num_threads(),
        *([part.data_ptr() for part in nested] or (None, None, None)),
    )  # fmt: skip
    return y if is_done else None


def _bytes(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8)


def _floats(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32)
