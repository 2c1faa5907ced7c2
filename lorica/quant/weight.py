"""What every quantised weight is: bytes in frozen parameters, which a state dict shows in the layout of bitsandbytes.

    weight                                 the codes, uint8 [ceil(n / 2), 1]
    weight.absmax                          float32 [ceil(n / 64)]; uint8 with double quantisation
    weight.quant_map                       the 16 levels, float32
    weight.nested_absmax, .nested_quant_map    of the scales, with double quantisation
    weight.quant_state.bitsandbytes__nf4   a JSON text as uint8: shape, dtype, sizes of blocks, offset of the scales

Bytes, since a cast of the model must leave them alone and no optimizer can train them; parameters, since FSDP shards
them, as it does not with buffers. `linear.py` has the layer whose weight this is, `experts.py` the stack of a mixture's
experts.
"""

from __future__ import annotations

import json
from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from lorica.errors import ConfigError, ModelError
from lorica.quant.blockwise import DoubleQuant, Quantized, dequantize, num_quantized_bytes, quantize
from lorica.quant.codebooks import bits, codebook

BLOCKSIZE = 64
"""Elements of a block: QLoRA's, and bitsandbytes' default."""

OF_BITSANDBYTES = ("nf4", "fp4")
"""The schemes whose state dict is bitsandbytes' own."""

_NUM_SAMPLES = 64

Mender = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From what quantising takes from a weight, float32 [out, in], to A [rank, in] and B [out, rank] with B A near it."""


class QuantizedWeight(nn.Module, ABC):
    """A module that holds one quantised tensor of `shape`.

    Attributes:
        codes, absmax: frozen parameters, uint8 in one dimension and bytes; float32 numbers as their four bytes.
        nested_absmax, nested_offset: of doubly quantised scales, in bytes as well; None otherwise.
        dtype: what it is dequantised to.
        transposed: it was made of a matrix that lay the other way round.
        origin: `fingerprint` of the tensor before it was quantised; None where that was not seen.
        mender: shown what quantising takes away, where somebody wants to start from that; `mended` is what it made.
    """

    nested_absmax: nn.Parameter | None
    nested_offset: nn.Parameter | None

    def __init__(
        self,
        shape: Sequence[int],
        *,
        scheme: str = "nf4",
        double_quant: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        transposed: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.shape = torch.Size(shape)
        self.scheme, self.blocksize, self.dtype, self.transposed = scheme, BLOCKSIZE, dtype, transposed
        self.origin: bytes | None = None
        self.mender: Mender | None = None
        self.mended: tuple[Tensor, Tensor] | None = None
        num_elements = self.shape.numel()
        num_codes = -(-num_elements * bits(scheme) // 8)
        num_scales = -(-num_elements // BLOCKSIZE)
        num_nested = num_quantized_bytes(num_elements, scheme, BLOCKSIZE, True) - num_codes - num_scales - 4
        self.codes = frozen(torch.empty(num_codes, dtype=torch.uint8, device=device))
        self.absmax = frozen(torch.empty(num_scales * (1 if double_quant else 4), dtype=torch.uint8, device=device))
        for name, size in {"nested_absmax": num_nested, "nested_offset": 4}.items():
            nested = frozen(torch.empty(size, dtype=torch.uint8, device=device)) if double_quant else None
            self.register_parameter(name, nested)

    @property
    def quantized(self) -> Quantized:
        """The tensor as it is stored."""
        nested: DoubleQuant | None = None
        absmax: Tensor = self.absmax
        if self.nested_absmax is None or self.nested_offset is None:
            absmax = absmax.view(torch.float32)
        else:
            offset = self.nested_offset.view(torch.float32)[0]
            nested = DoubleQuant(self.nested_absmax.view(torch.float32), offset)
        codes = self.codes.view(self.shape if bits(self.scheme) == 8 else (-1, 1))
        return Quantized(codes, absmax, self.shape, self.dtype, self.scheme, self.blocksize, nested)

    def name_in_state(self, name: str) -> str:
        """The name that the tensor has in a state dict, where this module stands at `name`."""
        return f"{name}.weight"

    def dense(self) -> Tensor:
        """The tensor in its shape and `dtype`, dequantised anew."""
        return dequantize(self.quantized)

    def take(self, stored: Mapping[str, Tensor]) -> None:
        """Become what `stored` holds: a plain tensor, that is quantised now, or the parts of one that is.

        Args:
            stored: `weight`, and the other parts by the names above.

        Raises:
            ModelError: it is of another shape, or in a format that is not known.
            ConfigError: it cannot be quantised.
        """
        weight = stored.get("weight")
        if weight is not None and weight.is_floating_point() and len(stored) == 1:
            self.check_shape(weight.shape)
            self.origin = fingerprint(weight)
            oriented = (weight.t() if self.transposed else weight).detach()
            self.hold(quantize(oriented, self.scheme, self.blocksize, self.nested_absmax is not None))
            if self.mender is not None:
                self.mended = self.mender(oriented - dequantize(self.quantized, torch.float32))
        else:
            self.origin = None
            self.hold(read_stored(stored, self.shape))

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ModelError where a plain tensor of `shape` is none for this."""
        expected = self.shape[::-1] if self.transposed else self.shape
        if tuple(shape) != tuple(expected):
            raise ModelError(f"a weight of shape {[*shape]} stands where one of {[*expected]} is expected")

    def hold(self, quantized: Quantized) -> None:
        """Become `quantized`."""
        nested = quantized.nested
        self.codes, self.absmax = frozen(_bytes(quantized.codes)), frozen(_bytes(quantized.absmax))
        self.nested_absmax = None if nested is None else frozen(_bytes(nested.absmax))
        self.nested_offset = None if nested is None else frozen(_bytes(nested.offset))
        self.scheme, self.blocksize = quantized.scheme, quantized.blocksize
        # Else transformers fills, at the end of loading, what it did not load itself.
        self._is_hf_initialized = True

    def stored(self) -> dict[str, Tensor]:
        """The parts by their names in a state dict."""
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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What casts a model casts what is dequantised; the bytes stay."""
        self.dtype = fn(torch.empty(1, dtype=self.dtype, device=self.codes.device)).dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def read_stored(stored: Mapping[str, Tensor], shape: torch.Size) -> Quantized:
    """A tensor of `shape` from its parts in bitsandbytes' layout.

    Raises:
        ModelError: parts are missing, or they say something else than is expected.
    """
    key = next((name for name in stored if ".quant_state." in name), "")
    scheme = key.rpartition("__")[2]
    if not key or "weight" not in stored or "weight.absmax" not in stored:
        raise ModelError(f"it is not quantised as bitsandbytes does: it has the parts {', '.join(sorted(stored))}")
    try:
        state = {"shape": [], "blocksize": 0, **json.loads(bytes(stored[key].tolist()))}
    except ValueError as error:
        raise ModelError(f"{key} is damaged: {error}") from None
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
    if ("nested_blocksize" in state) != ("weight.nested_absmax" in stored):
        raise ModelError("its scales are quantised, and weight.nested_absmax is missing or should not be there")
    nested, scales, codes = None, stored["weight.absmax"], _bytes(stored["weight"]).view(-1, 1)
    if "weight.nested_absmax" in stored:
        if state["nested_blocksize"] != 256:
            raise ModelError(f"its scales are quantised in blocks of {state['nested_blocksize']}, not of 256")
        absmax = stored["weight.nested_absmax"].float()
        nested = DoubleQuant(absmax, torch.tensor(state["nested_offset"], dtype=torch.float32, device=absmax.device))
    num_scales = -(-shape.numel() // state["blocksize"])
    found = [codes.numel(), scales.numel(), *([nested.absmax.numel()] if nested else [])]
    expected = [-(-shape.numel() * bits(scheme) // 8), num_scales, *([-(-num_scales // 256)] if nested else [])]
    if found != expected:
        raise ModelError(f"its codes, scales and scales of scales have {found} elements, not {expected}")
    dtype = getattr(torch, state["dtype"])
    return Quantized(codes, scales if nested else scales.float(), shape, dtype, scheme, state["blocksize"], nested)


def fingerprint(tensor: Tensor) -> bytes:
    """What tells one weight from another: its shape and up to 64 values spread over it, rounded to bfloat16."""
    flat = tensor.detach().reshape(-1)
    return fingerprint_of(tensor.shape, flat[sampled(flat.numel())])


def sampled(num_elements: int) -> slice:
    """Which elements of a flattened tensor `fingerprint` looks at."""
    step = max(1, num_elements // _NUM_SAMPLES)
    return slice(0, step * _NUM_SAMPLES, step)


def fingerprint_of(shape: Sequence[int], sample: Tensor) -> bytes:
    """The fingerprint of a tensor of `shape` whose `sampled` elements are `sample`."""
    return f"{tuple(shape)}\n".encode() + sample.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes()


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that is not trained."""
    return nn.Parameter(tensor, requires_grad=False)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _state_key(scheme: str) -> str:
    return f"quant_state.{'bitsandbytes' if scheme in OF_BITSANDBYTES else 'lorica'}__{scheme}"
