"""NF4, the 4-bit type of QLoRA (arXiv 2305.14314): quantise, dequantise, and multiply by a frozen NF4 weight.

The doors to the kernels for one tensor with its scales in float32. `lorica.quant` adds the other codebooks, double
quantisation and a type that keeps what belongs together. Arguments are checked here; the operators behind trust them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorica.errors import ConfigError
from lorica.kernels import ops

# The quantiles of a standard normal distribution, scaled to [-1, 1], as bitsandbytes prints them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_CODEBOOK = torch.tensor(NF4)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def nf4_quantize(weight: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """(codes uint8 [ceil(n / 2), 1], absmax float32 [ceil(n / blocksize)]) of a weight of n elements in any shape.

    Equal to bitsandbytes 0.50.2 code for code. The weight is float32, bfloat16 or float16. Raises ConfigError.
    """
    check_quantizable(weight, blocksize)
    codes, absmax = ops.quantize_4bit(weight.detach(), _CODEBOOK.to(weight.device), blocksize)
    return codes, absmax


def nf4_dequantize(
    codes: Tensor, absmax: Tensor, shape: Sequence[int], dtype: torch.dtype, blocksize: int = 64
) -> Tensor:
    """The weight that the codes stand for, in `shape` and `dtype`: code * absmax in float32, then cast.

    codes uint8 in any shape, ceil(n / 2) of them; absmax float32 [ceil(n / blocksize)]. Raises ConfigError.
    """
    check_codes(codes, absmax, math.prod(shape), blocksize)
    result: Tensor = ops.dequantize_4bit(codes, absmax, _CODEBOOK.to(codes.device), blocksize, shape, dtype)
    return result


def nf4_linear(
    x: Tensor, codes: Tensor, absmax: Tensor, shape: Sequence[int], bias: Tensor | None = None, blocksize: int = 64
) -> Tensor:
    """x W^T + b in the dtype of x: x [..., in], W [out, in] = `shape` in NF4, bias [out]. Differentiable in x and bias.

    Few rows of x (decoding) meet the codes in registers and W is never written out. Raises ConfigError.
    """
    out_features, in_features = shape
    check_codes(codes, absmax, out_features * in_features, blocksize)
    if x.shape[-1] != in_features:
        raise ConfigError(f"a weight of shape {[*shape]} takes inputs of {in_features} features, not {[*x.shape]}")
    y: Tensor = ops.linear_4bit(x, codes, absmax, _CODEBOOK.to(x.device), blocksize, out_features)
    return y if bias is None else y + bias.to(y.dtype)


def check_quantizable(weight: Tensor, blocksize: int) -> None:
    """Raise ConfigError, with every fault, where `weight` cannot be quantised in blocks of `blocksize`."""
    faults = _blocksize_faults(blocksize)
    if weight.dtype not in _FLOATS:
        faults.append(f"the weight is {weight.dtype}; float32, bfloat16 and float16 can be quantised")
    if weight.numel() == 0:
        faults.append(f"the weight is empty: its shape is {[*weight.shape]}")
    if faults:
        raise ConfigError("cannot quantise: " + "; ".join(faults))


def check_codes(codes: Tensor, absmax: Tensor, count: int, blocksize: int) -> None:
    """Raise ConfigError, with every fault, where codes and absmax are not those of `count` elements in 4 bits."""
    faults = _blocksize_faults(blocksize)
    if codes.dtype is not torch.uint8 or codes.numel() != (count + 1) // 2:
        faults.append(
            f"{count} elements need {(count + 1) // 2} bytes of codes (uint8), not {codes.numel()} of {codes.dtype}"
        )
    if not faults and (absmax.dtype is not torch.float32 or absmax.numel() != -(-count // blocksize)):
        faults.append(
            f"{count} elements in blocks of {blocksize} need {-(-count // blocksize)} absmax (float32), "
            f"not {absmax.numel()} of {absmax.dtype}"
        )
    if faults:
        raise ConfigError("not a quantised weight: " + "; ".join(faults))


def _blocksize_faults(blocksize: int) -> list[str]:
    if blocksize in BLOCKSIZES:
        return []
    return [f"the block size {blocksize} is none of {', '.join(map(str, BLOCKSIZES))}"]
