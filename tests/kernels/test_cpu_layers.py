"""Normalisation and gates in C: against float64, on odd sizes, in every dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.kernels import cpu_layers
from lorica.kernels.linear import never_widened

pytestmark = pytest.mark.skipif(cpu_layers.compiled() is None, reason="there is no C compiler")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Of one element: a rounding to the dtype, or float32's own in a sum.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(1, 3), (3, 7), (2, 5, 64), (4, 65), (1, 3, 200), (300, 96)]


def normed(x: Tensor, weight: Tensor, plus_one: bool) -> Tensor:
    return (weight + 1 if plus_one else weight) * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def assert_near(got: Tensor, want: Tensor, roundings: int = 1) -> None:
    tolerance = roundings * TOLERANCE[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * float(want.abs().max()) / 4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plus_one", [False, True])
def test_the_normalisation_and_its_gradient_equal_float64(
    shape: tuple[int, ...], dtype: torch.dtype, plus_one: bool
) -> None:
    torch.manual_seed(0)
    x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1]).to(dtype)
    out, scale = cpu_layers.rms_norm(x, weight, 1e-5, plus_one)
    x64 = x.double().requires_grad_()
    want = normed(x64, weight.double(), plus_one)
    want.backward(grad.double())
    # Llama rounds the quotient before the product, and so does this; Gemma does not.
    assert_near(out, want.detach(), roundings=1 if plus_one else 2)
    torch.testing.assert_close(scale.double(), (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt())
    assert_near(cpu_layers.rms_norm_backward(grad, x, weight, scale, plus_one), x64.grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", cpu_layers.ACTS)
def test_the_gate_and_its_gradients_equal_float64(shape: tuple[int, ...], dtype: torch.dtype, act: str) -> None:
    torch.manual_seed(0)
    gate, up, grad = ((3 * torch.randn(shape)).to(dtype) for _ in range(3))
    gate64, up64 = (t.double().requires_grad_() for t in (gate, up))
    want = (F.silu(gate64) if act == "silu" else F.gelu(gate64, approximate="tanh")) * up64
    want.backward(grad.double())
    assert_near(cpu_layers.gate(gate, up, act), want.detach())
    grad_gate, grad_up = cpu_layers.gate_backward(grad, gate, up, act)
    assert_near(grad_gate, gate64.grad)
    assert_near(grad_up, up64.grad)


@pytest.mark.parametrize("act", cpu_layers.ACTS)
def test_gates_far_from_zero_do_not_overflow(act: str) -> None:
    gate = torch.tensor([-1e12, -1e4, -100.0, -0.0, 0.0, 100.0, 1e4, 1e12])
    ones = torch.ones_like(gate)
    assert cpu_layers.gate(gate, ones, act).tolist() == [0, 0, 0, 0, 0, *gate[5:].tolist()]
    slope, active = cpu_layers.gate_backward(ones, gate, ones, act)
    assert slope.tolist() == [0, 0, 0, 0.5, 0.5, 1, 1, 1]
    assert torch.equal(active, cpu_layers.gate(gate, ones, act))


def test_a_nan_is_not_lost() -> None:
    x = torch.tensor([[1.0, math.nan, 2.0], [1.0, 2.0, 3.0]])
    out, _ = cpu_layers.rms_norm(x, torch.ones(3), 1e-5, False)
    assert out.isnan().tolist() == [[True] * 3, [False] * 3]
    assert cpu_layers.gate(x, torch.ones(2, 3), "silu").isnan().tolist() == x.isnan().tolist()


def test_tensors_that_are_views_and_ones_without_rows() -> None:
    x = torch.randn(6, 40)[::2, ::2]
    out, _ = cpu_layers.rms_norm(x, torch.ones(20), 1e-5, False)
    torch.testing.assert_close(out, F.rms_norm(x, (20,), eps=1e-5))
    torch.testing.assert_close(cpu_layers.gate(x, x.t().reshape(3, 20), "silu"), F.silu(x) * x.t().reshape(3, 20))
    assert cpu_layers.gate(x[:0], x[:0], "silu").shape == (0, 20)
    assert cpu_layers.rms_norm(x[:0], torch.ones(20), 1e-5, False)[1].shape == (0, 1)


def test_the_operators_keep_torchs_contract() -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    out, scale = cpu_layers.rms_norm(x, weight, 1e-5, False)
    for op, inputs in (
        (cpu_layers.rms_norm, (x, weight, 1e-5, True)),
        (cpu_layers.rms_norm_backward, (out, x, weight, scale, True)),
        (cpu_layers.gate, (x, out, "silu")),
        (cpu_layers.gate_backward, (x, x, out, "gelu_tanh")),
    ):
        torch.library.opcheck(op, inputs, test_utils=("test_schema", "test_faketensor"))


def test_what_they_do_not_take() -> None:
    x = torch.randn(2, 8)
    assert cpu_layers.takes(x, x)
    assert not cpu_layers.takes(x, x.bfloat16())
    assert not cpu_layers.takes(x.double())
    assert not cpu_layers.takes(x.to("meta"))
    with never_widened():
        assert not cpu_layers.takes(x)
