"""The blockwise kernels as torch operators, `torch.ops.lorica.*`: declared once, implemented per backend.

Being operators, they are opaque to `torch.compile`, which sees their shapes through the fakes below and fuses around
them, and autograd knows the derivative of the product. Formulas, shapes and dtypes are those of `reference.py`, which
also answers on every device that has no kernels of its own. Operators of the dispatcher cost 3 us a call where
`torch.library.custom_op` costs 10, which counts in decoding: a token passes through 7 of them a layer.

The codebook is an argument, so one operator serves all schemes. Only `x` has a derivative: codes are frozen. Products
take scales that are quantised themselves as they are: `absmax` is uint8 then, and behind the other arguments stand the
absmax of its blocks of 256, its levels and its offset. `linear_rows` has no derivative (kernels/linear.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorica.kernels import cpu, reference, rows

_LIBRARY = torch.library.Library("lorica", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMAS = {
    "quantize_4bit": "(Tensor x, Tensor codebook, int blocksize) -> (Tensor, Tensor)",
    "quantize_8bit": "(Tensor x, Tensor codebook, int blocksize) -> (Tensor, Tensor)",
    "dequantize_4bit": "(Tensor codes, Tensor absmax, Tensor codebook, int blocksize, SymInt[] shape, ScalarType dtype)"
    " -> Tensor",
    "dequantize_8bit": "(Tensor codes, Tensor absmax, Tensor codebook, int blocksize, ScalarType dtype) -> Tensor",
    "linear_4bit": "(Tensor x, Tensor codes, Tensor absmax, Tensor codebook, int blocksize, SymInt out_features,"
    " Tensor? nested=None, Tensor? levels=None, Tensor? offset=None) -> Tensor",
    "linear_4bit_input_grad": "(Tensor grad, Tensor codes, Tensor absmax, Tensor codebook, int blocksize,"
    " SymInt in_features, Tensor? nested=None, Tensor? levels=None, Tensor? offset=None) -> Tensor",
    "linear_rows": "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
}
for _name in ("linear_4bit", "linear_4bit_input_grad"):
    _SCHEMAS[_name.replace("4", "8")] = _SCHEMAS[_name]


def _fake_quantize_4bit(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(((x.numel() + 1) // 2, 1), dtype=torch.uint8)
    return codes, x.new_empty(-(-x.numel() // blocksize), dtype=torch.float32)


def _fake_quantize_8bit(x: Tensor, codebook: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    return codes, x.new_empty(-(-x.numel() // blocksize), dtype=torch.float32)


def _fake_dequantize_4bit(
    codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(shape, dtype=dtype)


def _fake_dequantize_8bit(
    codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _fake_product(
    x: Tensor, codes: Tensor, absmax: Tensor, codebook: Tensor, blocksize: int, features: int,
    *nested: Tensor,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], features))


def _fake_linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _on_cuda(name: str) -> Callable[..., Any]:
    """The Triton kernel, imported when it is first called; the reference where there is no Triton."""

    def run(*arguments: Any) -> Any:
        try:
            from lorica.kernels import triton_ops
        except ImportError:
            return getattr(reference, name)(*arguments)
        return getattr(triton_ops, name)(*arguments)

    return run


_FAKES: dict[str, Callable[..., Any]] = {
    "quantize_4bit": _fake_quantize_4bit,
    "quantize_8bit": _fake_quantize_8bit,
    "dequantize_4bit": _fake_dequantize_4bit,
    "dequantize_8bit": _fake_dequantize_8bit,
    "linear_4bit": _fake_product,
    "linear_4bit_input_grad": _fake_product,
    "linear_8bit": _fake_product,
    "linear_8bit_input_grad": _fake_product,
    "linear_rows": _fake_linear_rows,
}

for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)  # type: ignore[no-untyped-call]
    for _key, _kernel in {
        "CompositeExplicitAutograd": getattr(reference, _name),
        "CPU": getattr(rows if _name == "linear_rows" else cpu, _name),
        "CUDA": _on_cuda(_name),
        # As `register_fake` does it, which first looks for this file among those of all modules: 40 ms at each start.
        "Meta": _FAKES[_name],
    }.items():
        _LIBRARY.impl(_name, _kernel, _key)  # type: ignore[no-untyped-call]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, codes, absmax, codebook, ctx.blocksize, _, *nested = inputs
    ctx.features = x.shape[-1]
    ctx.save_for_backward(codes, absmax, codebook, *(part for part in nested if part is not None))


def _derivative(name: str, of: str) -> None:
    """The two products are each other's derivative, so derivatives of any order exist."""
    op = getattr(torch.ops.lorica, name).default

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        codes, absmax, codebook, *nested = ctx.saved_tensors
        made = op(grad, codes, absmax, codebook, ctx.blocksize, ctx.features, *nested)
        return made, *[None] * 8

    torch.library.register_autograd(f"lorica::{of}", backward, setup_context=_keep, lib=_LIBRARY)


for _bits in (4, 8):
    _derivative(f"linear_{_bits}bit_input_grad", of=f"linear_{_bits}bit")
    _derivative(f"linear_{_bits}bit", of=f"linear_{_bits}bit_input_grad")

quantize_4bit = torch.ops.lorica.quantize_4bit.default
quantize_8bit = torch.ops.lorica.quantize_8bit.default
dequantize_4bit = torch.ops.lorica.dequantize_4bit.default
dequantize_8bit = torch.ops.lorica.dequantize_8bit.default
linear_4bit = torch.ops.lorica.linear_4bit.default
linear_4bit_input_grad = torch.ops.lorica.linear_4bit_input_grad.default
linear_8bit = torch.ops.lorica.linear_8bit.default
linear_8bit_input_grad = torch.ops.lorica.linear_8bit_input_grad.default
linear_rows = torch.ops.lorica.linear_rows.default
