"""Products of 16-bit tensors where the CPU has no arithmetic for them, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D as PlainConv1D

from lorica.kernels import linear as door
from lorica.kernels import rows
from lorica.kernels.linear import Conv1D, Linear, is_widened, linear


@pytest.fixture
def poor_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "cpu_computes", lambda dtype: dtype.itemsize > 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_float64_rounded_once(
    poor_cpu: None, dtype: torch.dtype, shape: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).requires_grad_()
    weight = torch.randn(4, 5, requires_grad=True)
    b = torch.randn(4).to(dtype).requires_grad_() if bias else None
    inputs = [t for t in (x, weight, b) if t is not None]
    y = linear(x, weight, b)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, inputs, grad)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    want = torch.nn.functional.linear(*exact)
    expected = torch.autograd.grad(want, exact, grad.double())
    assert is_widened(x) and y.dtype is dtype
    torch.testing.assert_close(y.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    for mine, theirs, source in zip(got, expected, inputs, strict=True):
        assert mine.dtype is source.dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [True, False])
def test_few_rows_without_a_gradient(
    poor_cpu: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, compiled: bool
) -> None:
    if not compiled:
        monkeypatch.setattr(rows, "compiled", lambda: None)
    torch.manual_seed(0)
    for num_rows in (0, 1, 3, 32, 33):
        # Neither need be contiguous.
        x, weight = torch.randn(37, num_rows).to(dtype).t(), torch.randn(37, 9).to(dtype).t()
        with torch.inference_mode():
            y = linear(x, weight)
        limit = torch.finfo(dtype).eps / 2 * (x.double() @ weight.double().t()).abs()
        limit += 1e-6 * (x.double().abs() @ weight.double().abs().t())
        assert y.dtype is dtype and y.shape == (num_rows, 9)
        assert ((y.double() - x.double() @ weight.double().t()).abs() <= limit).all()


def test_a_frozen_weight_keeps_no_input(poor_cpu: None) -> None:
    x = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x, torch.randn(4, 5))
    assert [tuple(t.shape) for t in kept] == [(4, 5)]


def test_float32_takes_torchs_own_path(poor_cpu: None) -> None:
    x, weight = torch.randn(3, 5), torch.randn(4, 5, dtype=torch.float64)
    assert not is_widened(x)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight.float()))


def test_the_layer_shares_the_parameters_it_was_made_from(poor_cpu: None) -> None:
    layer = nn.Linear(5, 4).bfloat16().eval()
    ours = Linear(layer)
    assert ours.weight is layer.weight and ours.bias is layer.bias and not ours.training
    assert isinstance(ours, nn.Linear) and list(ours.state_dict()) == list(layer.state_dict())
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    torch.testing.assert_close(ours(x), layer(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bias", [False, True])
def test_a_large_narrow_weight_is_widened_in_parts(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setattr(door, "_PART", 100)
    torch.manual_seed(0)
    x, weight, b = torch.randn(5, 20, 30), torch.randn(150, 30).bfloat16(), torch.randn(150) if bias else None
    with torch.no_grad():
        expected = torch.nn.functional.linear(x, weight.float(), b)
        torch.testing.assert_close(linear(x, weight, b), expected, rtol=1e-5, atol=1e-5)


def test_a_conv1d_is_transformers_own() -> None:
    torch.manual_seed(0)
    layer = PlainConv1D(12, 7)
    ours = Conv1D(layer)
    assert isinstance(ours, PlainConv1D) and torch.equal(ours.weight, layer.weight) and ours.weight.t().is_contiguous()
    for num_rows in (1, 6, 100):
        x = torch.randn(2, num_rows, 7)
        with torch.inference_mode():
            torch.testing.assert_close(ours(x), layer(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours(x), layer(x), rtol=1e-5, atol=1e-6)
