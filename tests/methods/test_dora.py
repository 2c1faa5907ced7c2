"""DoRA against its own equation in float64, whose norm is a constant for autograd."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.errors import NotMergeableError, TargetError
from lorica.methods.dora import DoRA, DoraConv, DoraEmbedding, DoraLinear
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


def test_dropout_acts_on_the_low_rank_branch_in_training_only(check_dropout: Any) -> None:
    adapter, x = made(nn.Linear, options=DoRA(dropout=0.25)), torch.randn(64, 12)

    def wanted() -> torch.Tensor:
        low = F.dropout(x, 0.25) @ adapter.lora_a.T @ adapter.lora_b.T
        return adapter.gain() * (x @ adapter.base.weight.T + 1.7 * low) + adapter.base.bias

    check_dropout(adapter, x, wanted)


def randomised(adapter: Any) -> Any:
    for parameter in (adapter.lora_a, adapter.lora_b, adapter.magnitude):
        nn.init.normal_(parameter, std=0.3)
    return adapter


@pytest.mark.parametrize(
    "base",
    [
        nn.Conv1d(6, 8, 3, stride=2, padding=1, dilation=2),
        nn.Conv2d(6, 8, (3, 1), padding=(2, 0), padding_mode="reflect", bias=False),
        nn.Conv3d(6, 8, 2),
    ],
    ids=str,
)
def test_a_convolution_is_its_turned_kernel(base: Any) -> None:
    torch.manual_seed(0)
    adapter = randomised(DoraConv(base, DoRA(), rank=4, scale=0.7))
    x = torch.randn(2, 6, *([7] * len(base.kernel_size)))
    kernel = base.weight.double() + 0.7 * torch.einsum(
        "or,ri...->oi...", adapter.lora_b.double().flatten(1), adapter.lora_a.double()
    )
    lengths = kernel.flatten(1).norm(dim=1)
    reference = copy.deepcopy(base).double()
    shape = (8, *(1,) * (kernel.dim() - 1))
    reference.weight.data = (adapter.magnitude.double().view(shape) / lengths.view(shape) * kernel).detach()
    torch.testing.assert_close(adapter(x).double(), reference(x.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.merged().weight.double(), reference.weight, rtol=1e-5, atol=1e-5)
    adapter(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (adapter.lora_a, adapter.lora_b, adapter.magnitude))


def test_an_embeddings_rows_are_its_dimensions_and_its_factor_is_kept() -> None:
    torch.manual_seed(0)
    base = GemmaTextScaledWordEmbedding(30, 8, 0, embed_scale=2.5)
    adapter = randomised(DoraEmbedding(base, DoRA(), rank=4, scale=0.5))
    table = base.weight.double() + 0.5 * (adapter.lora_b.double() @ adapter.lora_a.double()).T
    table = table / table.norm(dim=0) * adapter.magnitude.double()
    ids = torch.randint(0, 30, (2, 7))
    torch.testing.assert_close(adapter(ids).double(), 2.5 * table[ids], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.merged()(ids), adapter(ids), rtol=1e-5, atol=1e-5)


def test_groups_must_divide_the_rank_and_cannot_be_merged() -> None:
    base = nn.Conv1d(6, 8, 3, groups=2)
    with pytest.raises(TargetError, match="2 groups, which must divide the rank; it is 3"):
        DoRA(rank=3).wrap(base, "x")
    with pytest.raises(NotMergeableError, match="2 groups"):
        DoRA(rank=4).wrap(base, "x").merged()


def test_scale_and_count_are_loras_and_one_magnitude_a_row() -> None:
    model = nn.Sequential(nn.Linear(12, 20))
    (dora,) = lorica.adapters(lorica.adapt(model, DoRA(rank=4, alpha=8, rslora=True, targets="0"))).values()
    (lora,) = lorica.adapters(
        lorica.adapt(lorica.detach(model), LoRA(rank=4, alpha=8, rslora=True, targets="0"))
    ).values()
    assert dora.scale == lora.scale == 4.0
    assert dora.num_parameters() == lora.num_parameters() + 20
