"""A linear layer whose frozen weight is a quantised tensor: what every method trains over, and none knows.

`QuantizedLinear` is an nn.Linear. Its `weight` is a property that dequantises when it is read, so whatever asks for the
base's weight (DoRA's norms, PiSSA's decomposition, a model that looks at its dtype) works in every format, and the
forward never reads it: the product takes the codes, and its backward dequantises again. What is stored, and how a state
dict shows it, is in `weight.py`.

What it gives up: reading `weight` costs a dequantisation each time, also where only its shape or dtype is wanted; and
transformers' Conv1D becomes a plain linear layer, with the weight that it stores transposed the other way round.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from lorica.errors import ModelError
from lorica.kernels.linear import Linear
from lorica.quant.blockwise import linear, linear_input_grad
from lorica.quant.weight import QuantizedWeight, frozen

_KINDS = (nn.Linear, Linear, Conv1D)


class QuantizedLinear(QuantizedWeight, nn.Linear):
    """y = x W^T + b, W [out, in] in codes; x and y of any floating dtype. `transposed`: it stood for a Conv1D."""

    bias: nn.Parameter | None  # type: ignore[assignment]

    def __init__(
        self, in_features: int, out_features: int, bias: nn.Parameter | None = None, **how_stored: Any
    ) -> None:
        QuantizedWeight.__init__(self, (out_features, in_features), **how_stored)
        self.in_features, self.out_features, self.bias = in_features, out_features, bias

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W [out, in] in `dtype`, dequantised anew."""
        return self.dense()

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.quantized, self.bias)

    def input_grad(self, grad: Tensor) -> Tensor:
        """grad W, [rows, in]: the gradient of the input from that of the output, [rows, out]."""
        return linear_input_grad(grad, self.quantized)

    def plain(self) -> nn.Linear:
        """A layer with the dequantised weight, and this one's bias."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight, made.bias = frozen(self.weight), self.bias  # type: ignore[assignment]
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination |= {f"{prefix}{name}": part for name, part in self.stored().items()}
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        mine = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        bias = mine.pop("bias", None)
        if self.bias is not None and bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)
        missing_keys += [f"{prefix}bias"] if self.bias is not None and bias is None else []
        unexpected_keys += [f"{prefix}bias"] if self.bias is None and bias is not None else []
        if "weight" not in mine:
            missing_keys.append(f"{prefix}weight")
            return
        try:
            device = self.codes.device
            self.take({name: part.to(device) for name, part in mine.items()})
        except ModelError as error:
            error_msgs.append(f"{prefix}weight: {error}")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme}, double_quant={self.nested_absmax is not None}"


def stored_layer(layer: nn.Module, transposed: bool) -> nn.Module:
    """`layer`, a plain linear one, as the model has it: a Conv1D where it stood for one."""
    if not transposed:
        return layer
    assert isinstance(layer, nn.Linear)
    made: Any = Conv1D(1, 1)
    made.nf, made.nx = layer.out_features, layer.in_features
    made.weight, made.bias = frozen(layer.weight.detach().t().contiguous()), layer.bias
    conv: nn.Module = made
    return conv


def quantizable(model: nn.Module, skip: Collection[str] = ()) -> dict[str, nn.Module]:
    """The linear layers of `model` that can be quantised, by name.

    Those left out are what `skip` means (names, beginnings up to a dot, or ends of them, as transformers reads
    `llm_int8_skip_modules`), kinds that are made from nn.Linear, and weights that two modules share.
    """
    holders: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and type(module) in _KINDS
        and holders[id(module._parameters["weight"])] == 1
        and should_convert_module(name, list(skip))
    }


def empty_like(layer: nn.Module, scheme: str, double_quant: bool, dtype: torch.dtype | None = None) -> QuantizedLinear:
    """A layer for the quantised weight of `layer`, on its device, with its bias and without contents."""
    weight, transposed = layer._parameters["weight"], isinstance(layer, Conv1D)
    assert weight is not None
    out_features, in_features = weight.shape[:: -1 if transposed else 1]
    made = QuantizedLinear(
        in_features,
        out_features,
        layer._parameters["bias"],
        scheme=scheme,
        double_quant=double_quant,
        dtype=dtype or weight.dtype,
        device=weight.device,
        transposed=transposed,
    )
    return made.train(layer.training)


def layers(model: nn.Module) -> Iterator[tuple[str, QuantizedWeight]]:
    """The quantised weights of `model`, layers and stacks of experts, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            yield name, module


def format_of(model: nn.Module) -> str | None:
    """In what the weights of `model` are quantised, such as `nf4, double_quant`; None where none is."""
    found = {(m.scheme, m.nested_absmax is not None) for _, m in layers(model)}
    return "; ".join(scheme + (", double_quant" if nested else "") for scheme, nested in sorted(found)) or None


def num_parameters(model: nn.Module) -> int:
    """The parameters of `model`, those of a quantised weight counted as the numbers that they stand for."""
    weights = [m for _, m in layers(model)]
    stored = {id(p) for m in weights for name, p in m.named_parameters() if name != "bias"}
    plain = sum(p.numel() for p in model.parameters() if id(p) not in stored)
    return plain + sum(m.shape.numel() for m in weights)
