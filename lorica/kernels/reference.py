"""Blockwise quantisation in plain PyTorch: what every fast path is measured against, and what runs without one.

A tensor is seen flat, in blocks of `blocksize` elements that may straddle its rows. A block is stored as one float32,
its largest magnitude `absmax`, and for each element the index of the level of a codebook nearest to element / absmax
(QLoRA, arXiv 2305.14314, section 3; the 8-bit form is arXiv 2110.02861). 4-bit codes lie two in a byte, the even
element in the high half, in a tensor [ceil(n / 2), 1] as bitsandbytes stores them.

The results equal bitsandbytes 0.50.2 on a CPU code for code, so its habits are kept:
  - an element is multiplied by 1 / absmax in float32, but divided by it in a last, partial block, whose absmax is then
    at least 1e-38; a block of zeros gets the code of 0 and absmax 0;
  - a tie between two levels goes to the lower one;
  - the nearest of 256 levels is looked for in 65536 steps, so an element very near a midpoint may get the other level.

A NaN or an infinity is never hidden: its block's absmax is NaN or infinite. (In 8 bits bitsandbytes skips a NaN.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_ABSMAX = 1e-38
SCALE_BLOCKSIZE = 256
"""Scales in a block of scales, where those are quantised too."""
_STEPS = 65536
# Elements at once, a multiple of every block size: so what is computed on the way takes little memory.
_CHUNK = 2**16


def quantize_4bit(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """x of n elements, codebook float32 [16] -> codes uint8 [ceil(n / 2), 1], absmax float32 [ceil(n / blocksize)]."""
    chunks = _split(x.detach().flatten(), _CHUNK)
    parts = [_quantize_4bit(chunk, codebook, blocksize) for chunk in chunks]
    return torch.cat([codes for codes, _ in parts])[:, None], torch.cat([absmax for _, absmax in parts])


def _quantize_4bit(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    blocks, num_partial = _blocks(x, blocksize)
    absmax = blocks.abs().amax(1)
    divisor = absmax.clamp(min=LEAST_ABSMAX)
    scaled = blocks * (1 / divisor)[:, None]
    if num_partial:
        absmax[-1] = divisor[-1]
        scaled[-1] = blocks[-1] / divisor[-1]
    bounds, order = midpoints(codebook)
    elements = F.pad(scaled.clamp(-1, 1).flatten()[: x.numel()], (0, x.numel() % 2))
    codes = order[torch.bucketize(elements, bounds)]
    return codes[::2] << 4 | codes[1::2], absmax


def dequantize_4bit(
    codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The inverse up to rounding: codebook[code] * absmax in float32, then cast to `dtype`, in `shape`."""
    out = torch.empty(math.prod(shape), dtype=dtype, device=codes.device)
    packed = _split(codes.flatten(), _CHUNK // 2)
    for part, bytes_, scales in zip(_split(out, _CHUNK), packed, _split(absmax, _CHUNK // blocksize), strict=True):
        indices = torch.stack((bytes_ >> 4, bytes_ & 15), dim=1).flatten()[: part.numel()]
        part.copy_(_scaled(codebook[indices.int()], scales, blocksize))
    return out.reshape(shape)


def quantize_8bit(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """x of n elements, codebook float32 [256], sorted -> codes uint8 as x, absmax float32 [ceil(n / blocksize)]."""
    chunks = _split(x.detach().flatten(), _CHUNK)
    parts = [_quantize_8bit(chunk, codebook, blocksize) for chunk in chunks]
    return torch.cat([codes for codes, _ in parts]).reshape(x.shape), torch.cat([absmax for _, absmax in parts])


def _quantize_8bit(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    blocks, _ = _blocks(x, blocksize)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax)[:, None]).clamp(-1, 1)
    steps = ((scaled + 1) * 0.5 * (_STEPS - 1) + 0.5).flatten()[: x.numel()]
    # A block of zeros has 0 / 0, and gets code 0.
    return nearest_codes(codebook)[steps.nan_to_num(0).int()].masked_fill(steps.isnan(), 0), absmax


def dequantize_8bit(codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    """codebook[code] * absmax in float32, then cast to `dtype`, in the shape of `codes`."""
    out = torch.empty(codes.numel(), dtype=dtype, device=codes.device)
    chunks = _split(codes.flatten(), _CHUNK)
    for part, chunk, scales in zip(_split(out, _CHUNK), chunks, _split(absmax, _CHUNK // blocksize), strict=True):
        part.copy_(_scaled(codebook[chunk.int()], scales, blocksize))
    return out.reshape(codes.shape)


def linear_4bit(
    x: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, out_features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    """x W^T in the dtype of x: x [..., in], W [out, in] in 4 bits."""
    absmax = scales(absmax, nested)
    return F.linear(x, dequantize_4bit(codes, absmax, codebook, blocksize, (out_features, x.shape[-1]), x.dtype))


def linear_4bit_input_grad(
    grad: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, in_features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    """grad W in the dtype of grad: grad [..., out], W [out, in] in 4 bits."""
    absmax = scales(absmax, nested)
    return grad @ dequantize_4bit(codes, absmax, codebook, blocksize, (grad.shape[-1], in_features), grad.dtype)


def linear_8bit(
    x: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, out_features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    """x W^T in the dtype of x: x [..., in], W [out, in] in 8 bits."""
    weight = dequantize_8bit(codes, scales(absmax, nested), codebook, blocksize, x.dtype)
    return F.linear(x, weight.reshape(out_features, x.shape[-1]))


def linear_8bit_input_grad(
    grad: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, in_features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    """grad W in the dtype of grad: grad [..., out], W [out, in] in 8 bits."""
    weight = dequantize_8bit(codes, scales(absmax, nested), codebook, blocksize, grad.dtype)
    return grad @ weight.reshape(grad.shape[-1], in_features)


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of x: x [..., in], W [out, in], b [out]; sums in float32, or in float64 for that."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


def scales(
    absmax: Tensor, nested: Sequence[Tensor], dequantize_8bit: Callable[..., Tensor] = dequantize_8bit
) -> Tensor:
    """absmax as float32: as it is, or where it is quantised itself (uint8), out of what `nested` holds: the absmax of
    its blocks, its levels and its offset."""
    if not nested:
        return absmax
    outer, levels, offset = nested
    return dequantize_8bit(absmax, outer, levels, SCALE_BLOCKSIZE, torch.float32).add_(offset)


def midpoints(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """(the bounds between the sorted levels [15], the code of each level in sorted order uint8 [16])."""
    levels, order = torch.sort(codebook, stable=True)
    return (levels[:-1] + levels[1:]) / 2, order.to(torch.uint8)


def nearest_codes(codebook: Tensor) -> Tensor:
    """uint8 [65536]: the code nearest to each of as many steps from -1 to 1."""
    table = _nearest_codes(tuple(codebook.tolist()))
    return table.to(codebook.device)


@cache
def _nearest_codes(levels: tuple[float, ...]) -> Tensor:
    steps = torch.arange(_STEPS, dtype=torch.float32) / (_STEPS - 1) * 2 - 1
    return torch.bucketize(steps, midpoints(torch.tensor(levels))[0]).to(torch.uint8)


def _split(x: Tensor, size: int) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = x.split(size)  # type: ignore[no-untyped-call]
    return parts


def _blocks(x: Tensor, blocksize: int) -> tuple[Tensor, int]:
    """(the elements as float32 [blocks, blocksize], zeros behind the last; how many of the last block are elements,
    0 where it is whole)."""
    flat = x.float()
    num_partial = flat.numel() % blocksize
    return F.pad(flat, (0, -flat.numel() % blocksize)).reshape(-1, blocksize), num_partial


def _scaled(levels: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """levels [n] times the absmax of their blocks."""
    padded = F.pad(levels, (0, -levels.numel() % blocksize)).reshape(-1, blocksize)
    return (padded * absmax[:, None]).flatten()[: levels.numel()]
