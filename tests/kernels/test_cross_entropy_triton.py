"""The Triton cross-entropy against float64: on a GPU where there is one, else interpreted (tests/conftest.py)."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="needs triton, which needs no GPU: pip install triton")
kernels = importlib.import_module("lorica.kernels.triton_loss")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts off what does not fit bfloat16 where a GPU rounds to the nearest.
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}
TREATMENTS = {"plain": (1.0, None), "scaled": (0.3, None), "capped": (1.0, 5.0), "scaled and capped": (2.0, 30.0)}


def formula(logits: Tensor, targets: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor]:
    exact = logits.double().requires_grad_()
    z = exact * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    losses = F.cross_entropy(z, targets, reduction="none", ignore_index=-100)
    return losses.detach(), torch.autograd.grad(losses.sum(), exact)[0]


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_losses_and_gradients_are_those_of_the_formula(
    dtype: torch.dtype, treatment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 64)
    scale, cap = TREATMENTS[treatment]
    for vocabulary in (1, 7, 64, 65, 300):
        torch.manual_seed(vocabulary)
        logits, targets = (torch.randn(4, vocabulary) * 8).to(DEVICE, dtype), torch.randint(0, vocabulary, (4,))
        targets[2] = -100
        targets, before = targets.to(DEVICE), logits.clone()
        want, gradient = formula(logits, targets, scale, cap)
        only = kernels.cross_entropy_(logits, targets, scale, cap, False)
        assert logits.equal(before)
        losses = kernels.cross_entropy_(logits, targets, scale, cap, True)
        assert losses.equal(only) and losses[2] == 0 and not logits[2].any()
        torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
        assert ((logits.double() - gradient).abs() <= EPSILON[dtype] * gradient.abs() + 2e-6).all()


def test_masked_logits_and_extreme_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 64)
    logits = torch.zeros(2, 200, device=DEVICE)
    logits[0, :100] = -torch.inf
    logits[1, 3], logits[1, 199] = 1e4, -1e4
    targets = torch.tensor([150, 199], device=DEVICE)
    want, gradient = formula(logits, targets, 1.0, None)
    losses = kernels.cross_entropy_(logits, targets, 1.0, None, True)
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-6, atol=1e-6)


def test_a_target_beyond_the_vocabulary_and_what_is_not_finite_are_seen() -> None:
    logits = torch.zeros(3, 50, device=DEVICE)
    logits[1, 7] = torch.nan
    losses = kernels.cross_entropy_(logits, torch.tensor([50, 1, 1], device=DEVICE), 1.0, None, True)
    assert losses.isnan().tolist() == [True, True, False]


def test_cuda_takes_it_and_the_formula_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatch, without a GPU: the function that CUDA tensors go to."""
    from lorica.kernels import cross_entropy

    taken: list[Tensor] = []
    monkeypatch.setattr(kernels, "cross_entropy_", lambda logits, *_: taken.append(logits))
    logits, targets = torch.randn(3, 9), torch.tensor([0, 4, 8])
    cross_entropy._on_cuda(logits, targets, 1.0, None, True)
    assert taken[0] is logits
    monkeypatch.setitem(sys.modules, "lorica.kernels.triton_loss", None)
    monkeypatch.delattr("lorica.kernels.triton_loss")
    want, _ = formula(logits, targets, 1.0, None)
    torch.testing.assert_close(cross_entropy._on_cuda(logits, targets, 1.0, None, True).double(), want)
    assert len(taken) == 1
