"""The starts from the base's weight against their papers' definitions, and that the base stays as it is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorica.errors import TargetError
from lorica.methods import inits
from lorica.methods.lora import LoRA
from lorica.methods.lora_kinds import LoraAdapter


def test_pissa_is_the_best_approximation_and_shares_the_singular_values() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 12)
    lora_a, lora_b = inits.pissa(weight, 4, scale=2.0, niter=None)
    singular = torch.linalg.svdvals(weight)
    # Eckart and Young: what is left has the remaining singular values.
    left = torch.linalg.svdvals(weight - 2.0 * lora_b @ lora_a)
    torch.testing.assert_close(left[:8], singular[4:], rtol=1e-4, atol=1e-4)
    # Equations 2 and 3 of the paper: both carry the root.
    for gram in (lora_a @ lora_a.T, lora_b.T @ lora_b):
        torch.testing.assert_close(gram, torch.diag(singular[:4] / 2.0), rtol=1e-4, atol=1e-4)


def test_the_randomised_pissa_finds_the_same_subspace() -> None:
    torch.manual_seed(0)
    # Singular values that fall as a power, as those of real weights do.
    u, v = torch.linalg.qr(torch.randn(60, 40))[0], torch.linalg.qr(torch.randn(40, 40))[0]
    weight = u * torch.arange(1, 41).float() ** -1 @ v.T
    exact, fast = (inits.pissa(weight, 4, 1.0, niter) for niter in (None, 16))
    torch.testing.assert_close(fast[1] @ fast[0], exact[1] @ exact[0], rtol=1e-3, atol=1e-3)


def test_olora_is_a_qr_decomposition() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 12)
    lora_a, lora_b = inits.olora(weight, 4, scale=2.0, niter=None)
    torch.testing.assert_close(lora_b.T @ lora_b, torch.eye(4), rtol=1e-5, atol=1e-5)
    assert not lora_a.tril(-1).any(), "R is upper triangular"
    # Of rank 12 the product is the whole weight.
    whole = inits.olora(weight, 12, 2.0, None)
    torch.testing.assert_close(whole[1] @ whole[0], weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[1][:, :4] @ whole[0][:4], lora_b @ lora_a, rtol=1e-5, atol=1e-5)


BASES = {
    "Linear": (lambda: nn.Linear(12, 20), (5, 12)),
    "Conv1D": (lambda: Conv1D(20, 12), (5, 12)),
    "Conv2d": (lambda: nn.Conv2d(3, 20, 2), (2, 3, 5, 5)),
}


@pytest.mark.parametrize("init", inits.FROM_WEIGHT)
@pytest.mark.parametrize("kind", BASES)
def test_training_is_that_of_the_papers_residual_base(kind: str, init: str) -> None:
    """The papers: y = (W - s B0 A0) x + s B A x. Ours: the same outputs and gradients, W as it was."""
    torch.manual_seed(0)
    make, shape = BASES[kind]
    base = make()
    before = base.weight.detach().clone()
    adapter = LoRA(rank=4, alpha=8, init=init).wrap(base, "x")
    assert isinstance(adapter, LoraAdapter) and adapter.num_parameters() == adapter.lora_a.numel() + 20 * 4
    x = torch.randn(shape)
    assert torch.equal(adapter(x), base(x)), "zero, not nearly zero"

    start = adapter.lora_b.detach().double().flatten(1) @ adapter.lora_a.detach().double().flatten(1)
    for parameter in (adapter.lora_a, adapter.lora_b):
        parameter.data += 0.1 * torch.randn_like(parameter)
    a, b = (p.detach().double().requires_grad_() for p in (adapter.lora_a, adapter.lora_b))
    w = (before.t() if kind == "Conv1D" else before).double()
    moved = w + 2.0 * (b.flatten(1) @ a.flatten(1) - start).view_as(w)
    if kind == "Conv2d":
        want = torch.nn.functional.conv2d(x.double(), moved, base.bias.double())
    else:
        want = x.double() @ moved.T + base.bias.double()
    got = adapter(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    want.square().sum().backward()
    for ours, theirs in ((adapter.lora_a, a), (adapter.lora_b, b)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(adapter.merged()(x), got, rtol=1e-5, atol=1e-5)
    assert torch.equal(base.weight, before)


def test_a_seed_gives_the_same_start() -> None:
    """A resumed run makes the start anew: checkpoints hold what is trained alone."""
    base = nn.Linear(40, 30)
    starts = []
    for _ in range(2):
        torch.manual_seed(3)
        adapter = LoRA(rank=4, init="pissa", svd_niter=4).wrap(base, "x")
        starts.append((adapter.start_a, adapter.start_b))
    (a, b), (again_a, again_b) = starts
    assert torch.equal(a, again_a) and torch.equal(b, again_b)


def test_16_bits_round_the_change_and_not_the_weight() -> None:
    """One small step in bfloat16: s (B A - B0 A0) x by two products would be lost in the rounding of s B A x."""
    torch.manual_seed(0)
    base = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    nn.init.normal_(base.weight)
    adapter = LoRA(rank=32, alpha=32, init="pissa").wrap(base, "x")
    assert isinstance(adapter, LoraAdapter)
    adapter.lora_b.data += 1e-3 * torch.randn_like(adapter.lora_b)
    x = torch.randn(64, 256, dtype=torch.bfloat16)
    lora_a, lora_b = adapter.pair()
    change = x.double() @ (lora_b.detach().double() @ lora_a.detach().double()).T
    a, b, a0, b0 = (t.detach().bfloat16() for t in (adapter.lora_a, adapter.lora_b, adapter.start_a, adapter.start_b))
    naive = (x @ a.T @ b.T).double() - (x @ a0.T @ b0.T).double()
    a, b = (t.detach().bfloat16() for t in (lora_a, lora_b))
    ours = (x @ a.T @ b.T).double()
    assert (ours - change).norm() < 0.02 * change.norm() < 0.2 * (naive - change).norm()


def test_a_rank_that_the_weight_does_not_have_is_refused() -> None:
    with pytest.raises(TargetError, match=r"init olora: rank 13 is more than q has, \[20, 12\]"):
        LoRA(rank=13, init="olora").wrap(nn.Linear(12, 20), "q")


def test_an_embedding_keeps_its_own_start() -> None:
    adapter = LoRA(rank=4, init="pissa").wrap(nn.Embedding(30, 8), "e")
    assert isinstance(adapter, LoraAdapter) and adapter.start_a is None and not adapter.lora_a.any()
    assert math.isclose(adapter.lora_b.std().item(), 1.0, abs_tol=0.5)
