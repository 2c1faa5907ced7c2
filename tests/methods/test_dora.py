"""DoRA against its own equation in float64, whose norm is a constant for autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.methods.dora import DoRA, DoraLinear
from lorica.methods.lora import LoRA


def made(kind: type[nn.Module], bias: bool = True, options: DoRA | None = None, scale: float = 1.7) -> DoraLinear:
    torch.manual_seed(0)
    base = nn.Linear(12, 20, bias=bias) if kind is nn.Linear else Conv1D(20, 12)
    if base.bias is not None:
        nn.init.normal_(base.bias)
    adapter = DoraLinear(base, options or DoRA(), rank=4, scale=scale)
    nn.init.normal_(adapter.lora_b, std=0.3)
    nn.init.normal_(adapter.magnitude)
    return adapter


@pytest.mark.parametrize(("kind", "bias"), [(nn.Linear, True), (nn.Linear, False), (Conv1D, True)])
def test_it_follows_the_equation_in_float64(kind: type[nn.Module], bias: bool) -> None:
    adapter = made(kind, bias)
    x = torch.randn(3, 5, 12, requires_grad=True)
    y = adapter(x)
    g = torch.randn_like(y)
    y.backward(g)

    w, a, b, m, x64 = (
        t.detach().double().requires_grad_()
        for t in (adapter.base.weight, adapter.lora_a, adapter.lora_b, adapter.magnitude, x)
    )
    directions = (w if kind is nn.Linear else w.T) + 1.7 * b @ a
    # Section 4.3: the norm gets no gradient.
    want = x64 @ (m[:, None] * directions / directions.detach().square().sum(1, keepdim=True).sqrt()).T
    want = want + adapter.base.bias.double() if bias else want
    want.backward(g.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    for ours, exact in ((x, x64), (adapter.lora_a, a), (adapter.lora_b, b), (adapter.magnitude, m)):
        assert ours.grad is not None and exact.grad is not None
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_merged_rows_are_as_long_as_their_magnitudes(kind: type[nn.Module]) -> None:
    adapter = made(kind)
    weight = adapter.merged().weight.detach()  # type: ignore[union-attr, operator]
    rows = weight if kind is nn.Linear else weight.T
    torch.testing.assert_close(rows.norm(dim=1), adapter.magnitude.detach().abs(), rtol=1e-5, atol=1e-6)


def test_the_start_measures_the_rows_of_the_weight() -> None:
    base = nn.Linear(12, 20)
    adapter = DoraLinear(base, DoRA(), rank=4, scale=1.0)
    torch.testing.assert_close(adapter.magnitude.detach(), base.weight.norm(dim=1))
    assert torch.equal(adapter.magnitude, adapter.row_norms())


def test_a_row_of_zeros_stays_finite() -> None:
    base = nn.Linear(12, 20)
    base.weight.data[3] = 0
    adapter = DoraLinear(base, DoRA(), rank=4, scale=1.0)
    x = torch.randn(5, 12)
    assert torch.equal(adapter(x), base(x))
    adapter(x).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in adapter.parameters() if p.requires_grad)
    nn.init.normal_(adapter.lora_b)
    assert bool(adapter.merged().weight.isfinite().all())  # type: ignore[union-attr, operator]


def test_the_norm_in_bfloat16_is_near_the_one_in_float32() -> None:
    adapter = made(nn.Linear)
    exact = (adapter.base.weight + 1.7 * adapter.lora_b @ adapter.lora_a).norm(dim=1)
    adapter.base.to(torch.bfloat16)
    torch.testing.assert_close(adapter.row_norms(), exact.detach(), rtol=5e-3, atol=0)


def test_dropout_acts_on_the_low_rank_branch_in_training_only() -> None:
    adapter = made(nn.Linear, options=DoRA(dropout=0.25))
    x = torch.randn(64, 12)
    adapter.eval()
    assert torch.equal(adapter(x), adapter(x))
    adapter.train()
    torch.manual_seed(1)
    got = adapter(x)
    torch.manual_seed(1)
    low = F.dropout(x, 0.25) @ adapter.lora_a.T @ adapter.lora_b.T
    gain = adapter.magnitude / adapter.row_norms()
    torch.testing.assert_close(got, gain * (x @ adapter.base.weight.T + 1.7 * low) + adapter.base.bias)


def test_scale_and_count_are_loras_and_one_magnitude_a_row() -> None:
    model = nn.Sequential(nn.Linear(12, 20))
    (dora,) = lorica.adapters(lorica.adapt(model, DoRA(rank=4, alpha=8, rslora=True, targets="0"))).values()
    (lora,) = lorica.adapters(
        lorica.adapt(lorica.detach(model), LoRA(rank=4, alpha=8, rslora=True, targets="0"))
    ).values()
    assert dora.scale == lora.scale == 4.0
    assert dora.num_parameters() == lora.num_parameters() + 20
