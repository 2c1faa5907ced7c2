"""VeRA against its own equation in float64, and the one pair that all layers share."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import lorica
from lorica.methods.vera import VeRA, VeraLinear


def made(kind: type[nn.Module], **fields: Any) -> VeraLinear:
    """An adapter on [20, 12], narrower than the shared pair."""
    torch.manual_seed(0)
    base = nn.Linear(12, 20) if kind is nn.Linear else Conv1D(20, 12)
    nn.init.normal_(base.bias)
    options = VeRA(rank=6, **fields)
    pair = [nn.Parameter(t, requires_grad=False) for t in options.draw(14, 25, torch.device("cpu"))]
    adapter = VeraLinear(base, options, *pair)
    nn.init.normal_(adapter.vera_lambda_b)
    nn.init.normal_(adapter.vera_lambda_d)
    return adapter


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_it_follows_the_equation_in_float64(kind: type[nn.Module]) -> None:
    adapter = made(kind)
    x = torch.randn(3, 5, 12, requires_grad=True)
    y = adapter(x)
    g = torch.randn_like(y)
    y.backward(g)

    w, bias, a, big_b, d, b, x64 = (
        t.detach().double().requires_grad_()
        for t in (
            adapter.base.weight,
            adapter.base.bias,
            adapter.shared_a[:, :12],
            adapter.shared_b[:20],
            adapter.vera_lambda_d,
            adapter.vera_lambda_b,
            x,
        )
    )
    update = torch.diag(b) @ big_b @ torch.diag(d) @ a
    want = x64 @ ((w if kind is nn.Linear else w.T) + update).T + bias
    want.backward(g.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    for ours, exact in ((x, x64), (adapter.vera_lambda_d, d), (adapter.vera_lambda_b, b)):
        assert ours.grad is not None and exact.grad is not None
        torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)
    assert adapter.shared_a.grad is None and adapter.shared_b.grad is None


def test_the_pair_is_kaiming_uniform_and_comes_from_the_seed() -> None:
    cpu = torch.device("cpu")
    a, b = VeRA(rank=64, seed=3).draw(400, 300, cpu)
    for matrix, fan_in in ((a, 400), (b, 64)):
        bound = math.sqrt(6 / fan_in)
        assert 0.99 * bound < matrix.abs().max() <= bound
        assert abs(matrix.std().item() - bound / math.sqrt(3)) < 0.02 * bound
    again, other = VeRA(rank=64, seed=3).draw(400, 300, cpu), VeRA(rank=64, seed=4).draw(400, 300, cpu)
    assert torch.equal(again[0], a) and torch.equal(again[1], b) and not torch.equal(other[0], a)


def test_all_layers_share_one_pair_and_keep_it_when_the_model_moves(tiny_llama: Any) -> None:
    model = lorica.adapt(tiny_llama(), VeRA(rank=8))
    for moved in (model, copy.deepcopy(model), model.to(torch.bfloat16)):
        found = lorica.adapters(moved).values()
        for name, shape in (("shared_a", (8, 48)), ("shared_b", (48, 8))):
            assert len({id(getattr(adapter, name)) for adapter in found}) == 1
            assert len({getattr(adapter, name).data_ptr() for adapter in found}) == 1
            assert getattr(next(iter(found)), name).shape == shape


def test_the_count_is_one_number_an_output_and_one_a_rank(tiny_llama: Any) -> None:
    model = lorica.adapt(tiny_llama(), VeRA(rank=8, targets=("q_proj", "down_proj")))
    assert sum(p.numel() for p in lorica.trainable_parameters(model).values()) == 2 * (2 * (32 + 8))


def test_d_starts_where_the_options_say() -> None:
    model = lorica.adapt(nn.Sequential(nn.Linear(3, 4)), VeRA(rank=2, d_initial=0.5))
    (adapter,) = lorica.adapters(model).values()
    assert adapter.vera_lambda_d.tolist() == [0.5, 0.5] and adapter.vera_lambda_b.tolist() == [0.0] * 4  # type: ignore[union-attr, operator]


def test_dropout_acts_on_the_adapters_branch_in_training_only(check_dropout: Any) -> None:
    adapter, x = made(nn.Linear, dropout=0.25), torch.randn(64, 12)

    def wanted() -> torch.Tensor:
        h = F.dropout(x, 0.25) @ adapter.shared_a[:, :12].T * adapter.vera_lambda_d
        return adapter.base(x) + h @ adapter.shared_b[:20].T * adapter.vera_lambda_b

    check_dropout(adapter, x, wanted)
