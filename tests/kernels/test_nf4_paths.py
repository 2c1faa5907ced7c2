"""Every way in which the C can be compiled, against the reference: AVX-512, AVX2, plain C.

A path that this machine's processor lacks is compiled, so that it stays valid C, and runs only where there is one.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorica.kernels import build, cpu, reference
from lorica.kernels.nf4 import NF4

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the paths are those of x86-64"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler"),
    pytest.mark.skipif(os.environ.get("LORICA_KERNELS") == "reference", reason="LORICA_KERNELS forbids compiled parts"),
]
MARCH = {512: "x86-64-v4", 256: "x86-64-v3", 0: "x86-64"}
"""Bits of a vector -> the first generation of processors that has them."""
NEEDS = {512: "avx512bw", 256: "avx2", 0: "sse2"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = torch.tensor(NF4)
# Codes in no order, with a level twice; the largest magnitude is not 1.
MIXED = torch.tensor([0, 0.1, 8, 12, 4, 6, 2, 3, 0, -0.1, -8, -12, -4, -6, -2, -3.0]) / 11


def flags(simd: int) -> tuple[str, ...]:
    return (f"-march={MARCH[simd]}", "-Wall", "-Wextra", "-Werror", *cpu._FLAGS[1:])


def runnable() -> list[int]:
    cpuinfo = Path("/proc/cpuinfo")
    has = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return [simd for simd in MARCH if NEEDS[simd] in has]


@pytest.mark.parametrize("simd", MARCH)
def test_every_path_compiles_without_a_warning(simd: int) -> None:
    assert build.library("blockwise.c", flags(simd)) is not None


@pytest.fixture(params=runnable())
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    built = cpu.compiled(flags(request.param))
    monkeypatch.setattr(cpu, "compiled", lambda: built)
    assert built.lorica_simd() == request.param
    yield request.param


def values(count: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(count, generator=torch.Generator().manual_seed(count))
    x[: count // 3] *= 1e-6  # subnormal in float16
    x[count // 2 : count // 2 + 70] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantising_is_that_of_the_reference(path: int, dtype: torch.dtype) -> None:
    levels = torch.linspace(-1, 1, 256)
    for count in (1, 33, 64, 1000, 4096 * 5 + 7):
        for blocksize in (32, 64, 4096):
            x = values(count, dtype)
            for codebook in (LEVELS, MIXED):
                pairs = zip(
                    cpu.quantize_4bit(x, codebook, blocksize),
                    reference.quantize_4bit(x, codebook, blocksize),
                    strict=True,
                )
                assert all(ours.equal(theirs) for ours, theirs in pairs), (count, blocksize)
            eight = zip(
                cpu.quantize_8bit(x, levels, blocksize), reference.quantize_8bit(x, levels, blocksize), strict=True
            )
            assert all(ours.equal(theirs) for ours, theirs in eight), (count, blocksize)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantising_is_that_of_the_reference(path: int, dtype: torch.dtype) -> None:
    levels = torch.linspace(-1, 1, 256)
    for count in (1, 33, 64, 1000, 4096 * 5 + 7):
        for blocksize in (32, 64, 4096):
            codes = torch.randint(0, 256, ((count + 1) // 2,), dtype=torch.uint8)
            absmax = values(-(-count // blocksize), torch.float32).abs() * 1e5  # beyond float16, and nearly nothing
            absmax[-1] = float("nan")
            arguments = (codes, absmax, MIXED, blocksize, (count,), dtype)
            ours, theirs = cpu.dequantize_4bit(*arguments), reference.dequantize_4bit(*arguments)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
            eight = torch.randint(0, 256, (count,), dtype=torch.uint8)
            ours = cpu.dequantize_8bit(eight, absmax, levels, blocksize, dtype)
            theirs = reference.dequantize_8bit(eight, absmax, levels, blocksize, dtype)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_large_outputs_are_written_past_the_caches(path: int) -> None:
    count = 13 * 2**20 + 64  # above STREAM_BYTES
    codes = torch.arange(count // 2).to(torch.uint8)
    absmax = torch.linspace(0.1, 3, -(-count // 64))
    ours = cpu.dequantize_4bit(codes, absmax, LEVELS, 64, (count,), torch.bfloat16)
    last = slice(count - 2**16, count)
    for part in (slice(0, 2**16), last):
        blocks, halves = slice(part.start // 64, part.stop // 64), slice(part.start // 2, part.stop // 2)
        theirs = reference.dequantize_4bit(codes[halves], absmax[blocks], LEVELS, 64, (2**16,), torch.bfloat16)
        assert ours[part].equal(theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", [LEVELS, MIXED], ids=["nf4", "mixed"])
def test_the_fused_product_is_that_of_float64(path: int, dtype: torch.dtype, codebook: Tensor) -> None:
    for outputs, inputs, blocksize in ((5, 64, 64), (33, 192, 128), (17, 96, 32), (3, 37, 32), (18, 4096, 64)):
        w = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs))
        codes, absmax = reference.quantize_4bit(w, codebook, blocksize)
        exact = reference.dequantize_4bit(codes, absmax, codebook, blocksize, (outputs, inputs), torch.float64)
        for num_rows in (1, 2, 3, 4, 9):
            x = values(num_rows * inputs, dtype).reshape(num_rows, 1, inputs)
            x[:, :, 7] *= 100
            ours: Any = cpu.fused_linear_4bit(x, codes, absmax, codebook, blocksize, outputs)
            wide, size = x.double().abs(), exact.T.abs()
            expected = x.double() @ exact.T
            # One rounding of the result; what sums in float32 lose; and in 16 bits, x and w as integers of 14 bits.
            limit = torch.finfo(dtype).eps / 2 * expected.abs() + 1e-6 * (wide @ size) + torch.finfo(dtype).tiny
            if dtype.itemsize == 2:
                limit += 2**-14 * (wide.amax(-1, keepdim=True) * size.sum(0) + wide.sum(-1, keepdim=True) * size.max())
            assert ours.shape == (num_rows, 1, outputs) and ours.dtype is dtype
            assert ((ours.double() - expected).abs() <= limit).all(), (inputs, num_rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_product_in_8_bits_is_that_of_float64(path: int, dtype: torch.dtype) -> None:
    levels = torch.arange(-128, 128) / 127
    for outputs, inputs, blocksize in ((5, 64, 64), (33, 192, 128), (17, 96, 32), (18, 4096, 64)):
        w = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs))
        codes, absmax = reference.quantize_8bit(w, levels, blocksize)
        exact = reference.dequantize_8bit(codes, absmax, levels, blocksize, torch.float64)
        for num_rows in (1, 2, 3, 4, 9):
            x = values(num_rows * inputs, dtype).reshape(num_rows, inputs)
            ours = cpu._fused("lorica_linear_8bit", x, codes, absmax, levels, blocksize, outputs)
            assert ours is not None
            limit = torch.finfo(dtype).eps / 2 * (x.double() @ exact.T).abs() + torch.finfo(dtype).tiny
            limit += 1e-6 * (x.double().abs() @ exact.T.abs())
            assert ((ours.double() - x.double() @ exact.T).abs() <= limit).all(), (inputs, num_rows)
    # What it is not for, it says.
    assert cpu._fused("lorica_linear_8bit", x, codes, absmax, levels.sqrt(), blocksize, outputs) is None
    assert cpu._fused("lorica_linear_8bit", x[:, :37], codes, absmax, levels, blocksize, outputs) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_read_as_they_are_stored(path: int, dtype: torch.dtype) -> None:
    """Bit for bit what the product gives with the same scales as float32."""
    signed = torch.linspace(-1, 1, 256) ** 3
    for outputs, inputs in ((33, 192), (3, 37), (18, 4096)):
        w = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs))
        x = values(3 * inputs, dtype).reshape(3, inputs)
        for name, levels, quantize in (
            ("lorica_linear_4bit", LEVELS, reference.quantize_4bit),
            ("lorica_linear_8bit", torch.arange(-128, 128) / 127, reference.quantize_8bit),
        ):
            codes, absmax = quantize(w, levels, 32)
            offset = absmax.mean()
            nested = reference.quantize_8bit(absmax - offset, signed, 256)
            scales = reference.scales(nested[0], (nested[1], signed, offset))
            assert (scales - absmax).abs().max() < 0.05 * absmax.max()
            plain = cpu._fused(name, x, codes, scales, levels, 32, outputs)
            ours = cpu._fused(name, x, codes, nested[0], levels, 32, outputs, nested[1], signed, offset)
            assert (ours is None) == (plain is None) == (name == "lorica_linear_8bit" and inputs == 37)
            assert ours is None or ours.equal(plain)
