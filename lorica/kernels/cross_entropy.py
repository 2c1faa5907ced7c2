"""Cross-entropy of rows of logits with its gradient in their place, as one torch operator.

Written in torch it passes seven times over float32 copies of the logits; here a row is read, and written over with its
gradient, while it is in the cache: in C on a CPU (`csrc/loss.c`), in Triton on CUDA (`triton_loss.py`). What a model
does to its logits, z = cap tanh(scale x / cap) or scale x, and its derivative are part of it. All arithmetic is in
float32, whatever the logits are. Without a compiler, or Triton, the formula below does it block by block.

What it gives up: the logits are gone afterwards.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorica.kernels.build import FLAGS, TYPES, library

_BLOCK_BYTES = 4 << 20  # of the formula's float32 copy: it stays in the cache, and no plan has to count it
_P, _L, _F, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32


class _Loss(ctypes.Structure):
    """csrc/loss.c's `Loss`."""

    _fields_ = (
        ("logits", _P), ("targets", _P), ("losses", _P), ("rows", _L), ("columns", _L), ("scale", _F), ("cap", _F),
        ("type", _I), ("with_gradient", _I),
    )  # fmt: skip


@cache
def compiled() -> Any:
    """The C library, or None where it cannot be."""
    built = library("loss.c", FLAGS)
    if built is not None:
        built.lorica_cross_entropy.argtypes = (ctypes.POINTER(_Loss), ctypes.c_int)
    return built


def cross_entropy_(
    logits: Tensor, targets: Tensor, *, scale: float = 1.0, cap: float | None = None, with_gradient: bool = True
) -> Tensor:
    """-log softmax(z)[target] of each row, float32 [n]; `logits` x become its gradient d loss / d x if that is wanted.

    Args:
        logits: x [n, V], contiguous, of any floating dtype. Without a gradient they are left as they are.
        targets: int64 [n]. A row whose target is negative counts nothing: loss and gradient are zero.
        scale, cap: z = cap tanh(scale x / cap); no cap: z = scale x.

    Raises:
        IndexError: a target is V or more. On CUDA that row's loss is NaN instead, for nothing waits for the device.
    """
    losses: Tensor = torch.ops.lorica.cross_entropy_(logits, targets, scale, cap, with_gradient)
    if with_gradient:
        # Or autograd would take what it has kept of the logits, if it has, for what they were.
        torch.autograd.graph.increment_version(logits)
    return losses


def reference(logits: Tensor, targets: Tensor, scale: float, cap: float | None, with_gradient: bool) -> Tensor:
    """The formula in torch, a few rows at a time."""
    if targets.device.type == "cpu" and bool((targets >= logits.shape[1]).any()):
        raise _no_such_column(logits, targets)
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    step = max(1, _BLOCK_BYTES // (4 * logits.shape[1]))
    for some, wanted, loss in zip(*(torch.split(t, step) for t in (logits, targets, losses)), strict=True):
        counts, at = (wanted >= 0)[:, None], wanted.clamp(min=0)[:, None]
        z = some.to(torch.promote_types(some.dtype, torch.float32), copy=True).mul_(scale)
        slope = None
        if cap is not None:
            z = z.div_(cap).tanh_()
            slope = 1 - z.square()
            z = z.mul_(cap)
        z = z.sub_(z.amax(-1, keepdim=True))  # before the logarithm, which would be lost beside large logits
        log_sum = z.logsumexp(-1, keepdim=True)
        loss.copy_(torch.where(counts, log_sum - z.gather(1, at), 0)[:, 0])
        if not with_gradient:
            continue
        grad = z.sub_(log_sum).exp_()
        grad.scatter_add_(1, at, grad.new_full(at.shape, -1))
        grad = grad.mul_(scale) if slope is None else grad.mul_(scale).mul_(slope)
        some.copy_(torch.where(counts, grad, 0))
    return losses


def _on_cpu(logits: Tensor, targets: Tensor, scale: float, cap: float | None, with_gradient: bool) -> Tensor:
    built = compiled()
    if built is None or logits.dtype not in TYPES:
        return reference(logits, targets, scale, cap, with_gradient)
    assert logits.is_contiguous() and targets.is_contiguous() and targets.dtype is torch.int64
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32)
    loss = _Loss(
        logits.data_ptr(), targets.data_ptr(), losses.data_ptr(), rows, columns, scale, cap or 0.0,
        TYPES[logits.dtype], with_gradient,
    )  # fmt: skip
    done = built.lorica_cross_entropy(ctypes.byref(loss), torch.get_num_threads())
    if done < 0:
        raise MemoryError("lorica_cross_entropy: there is no memory for a row of logits")
    if not done:
        raise _no_such_column(logits, targets)
    return losses


def _on_cuda(logits: Tensor, targets: Tensor, scale: float, cap: float | None, with_gradient: bool) -> Tensor:
    try:
        from lorica.kernels import triton_loss
    except ImportError:
        return reference(logits, targets, scale, cap, with_gradient)
    if logits.dtype not in TYPES:
        return reference(logits, targets, scale, cap, with_gradient)
    losses: Tensor = triton_loss.cross_entropy_(logits, targets, scale, cap, with_gradient)
    return losses


def _fake(logits: Tensor, targets: Tensor, scale: float, cap: float | None, with_gradient: bool) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.float32)


def _no_such_column(logits: Tensor, targets: Tensor) -> IndexError:
    return IndexError(f"target {int(targets.max())} is none of the {logits.shape[1]} entries of a row of logits")


_LIBRARY = torch.library.Library("lorica", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "cross_entropy_(Tensor(a!) logits, Tensor targets, float scale, float? cap, bool with_gradient) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
for _key, _kernel in {
    "CompositeExplicitAutograd": reference,
    "CPU": _on_cpu,
    "CUDA": _on_cuda,
    "Meta": _fake,
}.items():
    _LIBRARY.impl("cross_entropy_", _kernel, _key)  # type: ignore[no-untyped-call]
