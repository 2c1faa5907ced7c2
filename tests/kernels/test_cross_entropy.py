"""Cross-entropy with its gradient in place against float64: in torch, and in C in every way in which it compiles."""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorica.kernels import build, cross_entropy
from lorica.kernels.cross_entropy import cross_entropy_

MARCH = {512: "x86-64-v4", 256: "x86-64-v3", 0: "x86-64"}
NEEDS = {512: "avx512bw", 256: "avx2", 0: "sse2"}
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of each gradient: what rounding it to the logits' dtype costs."""
TREATMENTS = {
    "plain": (1.0, None), "scaled": (0.3, None), "capped": (1.0, 5.0), "scaled and capped": (2.0, 30.0),
}  # fmt: skip
VOCABULARIES = (1, 7, 99, 512, 513, 1300)
Run = Callable[..., Tensor]


def case(vocabulary: int, dtype: torch.dtype, rows: int = 5) -> tuple[Tensor, Tensor]:
    """Logits, one row far from 0, and targets, one of which counts nothing."""
    torch.manual_seed(vocabulary)
    logits, targets = torch.randn(rows, vocabulary) * 8, torch.randint(0, vocabulary, (rows,))
    logits[1] += 500.0
    targets[2] = -100
    return logits.to(dtype), targets


def formula(logits: Tensor, targets: Tensor, scale: float, cap: float | None) -> tuple[Tensor, Tensor]:
    """Losses and gradients, float64."""
    exact = logits.detach().to(torch.float64, copy=True).requires_grad_()
    z = exact * scale
    z = z if cap is None else cap * torch.tanh(z / cap)
    losses = F.cross_entropy(z, targets, reduction="none", ignore_index=-100)
    return losses.detach(), torch.autograd.grad(losses.sum(), exact)[0]


def check(run: Run, vocabulary: int, dtype: torch.dtype, scale: float, cap: float | None, rows: int = 5) -> None:
    logits, targets = case(vocabulary, dtype, rows)
    want, want_gradient = formula(logits, targets, scale, cap)
    untouched = logits.clone()
    only = run(untouched, targets, scale=scale, cap=cap, with_gradient=False)
    assert untouched.equal(logits)
    losses = run(logits, targets, scale=scale, cap=cap, with_gradient=True)
    # Where scale times logit is no float32 number, it is off by half a unit of 500, which no loss can undo.
    limit = 1e-5 * want + (2e-6 if scale == 1.0 and cap is None else 1e-4)
    for given in (losses, only):
        assert given.dtype is torch.float32 and ((given.double() - want).abs() <= limit).all()
    slack = EPSILON[dtype] * want_gradient.abs() + (1e-6 if scale == 1.0 and cap is None else 1e-4) * scale
    assert logits.dtype is dtype and ((logits.double() - want_gradient).abs() <= slack).all()
    assert losses[2] == 0 and not logits[2].any()


def in_torch(logits: Tensor, targets: Tensor, **arguments: Any) -> Tensor:
    return cross_entropy.reference(logits, targets, **arguments)


@pytest.mark.parametrize("treatment", TREATMENTS)
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
@pytest.mark.parametrize("run", [cross_entropy_, in_torch])
def test_losses_and_gradients_are_those_of_the_formula(
    run: Run, dtype: torch.dtype, treatment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "_BLOCK_BYTES", 1 << 12)
    for vocabulary in VOCABULARIES:
        check(run, vocabulary, dtype, *TREATMENTS[treatment])


def test_threads_share_the_rows() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        check(cross_entropy_, 3000, torch.float32, 1.0, None, rows=11)
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module", params=sorted(MARCH))
def simd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Compiled with vectors of so many bits, warnings being errors; skipped where the processor lacks them."""
    if platform.machine() != "x86_64" or shutil.which("cc") is None:
        pytest.skip("the paths are those of x86-64, and need a C compiler")
    if os.environ.get("LORICA_KERNELS") == "reference":
        pytest.skip("LORICA_KERNELS forbids compiled parts")
    flags = (f"-march={MARCH[request.param]}", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-psabi")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "cache_folder", lambda: tmp_path_factory.mktemp("cache"))
        patch.setattr(cross_entropy, "FLAGS", (*flags, *cross_entropy.FLAGS[1:]))
        cross_entropy.compiled.cache_clear()
        assert cross_entropy.compiled() is not None
        if NEEDS[request.param] not in Path("/proc/cpuinfo").read_text().split():
            cross_entropy.compiled.cache_clear()
            pytest.skip(f"this processor has no {NEEDS[request.param]}")
        yield request.param
    cross_entropy.compiled.cache_clear()


@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_every_path_is_right(simd: int, dtype: torch.dtype) -> None:
    for treatment in TREATMENTS.values():
        for vocabulary in VOCABULARIES:
            check(cross_entropy_, vocabulary, dtype, *treatment)


@pytest.mark.parametrize("run", [cross_entropy_, in_torch])
def test_extreme_logits_are_those_of_float64(run: Run) -> None:
    rows = [
        [1e4, -1e4, 0.0, 1e4],  # softmax 1/2, 0, 0, 1/2
        [-1e4, 1e4, 0.0, 0.0],  # a loss of 20,000
        [-torch.inf, 0.0, 1.0, -torch.inf],  # logits that a model has masked
        [0.0, -torch.inf, 3e38, -3e38],
    ]
    logits, targets = torch.tensor(rows), torch.tensor([0, 0, 2, 2])
    want, gradient = formula(logits, targets, 1.0, None)
    losses = run(logits, targets, scale=1.0, cap=None, with_gradient=True)
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), gradient, rtol=1e-6, atol=1e-6)


def test_a_masked_first_block_is_none_of_the_sum() -> None:
    logits = torch.zeros(2, 1200)
    logits[:, :700] = -torch.inf
    losses = cross_entropy_(logits, torch.tensor([900, 3]))
    assert losses[0].item() == pytest.approx(math.log(500)) and losses[1].item() == math.inf
    assert not logits[0, :700].any() and float(logits[0, 900]) == pytest.approx(1 / 500 - 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("run", [cross_entropy_, in_torch])
def test_what_is_not_finite_is_not_lost(run: Run, value: float) -> None:
    """A run that diverges has to be seen."""
    logits = torch.zeros(2, 700)
    logits[0, 600] = value
    losses = run(logits, torch.tensor([5, 5]), scale=1.0, cap=None, with_gradient=True)
    assert not losses[0].isfinite() and losses[1].isfinite() and not logits[0].isfinite().all()


@pytest.mark.parametrize("run", [cross_entropy_, in_torch])
def test_a_target_beyond_the_vocabulary_is_refused_and_nothing_is_changed(run: Run) -> None:
    logits = torch.zeros(2, 7)
    with pytest.raises(IndexError, match=r"target 7 is none of the 7"):
        run(logits, torch.tensor([0, 7]), scale=1.0, cap=None, with_gradient=True)
    assert not logits.any()


def test_float64_stays_float64() -> None:
    logits, targets = case(99, torch.float64)
    want, gradient = formula(logits, targets, 1.0, 5.0)
    losses = cross_entropy_(logits, targets, cap=5.0)
    torch.testing.assert_close(losses.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, gradient, rtol=1e-12, atol=1e-12)


def test_it_is_an_operator_as_torch_wants_it() -> None:
    logits, targets = case(99, torch.float32)
    torch.library.opcheck(torch.ops.lorica.cross_entropy_.default, (logits, targets, 1.0, 5.0, True))


def test_autograd_refuses_logits_that_it_has_kept_for_itself() -> None:
    """A head whose derivative is made of its output would get a wrong one; it is told."""
    x = torch.randn(2, 9, requires_grad=True)
    logits = x.exp()
    gradient = logits.detach()
    cross_entropy_(gradient, torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(logits, x, gradient)
