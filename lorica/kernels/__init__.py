"""Operations with more than one way to do them, one door each: a caller never asks what the machine is."""

from lorica.kernels.nf4 import nf4_dequantize, nf4_linear, nf4_quantize

__all__ = ["nf4_dequantize", "nf4_linear", "nf4_quantize"]
