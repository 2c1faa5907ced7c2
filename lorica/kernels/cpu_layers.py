"""Root-mean-square normalisation and the gate of an MLP in C (`csrc/layers.c`): torch operators with their gradients.

As torch operations a bfloat16 normalisation passes over memory ten times and an MLP's gate seven; these pass once, or
twice where a row's mean is needed first. On a processor that multiplies bfloat16 matrices fast, such passes are what a
step spends its time on. The arithmetic is float32.

What it gives up: activations other than those of `ACTS`, weights of another dtype than the input's and every device but
CPUs stay with torch (`models/lean.py` has both).
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lorica.kernels.build import FLAGS, TYPES, library
from lorica.kernels.linear import is_stand_in
from lorica.kernels.rows import ACTS

_P, _I, _L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Norm(ctypes.Structure):
    """csrc/layers.c's `Norm`."""

    _fields_ = (
        ("type", _I), ("plus_one", _I), ("rows", _L), ("size", _L), ("epsilon", ctypes.c_float),
        ("x", _P), ("weight", _P), ("grad", _P), ("out", _P), ("grad_x", _P), ("scale", _P),
    )  # fmt: skip


class _Gate(ctypes.Structure):
    """csrc/layers.c's `Gate`."""

    _fields_ = (
        ("type", _I), ("act", _I), ("count", _L), ("gate", _P), ("up", _P), ("grad", _P), ("out", _P),
        ("grad_gate", _P), ("grad_up", _P),
    )  # fmt: skip


@cache
def compiled() -> Any:
    """The C library, or None where it cannot be."""
    built = library("layers.c", FLAGS)
    if built is not None:
        for name, structure in (("lorica_rms_norm", _Norm), ("lorica_gate", _Gate)):
            for function in (name, f"{name}_backward"):
                getattr(built, function).argtypes = (ctypes.POINTER(structure), ctypes.c_int)
                getattr(built, function).restype = None
    return built


def takes(*tensors: Tensor) -> bool:
    """Whether the operators are there for these: on a CPU, all of one dtype."""
    first, *others = tensors
    dtype = first.dtype
    # No generator: a decoded token asks this for each normalisation.
    for tensor in others:
        if tensor.dtype is not dtype:
            return False
    return first.is_cpu and dtype in TYPES and not is_stand_in() and compiled() is not None


def _norm_of(x: Tensor, weight: Tensor, scale: Tensor, plus_one: bool, **more: Any) -> _Norm:
    return _Norm(
        type=TYPES[x.dtype], plus_one=plus_one, rows=scale.numel(), size=x.shape[-1],
        x=x.data_ptr(), weight=weight.data_ptr(), scale=scale.data_ptr(), **more,
    )  # fmt: skip


def _rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    out, scale = _fake_rms_norm(x, weight, eps, plus_one)
    described = _norm_of(x, weight, scale, plus_one, epsilon=eps, out=out.data_ptr())
    compiled().lorica_rms_norm(ctypes.byref(described), torch.get_num_threads())
    return out, scale


def _fake_rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, plus_one: bool) -> Tensor:
    grad, x, weight = grad.to(x.dtype).contiguous(), x.contiguous(), weight.contiguous()
    grad_x = x.new_empty(x.shape)
    described = _norm_of(x, weight, scale, plus_one, grad=grad.data_ptr(), grad_x=grad_x.data_ptr())
    compiled().lorica_rms_norm_backward(ctypes.byref(described), torch.get_num_threads())
    return grad_x


def _gate_of(gate: Tensor, up: Tensor, act: str, **more: Any) -> _Gate:
    return _Gate(
        type=TYPES[gate.dtype], act=ACTS.index(act), count=gate.numel(), gate=gate.data_ptr(), up=up.data_ptr(), **more
    )


def _gate(gate: Tensor, up: Tensor, act: str) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = gate.new_empty(gate.shape)
    described = _gate_of(gate, up, act, out=out.data_ptr())
    compiled().lorica_gate(ctypes.byref(described), torch.get_num_threads())
    return out


def _gate_backward(grad: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    grad, gate, up = grad.to(gate.dtype).contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    described = _gate_of(
        gate, up, act, grad=grad.data_ptr(), grad_gate=grad_gate.data_ptr(), grad_up=grad_up.data_ptr()
    )
    compiled().lorica_gate_backward(ctypes.byref(described), torch.get_num_threads())
    return grad_gate, grad_up


_LIBRARY = torch.library.Library("lorica", "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _schema, _kernel, _fake in (
    (
        "rms_norm",
        "(Tensor x, Tensor weight, float eps, bool plus_one) -> (Tensor, Tensor)",
        _rms_norm,
        _fake_rms_norm,
    ),
    (
        "rms_norm_backward",
        "(Tensor grad, Tensor x, Tensor weight, Tensor scale, bool plus_one) -> Tensor",
        _rms_norm_backward,
        lambda grad, x, *_: x.new_empty(x.shape),
    ),
    ("gate", "(Tensor gate, Tensor up, str act) -> Tensor", _gate, lambda gate, *_: gate.new_empty(gate.shape)),
    (
        "gate_backward",
        "(Tensor grad, Tensor gate, Tensor up, str act) -> (Tensor, Tensor)",
        _gate_backward,
        lambda grad, gate, up, act: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
    ),
):
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _kernel, "CPU")  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _fake, "Meta")  # type: ignore[no-untyped-call]

rms_norm = torch.ops.lorica.rms_norm.default
"""(x [..., E], weight [E], eps, plus_one) -> weight * x / sqrt(mean(x^2) + eps) in the dtype of x, and 1 / that root
[..., 1] in float32. With `plus_one` the factor is 1 + weight, and the quotient is not rounded before the product."""

rms_norm_backward = torch.ops.lorica.rms_norm_backward.default
"""(grad [..., E], x, weight, the forward's second result, plus_one) -> gradient of x."""

gate = torch.ops.lorica.gate.default
"""(gate, up, one of ACTS) -> act(gate) * up, all of one shape."""

gate_backward = torch.ops.lorica.gate_backward.default
"""(grad, gate, up, act) -> gradients of gate and up."""


def rms_norm_now(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """The first result of `rms_norm` without the dispatcher, where nothing looks on (`linear.is_unwatched`).

    In decoding this and the making of `_Norm` are most of its time.
    """
    x, size = x.contiguous(), x.shape[-1]
    out, rows = torch.empty_like(x), x.numel() // size
    place, held, to = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    described = _Norm(TYPES[x.dtype], plus_one, rows, size, eps, place, held, None, to)
    compiled().lorica_rms_norm(described, torch.get_num_threads())
    return out


def gate_now(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """`gate`, likewise."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    described = _Gate(
        TYPES[gate.dtype], ACTS.index(act), gate.numel(), gate.data_ptr(), up.data_ptr(), None, out.data_ptr()
    )
    compiled().lorica_gate(described, torch.get_num_threads())
    return out
