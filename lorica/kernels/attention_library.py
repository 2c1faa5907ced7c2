"""The C libraries behind `cpu_attention.py`: built, described to ctypes, and tried before they are trusted.

There are two with the same functions: attention.c computes in float32 on any processor, attention_bfloat16.c has the
processor multiply bfloat16 matrices (AMX, AVX-512 BF16). The second is lent only where a small case comes out of it as
out of the first.
"""

from __future__ import annotations

import ctypes
import warnings
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lorica.kernels.build import FLAGS, TYPES, library

# Of attention_bfloat16.c, by what the processor has to have; the faster first.
_TILE_FLAGS = {"amx_bf16": ("-DAMX", "-mamx-tile", "-mamx-bf16"), "avx512_bf16": ("-mavx512bf16",)}
_P, _I, _L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Tensor4(ctypes.Structure):
    _fields_ = (("data", _P), ("row", _L), ("head", _L), ("token", _L), ("size", _L))

    @classmethod
    def of(cls, tensor: Tensor) -> Tensor4:
        """From [B, H, T, D] whose last dimension is contiguous."""
        return cls(tensor.data_ptr(), *tensor.stride()[:3], tensor.shape[3])


class Attention(ctypes.Structure):
    """csrc/scores.h's `Attention`."""

    _fields_ = (
        ("type", _I), ("causal", _I), ("heads", _L), ("key_heads", _L), ("samples", _L), ("prefix", _L), ("window", _L),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float), ("dropout", ctypes.c_double), ("seed", _P),
        ("borders", _P), ("query", Tensor4), ("key", Tensor4),
        ("value", Tensor4), ("out", Tensor4), ("grad", Tensor4), ("grad_query", Tensor4), ("grad_key", Tensor4),
        ("grad_value", Tensor4), ("prefix_key", _P), ("prefix_value", _P), ("grad_prefix_key", _P),
        ("grad_prefix_value", _P), ("sinks", _P), ("log_sum", _P), ("grad_sinks", _P),
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
            getattr(built, name).argtypes = (ctypes.POINTER(Attention), ctypes.c_int)
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

    def described(array: npt.NDArray[np.uint16]) -> Tensor4:
        return Tensor4(array.ctypes.data, 0, size, array.shape[1] * size, size)

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
    attention = Attention(
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
