"""Quantised tensors against bitsandbytes: codes, scales and scales of scales; sizes, products, refusals."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.errors import ConfigError
from lorica.quant.blockwise import Quantized, dequantize, linear, num_quantized_bytes, quantize
from lorica.quant.codebooks import SCHEMES, codebook

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((64,), (1, 1), (33, 250), (7, 9, 97), (130, 128), (257, 257))


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """bitsandbytes compiles its way of dequantising odd shapes, anew for each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_four_bits_are_bitsandbytes(scheme: str, dtype: torch.dtype, double_quant: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in SHAPES:
        for blocksize in (32, 64, 512):
            w = weight(shape, dtype)
            ours = quantize(w, scheme, blocksize, double_quant)
            codes, state = functional.quantize_4bit(
                w, blocksize=blocksize, compress_statistics=double_quant, quant_type=scheme
            )
            assert ours.codes.equal(codes) and ours.absmax.equal(state.absmax), (shape, blocksize)
            if ours.nested is not None:
                assert ours.nested.absmax.equal(state.state2.absmax) and ours.nested.offset.equal(state.offset)
            assert dequantize(ours).equal(functional.dequantize_4bit(codes, state).reshape(shape)), (shape, blocksize)


@pytest.mark.parametrize("scheme", ["dynamic", "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_are_bitsandbytes(scheme: str, dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in SHAPES:
        for blocksize in (64, 4096):
            w = weight(shape, dtype)
            w.view(-1)[: w.numel() // 2] = 0
            ours = quantize(w, scheme, blocksize)
            # Never a copy of the codebook: bitsandbytes remembers a table by the address of its levels.
            codes, state = functional.quantize_blockwise(w, codebook(scheme), blocksize=blocksize)
            assert ours.codes.equal(codes) and ours.absmax.equal(state.absmax), (shape, blocksize)
            assert dequantize(ours).equal(functional.dequantize_blockwise(codes, state))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_what_comes_back_is_near(scheme: str, double_quant: bool) -> None:
    """Within half the widest gap between levels, times the block's absmax; twice that with its scale rounded too."""
    w = weight((33, 250), torch.bfloat16)
    quantized = quantize(w, scheme, double_quant=double_quant)
    restored = dequantize(quantized, torch.float32)
    gap = float(codebook(scheme).sort().values.diff().max())
    scales = F.pad(w.float().flatten().abs(), (0, -w.numel() % 64)).reshape(-1, 64).amax(1)
    limit = scales.repeat_interleave(64)[: w.numel()].reshape(w.shape) * (gap / 2 + (0.02 if double_quant else 1e-4))
    assert ((restored - w.float()).abs() <= limit).all()
    assert restored.shape == w.shape and dequantize(quantized).dtype is torch.bfloat16


def test_a_constant_and_a_zero_weight_survive_double_quantisation() -> None:
    for value in (0.0, 0.75):
        w = torch.full((10, 100), value)
        assert dequantize(quantize(w, double_quant=True)).equal(w)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_its_bytes_are_known_beforehand(scheme: str, double_quant: bool) -> None:
    for shape in SHAPES:
        quantized = quantize(weight(shape), scheme, 32, double_quant)
        assert quantized.num_bytes == num_quantized_bytes(weight(shape).numel(), scheme, 32, double_quant)


def test_the_bits_of_the_paper() -> None:
    """QLoRA, section 3: 0.5 bits an element for scales become 0.127."""
    num = 64 * 256 * 100
    assert num_quantized_bytes(num, "nf4") * 8 / num == 4.5
    assert num_quantized_bytes(num, "nf4", double_quant=True) * 8 / num == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_product_and_its_gradient(scheme: str, double_quant: bool) -> None:
    quantized = quantize(weight((17, 96)), scheme, double_quant=double_quant)
    dense = dequantize(quantized, torch.float64)
    x, bias = weight((5, 96)).requires_grad_(), weight((17,)).requires_grad_()
    y = linear(x, quantized, bias)
    torch.testing.assert_close(y.double(), x.double() @ dense.T + bias.double(), rtol=1e-5, atol=1e-5)
    y.square().sum().backward()
    assert x.grad is not None and bias.grad is not None
    torch.testing.assert_close(x.grad.double(), 2 * y.detach().double() @ dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bias.grad, 2 * y.detach().sum(0))


def test_a_parameter_in_any_layout_becomes_frozen_codes() -> None:
    parameter = torch.nn.Parameter(weight((96, 17)))
    for scheme in SCHEMES:
        ours, expected = (
            quantize(w, scheme, double_quant=True) for w in (parameter.T, weight((96, 17)).T.contiguous())
        )
        assert ours.codes.equal(expected.codes) and ours.absmax.equal(expected.absmax) and ours.nested is not None
        assert not any(part.requires_grad for part in (ours.absmax, ours.nested.absmax, ours.nested.offset))
        assert linear(torch.empty(2, 0, 96), ours).shape == (2, 0, 17)


def test_it_moves() -> None:
    moved = quantize(weight((4, 64)), double_quant=True).to("meta")
    assert isinstance(moved, Quantized) and moved.nested is not None
    assert moved.codes.is_meta and moved.absmax.is_meta and moved.nested.absmax.is_meta and moved.nested.offset.is_meta


def test_what_cannot_be_quantised() -> None:
    w = weight((4, 64))
    w[2, 3] = float("nan")
    for scheme in SCHEMES:
        with pytest.raises(ConfigError, match=r"shape \[4, 64\] has NaN or infinite elements, in 1 of 4 blocks"):
            quantize(w, scheme)
    with pytest.raises(ConfigError, match="no quantisation scheme 'nf5'"):
        quantize(weight((4, 64)), "nf5")
    with pytest.raises(ConfigError, match="the block size 16 is none of 32, 64"):
        quantize(weight((4, 64)), blocksize=16)
