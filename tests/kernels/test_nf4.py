"""NF4 against bitsandbytes code for code, the product against float64, and how the operators behave in torch."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import lorica
from lorica.errors import ConfigError
from lorica.kernels import build, cpu, nf4_dequantize, nf4_linear, nf4_quantize, ops, reference
from lorica.kernels.nf4 import NF4

bitsandbytes = pytest.importorskip("bitsandbytes")

CODEBOOK = torch.tensor(NF4)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1,), (31,), (64,), (5, 13), (3, 64), (7, 100), (2, 3, 97), (33, 250), (257, 257))


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """bitsandbytes compiles its way of dequantising odd shapes, anew for each."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def theirs(x: Tensor, blocksize: int = 64, scheme: str = "nf4") -> tuple[Tensor, Tensor]:
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit.default(x, blocksize, scheme, torch.uint8)
    return codes, absmax


def same(ours: Tensor, expected: Tensor) -> bool:
    return ours.dtype == expected.dtype and ours.shape == expected.shape and ours.equal(expected)


@pytest.mark.parametrize("quantize", [reference.quantize_4bit, ops.quantize_4bit], ids=["reference", "op"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_are_bitsandbytes(quantize: Any, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for blocksize in (32, 64, 256, 4096):
            x = weight(shape, dtype)
            ours, expected = quantize(x, CODEBOOK, blocksize), theirs(x, blocksize)
            assert same(ours[0], expected[0]) and same(ours[1], expected[1]), (shape, blocksize)


@pytest.mark.parametrize("dequantize", [reference.dequantize_4bit, ops.dequantize_4bit], ids=["reference", "op"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_bitsandbytes(dequantize: Any, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for blocksize in (32, 64, 256, 4096):
            codes, absmax = theirs(weight(shape), blocksize)
            ours = dequantize(codes, absmax, CODEBOOK, blocksize, shape, dtype)
            expected = torch.ops.bitsandbytes.dequantize_4bit.default(codes, absmax, blocksize, "nf4", shape, dtype)
            assert same(ours, expected.reshape(shape)), (shape, blocksize)


def extremes() -> dict[str, Tensor]:
    """Blocks of 64 and a partial one of 33 behind them."""
    x = weight((97,))
    infinite, missing, ties = x.clone(), x.clone(), x.clone()
    infinite[3] = infinite[80] = float("inf")
    missing[3] = missing[80] = float("nan")
    ties[:64] = 0
    ties[0], ties[1:16] = 1, (CODEBOOK[:-1] + CODEBOOK[1:]) / 2
    return {
        "zeros": torch.zeros(97), "negative zeros": -torch.zeros(97), "infinite": infinite, "NaN": missing,
        "ties": ties, "subnormal": x * 1e-40, "below 1e-38": x * 1e-39, "large": x.sign() * 3e38, "one": x[:1],
        "constant": torch.full((97,), 0.3), "overflowing float16": x.half() * 6e4,
    }  # fmt: skip


@pytest.mark.parametrize("quantize", [reference.quantize_4bit, ops.quantize_4bit], ids=["reference", "op"])
@pytest.mark.parametrize("name", extremes())
def test_extremes_are_bitsandbytes(quantize: Any, name: str) -> None:
    x = extremes()[name]
    codes, absmax = quantize(x, CODEBOOK, 64)
    expected_codes, expected_absmax = theirs(x)
    assert codes.equal(expected_codes)
    torch.testing.assert_close(absmax, expected_absmax, rtol=0, atol=0, equal_nan=True)


def test_a_tie_goes_to_the_lower_code_and_zeros_give_zeros() -> None:
    """Without bitsandbytes: the midpoint above level i gets code i."""
    codes, _ = nf4_quantize(extremes()["ties"][:64])
    nibbles = torch.stack((codes[:, 0] >> 4, codes[:, 0] & 15), dim=1).flatten()
    assert nibbles[:17].tolist() == [15, *range(15), 7]
    codes, absmax = nf4_quantize(torch.zeros(100))
    assert absmax[0] == 0 and not nf4_dequantize(codes, absmax, (100,), torch.bfloat16).any()


def test_a_nan_is_not_hidden() -> None:
    codes, absmax = nf4_quantize(extremes()["NaN"])
    assert nf4_dequantize(codes, absmax, (97,), torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("shape", [(5, 64), (33, 96), (17, 37), (64, 100), (8, 192)])
def test_the_product_is_that_of_float64(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Few rows and many, so fused and not; x has an outlier as activations have."""
    blocksize = 32 if shape[1] == 96 else 64
    codes, absmax = nf4_quantize(weight(shape), blocksize)
    exact = nf4_dequantize(codes, absmax, shape, torch.float64, blocksize)
    for num_rows in (1, 2, 3, 4, 7, 70):
        x, bias = weight((num_rows, shape[1]), dtype, seed=1), weight((shape[0],), seed=2)
        x[:, 5] *= 300
        y = nf4_linear(x, codes, absmax, shape, bias, blocksize)
        expected = x.double() @ exact.T + bias.to(dtype)
        # Rounding y, twice with the bias; the sums; and, where 16 bits multiply weights of 16 bits, rounding those.
        eps = torch.finfo(dtype).eps
        limit = 2 * eps * expected.abs() + (eps if eps > 1e-4 else 8 * eps) * (x.double().abs() @ exact.T.abs())
        assert y.dtype is dtype and ((y.double() - expected).abs() <= limit).all(), num_rows


def test_the_fused_product_loses_a_hundredth_of_what_bfloat16_does() -> None:
    """Its int16 form: before rounding its error is below 2^-14 of the largest terms."""
    codes, absmax = nf4_quantize(weight((256, 1024)))
    exact = nf4_dequantize(codes, absmax, (256, 1024), torch.float64)
    x = weight((3, 1024), torch.bfloat16, seed=1)
    expected = x.double() @ exact.T
    y = nf4_linear(x, codes, absmax, (256, 1024)).double()
    rounded = expected.to(torch.bfloat16).double()
    # The rounded result differs only where the exact one lay next to a boundary between two numbers of bfloat16.
    assert (y != rounded).double().mean() < 0.05
    torch.testing.assert_close(y, expected, rtol=2**-8, atol=1e-3 * float(expected.abs().max()))


def test_a_nan_in_x_stays_in_its_row() -> None:
    codes, absmax = nf4_quantize(weight((8, 128)))
    for dtype in DTYPES:
        x = weight((3, 128), dtype)
        x[1, 77] = float("nan")
        assert nf4_linear(x, codes, absmax, (8, 128)).isnan().all(1).tolist() == [False, True, False]


def test_gradients() -> None:
    shape = (6, 10)
    codes, absmax = nf4_quantize(weight(shape))
    x = weight((2, 3, 10)).double().requires_grad_()
    bias = weight((6,), seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: nf4_linear(x, codes, absmax, shape, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: nf4_linear(x, codes, absmax, shape, b), (x, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_that_of_float64(dtype: torch.dtype) -> None:
    codes, absmax = nf4_quantize(weight((48, 64)))
    x = weight((9, 64), dtype).requires_grad_()
    grad = weight((9, 48), dtype, seed=1)
    nf4_linear(x, codes, absmax, (48, 64)).backward(grad)
    exact = nf4_dequantize(codes, absmax, (48, 64), torch.float64)
    assert x.grad is not None and x.grad.dtype is dtype
    limit = 2 * torch.finfo(dtype).eps * (grad.double().abs() @ exact.abs())
    assert ((x.grad.double() - grad.double() @ exact).abs() <= limit).all()


def test_operators_are_well_behaved() -> None:
    x, levels = weight((6, 64)), torch.linspace(-1, 1, 256)
    codes, absmax = nf4_quantize(x)
    eight, scales = ops.quantize_8bit(x, levels, 64)
    inputs: dict[Any, tuple[Any, ...]] = {
        ops.quantize_4bit: (x, CODEBOOK, 64),
        ops.quantize_8bit: (x, levels, 64),
        ops.dequantize_4bit: (codes, absmax, CODEBOOK, 64, (6, 64), torch.bfloat16),
        ops.dequantize_8bit: (eight, scales, levels, 64, torch.bfloat16),
        ops.linear_4bit: (weight((2, 64)).requires_grad_(), codes, absmax, CODEBOOK, 64, 6),
        ops.linear_4bit_input_grad: (weight((2, 6)).requires_grad_(), codes, absmax, CODEBOOK, 64, 64),
        ops.linear_8bit: (weight((2, 64)).requires_grad_(), eight, scales, levels, 64, 6),
        ops.linear_8bit_input_grad: (weight((2, 6)).requires_grad_(), eight, scales, levels, 64, 64),
        ops.linear_rows: (weight((2, 64), torch.bfloat16), weight((6, 64)), weight((6,))),
    }
    for op, arguments in inputs.items():
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_scales_may_be_quantised_too(num_bits: int) -> None:
    levels, signed, w = torch.linspace(-1, 1, 256), torch.linspace(-1, 1, 256) ** 3, weight((48, 64))
    book = CODEBOOK if num_bits == 4 else levels
    codes, absmax = (ops.quantize_4bit if num_bits == 4 else ops.quantize_8bit)(w, book, 64)
    offset = absmax.mean()
    codes_of_scales, outer = ops.quantize_8bit(absmax - offset, signed, 256)
    scales = signed[codes_of_scales.int()] * outer + offset
    nested = (outer, signed, offset)
    for name, features, shape in (
        (f"linear_{num_bits}bit", 48, (2, 64)),
        (f"linear_{num_bits}bit_input_grad", 64, (2, 48)),
    ):
        op = getattr(ops, name)
        x = weight(shape).double().requires_grad_()
        for run in (op, getattr(reference, name)):
            ours = run(x, codes, codes_of_scales, book, 64, features, *nested)
            torch.testing.assert_close(ours, op(x, codes, scales, book, 64, features))
        assert torch.autograd.gradcheck(
            lambda x, op=op, n=features: op(x, codes, codes_of_scales, book, 64, n, *nested), x
        )
        torch.library.opcheck(op, (x.float(), codes, codes_of_scales, book, 64, features, *nested))


def test_a_product_keeps_scales_as_they_are_stored() -> None:
    codes, absmax = nf4_quantize(weight((48, 64)))
    small, outer = ops.quantize_8bit(absmax, torch.linspace(-1, 1, 256), 256)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = weight((2, 64)).requires_grad_()
        ops.linear_4bit(x, codes, small, CODEBOOK, 64, 48, outer, torch.linspace(-1, 1, 256), torch.tensor(0.5))
    assert {t.data_ptr() for t in kept} >= {codes.data_ptr(), small.data_ptr()}
    assert all(t.numel() <= 256 for t in kept if t.dtype is torch.float32)


def test_a_compiled_model_sees_through() -> None:
    codes, absmax = nf4_quantize(weight((8, 64)))

    def layer(x: Tensor) -> Tensor:
        return torch.relu(nf4_linear(x * 2, codes, absmax, (8, 64)) + 1)

    with torch.compiler.set_stance("default"):
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        for num_rows in (3, 5):
            x, other = (weight((num_rows, 64)).requires_grad_() for _ in range(2))
            ours, expected = compiled(x), layer(other)
            ours.sum().backward()
            expected.sum().backward()
            assert ours.equal(expected) and x.grad is not None and x.grad.equal(other.grad)  # type: ignore[arg-type]


def test_threads_change_nothing() -> None:
    w, x = weight((256, 320)), weight((3, 320), torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            codes, absmax = nf4_quantize(w)
            dense = nf4_dequantize(codes, absmax, (256, 320), torch.bfloat16)
            results.append((codes, absmax, dense, nf4_linear(x, codes, absmax, (256, 320))))
    finally:
        torch.set_num_threads(threads)
    assert all(one.equal(two) for one, two in zip(*results, strict=True))


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Libraries are looked for anew, before and after."""
    build.library.cache_clear()
    build._warn.cache_clear()
    cpu.compiled.cache_clear()
    yield
    build.library.cache_clear()
    cpu.compiled.cache_clear()


@pytest.mark.parametrize("how", ["forced", "no compiler"])
def test_without_the_library_the_reference_answers(forgotten: None, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    w, x = weight((8, 64)), weight((2, 64))
    codes, absmax = nf4_quantize(w)
    dense, y = nf4_dequantize(codes, absmax, (8, 64), torch.float32), nf4_linear(x, codes, absmax, (8, 64))
    build.library.cache_clear()
    cpu.compiled.cache_clear()
    monkeypatch.delenv("LORICA_KERNELS", raising=False)
    monkeypatch.setenv(*(("LORICA_KERNELS", "reference") if how == "forced" else ("CC", "no-such-compiler")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again, scales = nf4_quantize(w)
        assert again.equal(codes) and scales.equal(absmax)
        assert nf4_dequantize(codes, absmax, (8, 64), torch.float32).equal(dense)
        torch.testing.assert_close(nf4_linear(x, codes, absmax, (8, 64)), y)
        assert cpu.compiled() is None
    assert [str(one.message)[:34] for one in caught] == (
        [] if how == "forced" else ["the compiled parts cannot be built"]
    )


def test_what_cannot_be_is_refused_with_every_fault() -> None:
    with pytest.raises(
        ConfigError, match=r"block size 48 is none of 32, .*; the weight is torch.int64; .*; the weight is"
    ):
        nf4_quantize(torch.zeros(0, 3, dtype=torch.int64), 48)
    codes, absmax = nf4_quantize(weight((8, 64)))
    with pytest.raises(ConfigError, match=r"576 elements need 288 bytes of codes .uint8., not 256 of torch.uint8"):
        nf4_dequantize(codes, absmax, (9, 64), torch.float32)
    with pytest.raises(
        ConfigError, match=r"512 elements in blocks of 128 need 4 absmax .float32., not 8 of torch.float32"
    ):
        nf4_dequantize(codes, absmax, (8, 64), torch.float32, 128)
    with pytest.raises(ConfigError, match=r"shape \[8, 64\] takes inputs of 64 features, not \[2, 8\]"):
        nf4_linear(weight((2, 8)), codes, absmax, (8, 64))


def test_the_package_has_the_doors() -> None:
    assert lorica.kernels.nf4_quantize is nf4_quantize and lorica.kernels.nf4_dequantize is nf4_dequantize
