"""A linear layer whose frozen weight is a quantised tensor: what every method trains over, and none knows.

`QuantizedLinear` is an nn.Linear. Its `weight` is a property that dequantises when it is read, so whatever asks for the
base's weight (DoRA's norms, PiSSA's decomposition, a model that looks at its dtype) works in every format, and the
forward never reads it: the product takes the codes, and its backward dequantises again.

All that is stored is bytes in frozen parameters: a cast of the model leaves them alone, no optimizer can train them,
and FSDP shards them, as it does not with buffers. A state dict holds them in the layout of bitsandbytes, so a saved
model is one that transformers and bitsandbytes load:

    weight                                 the codes, uint8 [ceil(n / 2), 1]
    weight.absmax                          float32 [ceil(n / 64)]; uint8 with double quantisation
    weight.quant_map                       the 16 levels, float32
    weight.nested_absmax, .nested_quant_map    of the scales, with double quantisation
    weight.quant_state.bitsandbytes__nf4   a JSON text as uint8: shape, dtype, sizes of blocks, offset of the scales

What it gives up: reading `weight` costs a dequantisation each time, also where only its shape or dtype is wanted; and
transformers' Conv1D becomes a plain linear layer, with the weight that it stores transposed the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from lorica.errors import ConfigError, ModelError
from lorica.kernels import ops
from lorica.kernels.linear import Linear
from lorica.quant.blockwise import DoubleQuant, Quantized, dequantize, linear, num_quantized_bytes, quantize
from lorica.quant.codebooks import bits, codebook

BLOCKSIZE = 64
"""Elements of a block: QLoRA's, and bitsandbytes' default."""

OF_BITSANDBYTES = ("nf4", "fp4")
"""The schemes whose state dict is bitsandbytes' own."""

_KINDS = (nn.Linear, Linear, Conv1D)


class QuantizedLinear(nn.Linear):
    """y = x W^T + b, W [out, in] in codes; x and y of any floating dtype.

    Attributes:
        codes, absmax: frozen parameters, uint8 in one dimension and bytes; float32 numbers as their four bytes.
        nested_absmax, nested_offset: of doubly quantised scales, in bytes as well; None otherwise.
        dtype: what `weight` is dequantised to.
        transposed: the layer stood for a Conv1D, whose weight is [in, out].
        origin: `fingerprint` of the weight before it was quantised; None where that was not seen.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]
    nested_absmax: nn.Parameter | None
    nested_offset: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None = None,
        *,
        scheme: str = "nf4",
        double_quant: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = in_features, out_features, bias
        self.scheme, self.blocksize, self.dtype, self.transposed = scheme, BLOCKSIZE, dtype, transposed
        self.origin: bytes | None = None
        num_elements = in_features * out_features
        num_codes = -(-num_elements * bits(scheme) // 8)
        num_scales = -(-num_elements // BLOCKSIZE)
        num_nested = num_quantized_bytes(num_elements, scheme, BLOCKSIZE, True) - num_codes - num_scales - 4
        self.codes = _frozen(torch.empty(num_codes, dtype=torch.uint8, device=device))
        self.absmax = _frozen(torch.empty(num_scales * (1 if double_quant else 4), dtype=torch.uint8, device=device))
        sizes = {"nested_absmax": num_nested, "nested_offset": 4}
        for name, size in sizes.items():
            nested = _frozen(torch.empty(size, dtype=torch.uint8, device=device)) if double_quant else None
            self.register_parameter(name, nested)

    @property
    def quantized(self) -> Quantized:
        """The weight as it is stored."""
        nested, absmax = None, self.absmax.detach()
        if self.nested_absmax is None or self.nested_offset is None:
            absmax = absmax.view(torch.float32)
        else:
            offset = self.nested_offset.detach().view(torch.float32)[0]
            nested = DoubleQuant(self.nested_absmax.detach().view(torch.float32), offset)
        shape = torch.Size((self.out_features, self.in_features))
        codes = self.codes.detach().view(shape if bits(self.scheme) == 8 else (-1, 1))
        return Quantized(codes, absmax, shape, self.dtype, self.scheme, self.blocksize, nested)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """W [out, in] in `dtype`, dequantised anew."""
        return dequantize(self.quantized)

    def forward(self, input: Tensor) -> Tensor:
        quantized = self.quantized
        if quantized.nested is None or not (torch.is_grad_enabled() and input.requires_grad):
            return linear(input, quantized, self.bias)
        y: Tensor = _Product.apply(input, quantized)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def plain(self) -> nn.Linear:
        """A layer with the dequantised weight, and this one's bias."""
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight, made.bias = _frozen(self.weight), self.bias  # type: ignore[assignment]
        return made

    def take(self, stored: Mapping[str, Tensor]) -> None:
        """Become what `stored` holds: a plain weight, that is quantised now, or the parts of one that is.

        Args:
            stored: by the names behind the layer's in a state dict, without its bias.

        Raises:
            ModelError: it is no weight of this layer, or in a format that is not known.
        """
        weight = stored["weight"]
        if weight.is_floating_point() and len(stored) == 1:
            shape = (self.in_features, self.out_features)[:: 1 if self.transposed else -1]
            if tuple(weight.shape) != shape:
                raise ModelError(f"a weight of shape {[*weight.shape]} stands where one of {[*shape]} is expected")
            self.origin = fingerprint(weight)
            oriented = (weight.t() if self.transposed else weight).detach()
            double_quant = self.nested_absmax is not None
            self._hold(quantize(oriented, self.scheme, self.blocksize, double_quant))
        else:
            self.origin = None
            self._hold(read_stored(stored, torch.Size((self.out_features, self.in_features))))
        # Else transformers fills, at the end of loading, what it did not load itself.
        self._is_hf_initialized = True

    def _hold(self, quantized: Quantized) -> None:
        nested = quantized.nested
        self.codes, self.absmax = _frozen(_bytes(quantized.codes)), _frozen(_bytes(quantized.absmax))
        self.nested_absmax = None if nested is None else _frozen(_bytes(nested.absmax))
        self.nested_offset = None if nested is None else _frozen(_bytes(nested.offset))
        self.scheme, self.blocksize = quantized.scheme, quantized.blocksize

    def stored(self) -> dict[str, Tensor]:
        """The weight's parts by their names in a state dict."""
        found = self.quantized
        state: dict[str, Any] = {
            "quant_type": self.scheme,
            "blocksize": self.blocksize,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": list(found.shape),
        }
        # Tensors of their own for each layer: a file of safetensors holds none twice.
        parts = {"weight": found.codes, "weight.absmax": found.absmax}
        parts["weight.quant_map"] = codebook(self.scheme).to(found.codes.device, copy=True)
        if found.nested is not None:
            parts["weight.nested_absmax"] = found.nested.absmax
            parts["weight.nested_quant_map"] = codebook("dynamic").to(found.codes.device, copy=True)
            offset = 0.0 if found.nested.offset.is_meta else float(found.nested.offset)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        text = json.dumps(state).encode()
        parts[f"weight.{_state_key(self.scheme)}"] = torch.tensor(list(text), dtype=torch.uint8)
        return parts

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What casts a model casts what is dequantised; the bytes stay."""
        self.dtype = fn(torch.empty(1, dtype=self.dtype, device=self.codes.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.scheme}, double_quant={self.nested_absmax is not None}"


class _Product(torch.autograd.Function):
    """x W^T that keeps nothing for backward: scales that are quantised themselves would be kept as float32, an eighth
    of the weight's size.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Quantized) -> Tensor:
        ctx.quantized = quantized
        return linear(x, quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        q: Quantized = ctx.quantized
        product = ops.linear_4bit_input_grad if bits(q.scheme) == 4 else ops.linear_8bit_input_grad
        levels = codebook(q.scheme, q.codes.device)
        return product(grads[0], q.codes, q.scales(), levels, q.blocksize, q.shape[1]), None


def read_stored(stored: Mapping[str, Tensor], shape: torch.Size) -> Quantized:
    """A weight [out, in] = `shape` from its parts in bitsandbytes' layout, by their names behind the layer's.

    Raises:
        ModelError: parts are missing, or they say something else than is expected.
    """
    key = next((name for name in stored if ".quant_state." in name), "")
    scheme = key.rpartition("__")[2]
    if not key or "weight.absmax" not in stored:
        raise ModelError(f"it is not quantised as bitsandbytes does: it has the parts {', '.join(sorted(stored))}")
    state = json.loads(bytes(stored[key].tolist()))
    if tuple(state["shape"]) != tuple(shape):
        raise ModelError(f"a quantised weight of shape {state['shape']} stands where one of {[*shape]} is expected")
    try:
        levels = codebook(scheme)
    except ConfigError as error:
        raise ModelError(str(error)) from None
    told, nested_told = stored.get("weight.quant_map", levels), stored.get("weight.nested_quant_map")
    maps = [(told, levels), *([] if nested_told is None else [(nested_told, codebook("dynamic"))])]
    if not all(ours.equal(theirs.float().to(ours.device)) for theirs, ours in maps):
        raise ModelError(f"its levels are not those of {scheme}")
    nested = None
    if "weight.nested_absmax" in stored:
        if state["nested_blocksize"] != 256:
            raise ModelError(f"its scales are quantised in blocks of {state['nested_blocksize']}, not of 256")
        absmax = stored["weight.nested_absmax"].float()
        nested = DoubleQuant(absmax, torch.tensor(state["nested_offset"], dtype=torch.float32, device=absmax.device))
    scales = stored["weight.absmax"]
    codes = _bytes(stored["weight"]).view(-1, 1)
    dtype = getattr(torch, state["dtype"])
    return Quantized(codes, scales if nested else scales.float(), shape, dtype, scheme, state["blocksize"], nested)


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


def layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantised layers of `model`, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
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
    return plain + sum(m.in_features * m.out_features for m in weights)


def fingerprint(tensor: Tensor) -> bytes:
    """What tells one weight from another: its shape and up to 64 values spread over it, rounded to bfloat16."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // 64)][:64]
    return f"{tuple(tensor.shape)}\n".encode() + sample.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _state_key(scheme: str) -> str:
    return f"quant_state.{'bitsandbytes' if scheme in OF_BITSANDBYTES else 'lorica'}__{scheme}"
