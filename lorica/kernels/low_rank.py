"""A frozen linear layer and the low-rank update beside it, as one node of the autograd graph.

    y = W x + b + s B A z,    z = x, or x with dropout

Written as separate operations, backward makes two gradients of x, W^T g and A^T (s B^T g), as tensors of their own, and
adds them in another pass; here the second product is added into the first. Of dropout a byte an input is kept instead
of the dropped input, and of x what it was made of, where it has a recipe. Ten nodes and as many small tensors less for
each adapted layer are what counts in a small model.

On a CPU in float32 the update itself is C (`csrc/low_rank.c`): its seven products are thin, where libraries reach half
of their rate at rank 16 and a sixth at rank 8.

What it gives up: second derivatives, torch.func's transforms, and a gradient of W; `takes` says where that is nobody's
loss. The C is for layers whose sizes are multiples of 32 and for ranks up to 32; from there on libraries are as good.

Shapes: x [..., in], W [out, in], A [k, in], B [out, k].
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lorica.kernels.build import FLAGS, library
from lorica.kernels.linear import Conv1D as OurConv1D
from lorica.kernels.linear import Linear, is_stand_in, is_widened, linear
from lorica.kernels.made_again import Recipe, to_keep

_DENSE = (nn.Linear, Linear, Conv1D, OurConv1D)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch.nn.modules.module, f"_global{name}") for name in _HOOKS)
_MULTIPLE, _MOST_RANK, _FEWEST_ROWS = 32, 32, 48


def add_low_rank(y: Tensor, h: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """y + scale * h B^T, written into y: y [rows, out], h [rows, k], lora_b [out, k], in one product.

    The low-rank family shares this line: LoRA with h = A x, HydraLoRA with h = g (x) A x and its heads' B side by side.
    """
    if is_widened(y):
        return y.add_(linear(h, lora_b), alpha=scale)
    return y.addmm_(h, lora_b.to(y.dtype).t(), alpha=scale)


def takes(base: nn.Module) -> bool:
    """Whether `low_rank_linear` can go through `base`: a frozen linear layer whose output its weight and bias tell."""
    is_known = (type(base) in _DENSE or hasattr(base, "input_grad")) and "forward" not in vars(base)
    is_trained = any(p is not None and p.requires_grad for p in base._parameters.values())
    return is_known and not is_trained and not any(vars(base)[name] for name in _HOOKS) and not any(_GLOBAL_HOOKS)


def low_rank_linear(
    x: Tensor, base: nn.Module, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float = 0.0
) -> Tensor:
    """base(x) + scale * B A dropout(x) in the dtype of x; A and B are float32 and get float32 gradients.

    Args:
        base: one that `takes`.
        dropout: probability of dropping an input of the update; drawn from torch's generator of x's device.
    """
    # With A frozen nobody asks for x again.
    kept = to_keep(x) if torch.is_grad_enabled() and lora_a.requires_grad else (None, (x,))
    y: Tensor = _LowRankLinear.apply(x, base, lora_a, lora_b, scale, dropout, *kept)  # type: ignore[no-untyped-call]
    return y


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: nn.Module, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float,
        recipe: Recipe | None, ingredients: tuple[Tensor, ...],
    ) -> Tensor:  # fmt: skip
        rows = x.reshape(-1, x.shape[-1])
        kept = rows.new_empty(rows.shape, dtype=torch.bool).bernoulli_(1 - dropout) if dropout else None
        read, y = _dropped(rows, kept, dropout), base(rows)
        ctx.is_compiled = _is_compiled_for(read, y, lora_a, lora_b)
        if ctx.is_compiled:
            h = low_rank_(y, read, lora_a, lora_b, scale)
        else:
            h = linear(read, lora_a)
            add_low_rank(y, h, lora_b, scale)
        ctx.base, ctx.scale, ctx.dropout, ctx.recipe, ctx.shape = base, scale, dropout, recipe, x.shape
        # W so that it cannot be changed unseen; codes are not, for nothing writes into them.
        weight = base._parameters.get("weight")
        ctx.save_for_backward(lora_a, lora_b, h, kept, weight, *ingredients)
        # No view, so that the model may write into what it gets, as Llama 4 does.
        whole: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        lora_a, lora_b, h, kept, weight, *ingredients = ctx.saved_tensors
        needs_x, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        x = ingredients[0] if ctx.recipe is None else ctx.recipe.again(*ingredients)
        read = _dropped(x.reshape(-1, x.shape[-1]), kept, ctx.dropout)
        grad_x = input_grad(ctx.base, weight, grad) if needs_x else None
        # What dropout let through is added behind its mask.
        below = grad_x if grad_x is None or kept is None else torch.zeros_like(grad_x)
        if ctx.is_compiled:
            grad_a, grad_b = low_rank_backward(grad, read, h, lora_a, lora_b, ctx.scale, below)
        else:
            of_h = linear(grad, (lora_b * ctx.scale).t())
            grad_b = linear(grad.t(), h.t()).to(lora_b.dtype).mul_(ctx.scale) if needs_b else None
            grad_a = linear(of_h.t(), read.t()).to(lora_a.dtype) if needs_a else None
            if below is not None:
                add_low_rank(below, of_h, lora_a.t(), 1.0)
        if grad_x is not None:
            if below is not None and kept is not None:
                grad_x.add_(_dropped(below, kept, ctx.dropout))
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, grad_a if needs_a else None, grad_b if needs_b else None, None, None, None, None


def input_grad(base: nn.Module, weight: Tensor | None, grad: Tensor) -> Tensor:
    """The gradient of the rows that went into `base`, [rows, in], from that of its output [rows, out].

    weight: that of a dense base when it was called; others know theirs.
    """
    if weight is None:
        made: Tensor = base.input_grad(grad)  # type: ignore[operator]
        return made
    return linear(grad, weight.detach() if isinstance(base, Conv1D) else weight.detach().t())


def _dropped(rows: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
    return rows if kept is None else (rows * kept).mul_(1 / (1 - dropout))


class _LowRank(ctypes.Structure):
    """csrc/low_rank.c's `LowRank`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "outputs", "rank")), ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("x", "a", "b", "h", "y", "grad", "grad_x", "grad_a", "grad_b")),
    )  # fmt: skip


@cache
def compiled() -> Any:
    """The C library, or None where it cannot be."""
    built = library("low_rank.c", FLAGS)
    if built is not None:
        for function in (built.lorica_low_rank, built.lorica_low_rank_backward):
            function.argtypes = (ctypes.POINTER(_LowRank), ctypes.c_int)
    return built


def _is_compiled_for(x: Tensor, y: Tensor, lora_a: Tensor, lora_b: Tensor) -> bool:
    return (
        all(t.dtype is torch.float32 and t.is_cpu for t in (x, y, lora_a, lora_b))
        and x.shape[-1] % _MULTIPLE == y.shape[-1] % _MULTIPLE == 0
        and lora_a.shape[0] <= _MOST_RANK
        and x.shape[0] >= _FEWEST_ROWS
        and not is_stand_in()
        and compiled() is not None
    )


def _run(function: str, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, **tensors: Tensor | None) -> None:
    held = {"x": x.contiguous(), "a": lora_a.contiguous(), "b": lora_b.contiguous(), **tensors}
    places = {name: None if t is None else t.data_ptr() for name, t in held.items()}
    described = _LowRank(
        rows=x.shape[0], inputs=x.shape[1], outputs=lora_b.shape[0], rank=lora_b.shape[1], scale=scale, **places
    )
    if not getattr(compiled(), function)(ctypes.byref(described), torch.get_num_threads()):
        raise MemoryError(f"{function}: there is no memory for its sums")


def _low_rank_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    assert y.is_contiguous()
    h = _fake_low_rank_(y, x, lora_a, lora_b, scale)
    _run("lorica_low_rank", x, lora_a, lora_b, scale, h=h, y=y)
    return h


def _fake_low_rank_(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    return x.new_empty(x.shape[0], lora_a.shape[0])


def _low_rank_backward(
    grad: Tensor, x: Tensor, h: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, grad_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    assert grad_x is None or grad_x.is_contiguous()
    grad_a, grad_b = _fake_low_rank_backward(grad, x, h, lora_a, lora_b, scale, grad_x)
    made = {"grad_x": grad_x, "grad_a": grad_a, "grad_b": grad_b}
    _run("lorica_low_rank_backward", x, lora_a, lora_b, scale, h=h, grad=grad.contiguous(), **made)
    return grad_a, grad_b


def _fake_low_rank_backward(
    grad: Tensor, x: Tensor, h: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, grad_x: Tensor | None
) -> tuple[Tensor, Tensor]:
    return lora_a.new_empty(lora_a.shape), lora_b.new_empty(lora_b.shape)


_LIBRARY = torch.library.Library("lorica", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema, _kernel, _fake in (
    ("low_rank_", "(Tensor(a!) y, Tensor x, Tensor a, Tensor b, float scale) -> Tensor", _low_rank_, _fake_low_rank_),
    (
        "low_rank_backward",
        "(Tensor grad, Tensor x, Tensor h, Tensor a, Tensor b, float scale, Tensor(a!)? grad_x) -> (Tensor, Tensor)",
        _low_rank_backward,
        _fake_low_rank_backward,
    ),
):
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _kernel, "CPU")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _fake, "Meta")  # type: ignore[no-untyped-call]

low_rank_ = torch.ops.lorica.low_rank_.default
"""(y [rows, out], x [rows, in], A, B, scale) -> h = A x [rows, k]; scale B h is added to y. All float32."""

low_rank_backward = torch.ops.lorica.low_rank_backward.default
"""(grad of y, x, h, A, B, scale, grad_x or None) -> gradients of A and B; that of x is added to grad_x."""
