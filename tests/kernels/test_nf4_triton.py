"""The Triton kernels against the reference: on a GPU where there is one, else interpreted (tests/conftest.py)."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from lorica.kernels import reference
from lorica.kernels.nf4 import NF4

pytest.importorskip("triton", reason="needs triton, which needs no GPU: pip install triton")
kernels = importlib.import_module("lorica.kernels.triton_ops")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = torch.tensor(NF4, device=DEVICE)
MIXED = torch.tensor([0, 0.1, 8, 12, 4, 6, 2, 3, 0, -0.1, -8, -12, -4, -6, -2, -3.0], device=DEVICE) / 11


def values(count: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    x[count // 2 : count // 2 + 70] = 0
    return x.to(DEVICE, dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A GPU rounds to the nearest; the interpreter cuts off what does not fit bfloat16."""
    if dtype is torch.bfloat16 and DEVICE == "cpu":
        x = (x.view(torch.int32) & -65536).view(torch.float32)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantising(dtype: torch.dtype) -> None:
    for count, blocksize in ((1, 64), (33, 32), (64, 64), (1001, 128), (4096 + 7, 4096)):
        for codebook in (LEVELS, MIXED):
            x = values(count, dtype)
            ours, theirs = (side.quantize_4bit(x, codebook, blocksize) for side in (kernels, reference))
            assert ours[0].equal(theirs[0]) and ours[1].equal(theirs[1]), (count, blocksize)


def test_a_nan_is_not_hidden() -> None:
    x = values(130, torch.float32)
    x[5] = x[129] = float("nan")
    ours, theirs = (side.quantize_4bit(x, LEVELS, 64) for side in (kernels, reference))
    assert ours[0].equal(theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_dequantising(dtype: torch.dtype) -> None:
    levels = torch.linspace(-1, 1, 256, device=DEVICE)
    for count, blocksize in ((1, 64), (33, 32), (5000, 64), (4096 + 7, 4096)):
        absmax = values(-(-count // blocksize), torch.float32).abs() + 0.1
        codes = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8, device=DEVICE)
        four = (codes, absmax, LEVELS, blocksize, (count,))
        assert kernels.dequantize_4bit(*four, dtype).equal(cast(reference.dequantize_4bit(*four, torch.float32), dtype))
        eight = (torch.randint(0, 256, (count,), dtype=torch.uint8, device=DEVICE), absmax, levels, blocksize)
        assert kernels.dequantize_8bit(*eight, dtype).equal(
            cast(reference.dequantize_8bit(*eight, torch.float32), dtype)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product(dtype: torch.dtype) -> None:
    for outputs, inputs, num_rows in ((5, 64, 1), (17, 37, 2), (33, 300, 3), (4, 64, 9)):
        codes, absmax = reference.quantize_4bit(values(outputs * inputs, torch.float32), LEVELS, 64)
        exact = reference.dequantize_4bit(codes, absmax, LEVELS, 64, (outputs, inputs), torch.float64)
        x = values(num_rows * inputs, dtype).reshape(num_rows, 1, inputs)
        ours = kernels.linear_4bit(x, codes, absmax, LEVELS, 64, outputs)
        eps = torch.finfo(dtype).eps
        limit = 2 * eps * (x.double().abs() @ exact.T.abs())
        assert ours.dtype is dtype and ((ours.double() - x.double() @ exact.T).abs() <= limit).all()
        back = kernels.linear_4bit_input_grad(ours, codes, absmax, LEVELS, 64, inputs)
        assert ((back.double() - ours.double() @ exact).abs() <= 2 * eps * (ours.double().abs() @ exact.abs())).all()
