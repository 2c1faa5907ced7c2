"""The product of few rows in C, in every way in which it can be compiled, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.kernels import build, rows
from lorica.kernels.linear import linear
from tests.kernels.test_nf4_paths import DTYPES, MARCH, flags, pytestmark, runnable  # noqa: F401

SHAPES = ((1, 1), (5, 64), (33, 37), (17, 100), (18, 1090))


def rows_flags(simd: int) -> tuple[str, ...]:
    return (*flags(simd)[:1], "-Wall", "-Wextra", "-Wno-unused-function", "-Werror", *rows.FLAGS[1:])


@pytest.mark.parametrize("simd", MARCH)
def test_every_path_compiles_without_a_warning(simd: int) -> None:
    assert build.library("rows.c", rows_flags(simd)) is not None


@pytest.fixture(params=runnable())
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    built = rows.compiled(rows_flags(request.param))
    monkeypatch.setattr(rows, "compiled", lambda: built)
    yield request.param


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    got = rows.linear_rows(x, weight, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    # One rounding of the result, and what sums in float32 lose.
    limit = torch.finfo(x.dtype).eps / 2 * expected.abs() + torch.finfo(x.dtype).tiny
    limit += 1e-6 * (x.double().abs() @ weight.double().abs().T) + (0 if bias is None else 1e-6 * bias.abs())
    assert got.shape == expected.shape and got.dtype is x.dtype
    assert ((got.double() - expected).abs() <= limit).all(), (x.shape, weight.shape, weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", DTYPES)
def test_it_is_the_product_in_float64(path: int, dtype: torch.dtype, held: torch.dtype) -> None:
    torch.manual_seed(0)
    for outputs, inputs in SHAPES:
        weight, bias = torch.randn(outputs, inputs).to(held), torch.randn(outputs).to(dtype)
        for num_rows in (*range(1, 10), 16, 17, 40):
            check(torch.randn(num_rows, 1, inputs).to(dtype), weight, bias if num_rows % 2 else None)


def test_threads_share_the_outputs(path: int) -> None:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    try:
        for num_threads in (2, 3, 7):
            torch.set_num_threads(num_threads)
            for outputs in (300, 5):
                for num_rows in (1, 3, 9):
                    check(torch.randn(num_rows, 70000 // outputs), torch.randn(outputs, 70000 // outputs), None)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("num_rows", [3, 11])
def test_what_is_no_number_stays_in_its_row(path: int, num_rows: int) -> None:
    x, weight = torch.ones(num_rows, 50), torch.ones(9, 50)
    x[1, 3], x[2, 49] = float("nan"), float("inf")
    good = rows.linear_rows(x, weight).isfinite().all(-1).tolist()
    assert good == [True, False, False, *[True] * (num_rows - 3)]


@pytest.mark.parametrize("act", rows.ACTS)
@pytest.mark.parametrize("held", DTYPES)
def test_a_gated_mlp_is_its_formula_in_float64(path: int, act: str, held: torch.dtype) -> None:
    torch.manual_seed(0)
    function = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[act]
    for inputs, inner, outputs in ((7, 5, 3), (64, 100, 33)):
        gate, up = torch.randn(inner, inputs).to(held), torch.randn(inner, inputs).to(held)
        down = torch.randn(outputs, inner).to(held)
        for num_rows in (1, 3, 6, 18):
            x = torch.randn(1, num_rows, inputs) * 3
            g, u = x.double() @ gate.double().T, x.double() @ up.double().T
            hidden = function(g) * u
            got = rows.gated_rows(x, gate, up, down, act)
            # What float32 loses, in the hidden sizes and in their sums.
            limit = 1e-5 * (hidden.abs() + 1e-2) @ down.double().abs().T
            assert ((got.double() - hidden @ down.double().T).abs() <= limit).all(), (inputs, num_rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [0, 1, 3])
def test_what_an_adapter_adds_is_its_formula_in_float64(path: int, dtype: torch.dtype, num_heads: int) -> None:
    torch.manual_seed(0)
    for inputs, rank, outputs in ((7, 3, 5), (100, 16, 33)):
        lora_a, lora_b = torch.randn(rank, inputs), torch.randn(outputs, max(1, num_heads) * rank)
        router = torch.randn(num_heads, inputs) if num_heads else None
        for num_rows in (1, 4, 18):
            x, y = torch.randn(num_rows, inputs).to(dtype), torch.randn(num_rows, outputs).to(dtype)
            h, gates = x.double() @ lora_a.double().T, torch.ones(num_rows, 1).double()
            if router is not None:
                gates = (x.double() @ router.double().T / 1.5).softmax(-1)
            mixed = (gates[:, :, None] * h[:, None]).flatten(1)
            expected = y.double() + 0.5 * mixed @ lora_b.double().T
            got = rows.add_low_rank(y, x, lora_a, lora_b, 0.5, router, 1.5)
            limit = torch.finfo(dtype).eps * expected.abs() + 1e-5 * (mixed.abs() + 0.1) @ lora_b.double().abs().T
            assert got is y and ((y.double() - expected).abs() <= limit).all(), (inputs, num_rows)


def test_it_is_taken_in_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    kernel = rows.compiled()
    monkeypatch.setattr(rows, "compiled", lambda: calls.append(1) or kernel)
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    for mode in (False, True):
        with torch.no_grad(), torch.inference_mode(mode):
            torch.testing.assert_close(linear(x, weight), x @ weight.t())
        assert bool(calls) is mode


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float16])
def test_a_narrow_weight_gives_the_bits_of_its_wide_copy(path: int, held: torch.dtype) -> None:
    torch.manual_seed(0)
    for outputs, inputs in SHAPES:
        weight = torch.randn(outputs, inputs).to(held)
        for num_rows in (1, 2, 3, 4, 5, 9, 16, 17, 40):
            x = torch.randn(num_rows, inputs)
            assert torch.equal(rows.linear_rows(x, weight), rows.linear_rows(x, weight.float())), (num_rows, inputs)


def test_the_largest_of_a_row_is_torchs(path: int) -> None:
    nan, inf = float("nan"), float("inf")
    for size in (1, 7, 8, 33, 70000):
        x = torch.randn(5, size, generator=torch.Generator().manual_seed(size))
        x[1] = -inf
        # The first of several, in the vectors and behind them.
        x[2, size // 2], x[2, -1] = inf, inf
        x[3, -1] = nan
        x[4, size // 3], x[4, size // 2] = nan, nan
        assert torch.equal(rows.argmax(x), x.argmax(-1)), size
        assert torch.equal(rows.argmax(x.t().contiguous().t()), x.argmax(-1)), size
    assert torch.equal(rows.argmax(x.double()), x.argmax(-1))
