"""Cross-entropy of rows of logits and its gradient in their place, for CUDA: `csrc/loss.c` in Triton.

A program takes a row and goes through it twice: for its greatest value and the sum, kept up to date block by block, and
to write the gradient. It reads the logits twice and writes them once; a copy in float32 never exists.

State: equal to float64 under Triton's interpreter (tests/kernels/test_cross_entropy_triton.py); not yet run on a GPU.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lorica.kernels.triton_ops import launch

_BLOCK = 4096
_WARPS = 8


@triton.jit
def _capped(x, cap):
    """cap * tanh(x / cap) and its derivative by x, both exact where they are small."""
    e = tl.exp(-2 * tl.abs(x) / cap)
    over = 1 / (1 + e)
    return tl.where(x < 0, -cap, cap) * (1 - e) * over, 4 * e * over * over


@triton.jit
def _cross_entropy(
    logits,
    targets,
    losses,
    columns,
    scale,
    cap,
    HAS_CAP: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    counts = target >= 0
    place = logits + row * columns
    # Not minus infinity, whose difference from itself is no number; and beyond float32 all would become float64.
    most = -3.4e38
    total = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(place + column, mask=column < columns, other=0).to(tl.float32) * scale
        if HAS_CAP:
            z, _ = _capped(z, cap)
        z = tl.where(column < columns, z, float("-inf"))
        now = tl.maximum(most, tl.max(z))
        total = total * tl.exp(most - now) + tl.sum(tl.exp(z - now))
        most = now
    # A target that is no column gives NaN: on the device nobody can raise an error.
    wanted = tl.load(place + target, mask=counts & (target < columns), other=float("nan")).to(tl.float32) * scale
    if HAS_CAP:
        wanted, _ = _capped(wanted, cap)
    tl.store(losses + row, tl.where(counts, (most - wanted) + tl.log(total), 0.0))
    if WITH_GRADIENT:
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = tl.load(place + column, mask=column < columns, other=0).to(tl.float32) * scale
            factor = tl.where(counts, scale, 0.0)
            if HAS_CAP:
                z, slope = _capped(z, cap)
                factor *= slope
            grad = (tl.exp(z - most) / total - tl.where(column == target, 1.0, 0.0)) * factor
            tl.store(place + column, grad.to(logits.dtype.element_ty), mask=column < columns)


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float, cap: float | None, with_gradient: bool) -> Tensor:
    """See `cross_entropy.py`."""
    assert logits.is_contiguous() and targets.is_contiguous() and targets.dtype is torch.int64
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        launch(
            _cross_entropy, (rows,), logits, targets, losses, columns, float(scale), float(cap or 1.0),
            HAS_CAP=cap is not None, WITH_GRADIENT=with_gradient,
            BLOCK=min(_BLOCK, triton.next_power_of_2(columns)), num_warps=_WARPS,
        )  # fmt: skip
    return losses
