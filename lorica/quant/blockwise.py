"""A quantised tensor, and the way there and back.

    quantized = quantize(weight, "nf4", double_quant=True)
    weight = dequantize(quantized)
    y = linear(x, quantized, bias)

Double quantisation (QLoRA, arXiv 2305.14314, section 3) quantises the scales once more: their mean is taken off, what
is left is stored in 8 bits, in blocks of 256, with the signed dynamic map. A 4-bit weight in blocks of 64 then takes
4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits an element instead of 4.5. Codes, scales and layout are those of
bitsandbytes 0.50.2, bit for bit, in every scheme that it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorica.errors import ConfigError
from lorica.kernels import ops
from lorica.kernels.nf4 import check_quantizable
from lorica.kernels.reference import SCALE_BLOCKSIZE
from lorica.quant.codebooks import bits, codebook

SCALE_SCHEME = "dynamic"


@dataclass(frozen=True)
class DoubleQuant:
    """What turns 8-bit scales into numbers again: map[code] * absmax + offset."""

    absmax: Tensor
    """float32 [ceil(number of scales / 256)]."""
    offset: Tensor
    """float32 [], the mean of the scales."""


@dataclass(frozen=True)
class Quantized:
    """A tensor in blocks of `blocksize` elements of its flattened form, each a few bits and one scale."""

    codes: Tensor
    """uint8: [ceil(n / 2), 1] in 4 bits, even elements in the high halves; of the tensor's own shape in 8 bits."""
    absmax: Tensor
    """[ceil(n / blocksize)]: float32, or uint8 where `nested` says how to read it."""
    shape: torch.Size
    dtype: torch.dtype
    """What the tensor was, and what it becomes again."""
    scheme: str
    blocksize: int = 64
    nested: DoubleQuant | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        parts = [self.codes, self.absmax, *((self.nested.absmax, self.nested.offset) if self.nested else ())]
        return sum(part.numel() * part.element_size() for part in parts)

    def scales(self, first: int = 0, last: int | None = None) -> Tensor:
        """The absmax of the blocks as float32 [ceil(n / blocksize)], or those of the blocks from `first` to `last`."""
        if self.nested is None:
            return self.absmax[first:last]
        levels, begin = codebook(SCALE_SCHEME, self.absmax.device), first // SCALE_BLOCKSIZE
        codes, absmax = self.absmax[begin * SCALE_BLOCKSIZE : last], self.nested.absmax[begin:]
        scales: Tensor = ops.dequantize_8bit(codes, absmax, levels, SCALE_BLOCKSIZE, torch.float32)
        return scales.add_(self.nested.offset)[first - begin * SCALE_BLOCKSIZE :]

    def to(self, device: torch.device | str) -> Quantized:
        """The same on another device."""
        nested = self.nested and DoubleQuant(self.nested.absmax.to(device), self.nested.offset.to(device))
        return replace(self, codes=self.codes.to(device), absmax=self.absmax.to(device), nested=nested)


def quantize(weight: Tensor, scheme: str = "nf4", blocksize: int = 64, double_quant: bool = False) -> Quantized:
    """`weight`, float32, bfloat16 or float16 in any shape, in a scheme of `codebooks.SCHEMES`.

    Raises ConfigError for what cannot be quantised, and for a weight with NaN or infinite elements: a block of them
    would turn every output into NaN, and nobody would know which weight it was.
    """
    check_quantizable(weight, blocksize)
    levels = codebook(scheme, weight.device)
    codes, absmax = (ops.quantize_4bit if bits(scheme) == 4 else ops.quantize_8bit)(weight.detach(), levels, blocksize)
    if not absmax.isfinite().all():
        num_bad = int((~absmax.isfinite()).sum())
        raise ConfigError(
            f"the weight of shape {[*weight.shape]} has NaN or infinite elements, in {num_bad} of {absmax.numel()} "
            "blocks; load it without quantisation to find them"
        )
    scales, nested = quantize_scales(absmax) if double_quant else (absmax, None)
    return Quantized(codes, scales, weight.shape, weight.dtype, scheme, blocksize, nested)


def quantize_scales(absmax: Tensor) -> tuple[Tensor, DoubleQuant]:
    """The double quantisation of scales, float32 [n]: uint8 [n], and how they are read."""
    offset = absmax.mean()
    codes, scale_absmax = ops.quantize_8bit(absmax - offset, codebook(SCALE_SCHEME, absmax.device), SCALE_BLOCKSIZE)
    return codes, DoubleQuant(scale_absmax, offset)


def dequantize(quantized: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor again, in its shape, in `dtype` or the one it had."""
    levels, dtype = codebook(quantized.scheme, quantized.codes.device), dtype or quantized.dtype
    if bits(quantized.scheme) == 8:
        eight: Tensor = ops.dequantize_8bit(quantized.codes, quantized.scales(), levels, quantized.blocksize, dtype)
        return eight.reshape(quantized.shape)
    four: Tensor = ops.dequantize_4bit(
        quantized.codes, quantized.scales(), levels, quantized.blocksize, quantized.shape, dtype
    )
    return four


def linear(x: Tensor, quantized: Quantized, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x: x [..., in], W [out, in] quantised and frozen, bias [out].

    What is kept for the backward is W's codes and scales. Differentiable in x and bias.
    """
    product = ops.linear_4bit if bits(quantized.scheme) == 4 else ops.linear_8bit
    y = _product(product, x, quantized, quantized.shape[0])
    return y if bias is None else y + bias.to(y.dtype)


def linear_input_grad(grad: Tensor, quantized: Quantized) -> Tensor:
    """grad W in the dtype of grad: the gradient of what `linear` was given, [..., in], from its output's [..., out]."""
    product = ops.linear_4bit_input_grad if bits(quantized.scheme) == 4 else ops.linear_8bit_input_grad
    return _product(product, grad, quantized, quantized.shape[1])


def _product(product: Callable[..., Tensor], x: Tensor, quantized: Quantized, features: int) -> Tensor:
    nested, levels = quantized.nested, codebook(quantized.scheme, x.device)
    scales = [] if nested is None else [nested.absmax, codebook(SCALE_SCHEME, x.device), nested.offset]
    return product(x, quantized.codes, quantized.absmax, levels, quantized.blocksize, features, *scales)


def num_quantized_bytes(num_elements: int, scheme: str, blocksize: int = 64, double_quant: bool = False) -> int:
    """`num_bytes` of a tensor of so many elements, without the tensor."""
    num_scales = math.ceil(num_elements / blocksize)
    codes = math.ceil(num_elements * bits(scheme) / 8)
    if not double_quant:
        return codes + 4 * num_scales
    return codes + num_scales + 4 * math.ceil(num_scales / SCALE_BLOCKSIZE) + 4
