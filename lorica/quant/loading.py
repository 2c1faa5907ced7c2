"""Quantised models: made from one in memory (`quantize`), or while a checkpoint streams in, a tensor at a time.

transformers loads, through its registry of quantisers: it hands each tensor of a checkpoint to `_Quantize`, which turns
it into codes before the next one is read, so no more than one tensor is ever held in 16 or 32 bits. Checkpoints that
bitsandbytes or we have quantised are read as they are, by `_Deserialize`. What is saved is bitsandbytes' layout
(`linear.py`) under its own name in config.json, so transformers needs bitsandbytes to read it, and Lorica does not.

Files are mapped into memory, and pages that were read stay: after each tensor they are given back, or the process
would grow by the size of the whole checkpoint.

What it gives up: expert tensors of a mixture of experts stay in 16 bits, and so does, on purpose, the output head.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorica.errors import ConfigError, ModelError
from lorica.quant.codebooks import codebook
from lorica.quant.linear import OF_BITSANDBYTES, QuantizedLinear, empty_like, layers, quantizable

NAME = "lorica"
HEADS = ("lm_head",)
# A masked language model's checkpoint lacks it, and then it has to be made anew and trained.
_LEFT_OUT = (".*pooler",)
_MADV_DONTNEED = 4

Model = TypeVar("Model", bound=nn.Module)


def quantize(model: Model, scheme: str = "nf4", *, double_quant: bool = True, skip: Collection[str] = HEADS) -> Model:
    """Quantise the weights of the linear layers of `model`, in place and for good, and return it.

    Args:
        scheme: of `quant.codebooks`: nf4, fp4, e2m1, int4, int8, dynamic.
        double_quant: quantise the scales too.
        skip: layers that stay: names, beginnings up to a dot, or ends of names. Weights that two modules share stay.

    Raises:
        ConfigError: there is no such scheme, nothing to quantise, a weight cannot be, or the model is adapted already.
    """
    codebook(scheme)
    if wrapped := [name for name, m in model.named_modules() if "base" in m._modules and "options" in vars(m)]:
        raise ConfigError(f"{wrapped[0]} carries an adapter. Quantise the model before it is adapted.")
    found = quantizable(model, skip)
    if not found:
        left = f" but what skip={tuple(skip)} leaves out" if skip else ""
        raise ConfigError(f"{type(model).__name__} has no linear layer to quantise{left}.")
    made: dict[str, QuantizedLinear] = {}
    for name, layer in found.items():
        made[name] = empty_like(layer, scheme, double_quant)
        try:
            made[name].take({"weight": layer.weight})  # type: ignore[dict-item]
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    for name, layer in made.items():
        model.set_submodule(name, layer)
    if isinstance(model, PreTrainedModel):
        _declare(model, scheme, double_quant)
    return model


def quantize_skeleton(model: PreTrainedModel, quant: str | None, double_quant: bool) -> None:
    """Give `model`, made without a checkpoint, the quantised layers, without contents, that `load_model` gives it."""
    arguments = loading_arguments(type(model).__name__, model.config, quant, double_quant)
    saved: Any = getattr(model.config, "quantization_config", None)
    wanted = arguments.get("quantization_config") or (saved and QuantConfig.from_dict(saved))
    if wanted:
        _put_layers(model, wanted)


def _put_layers(model: PreTrainedModel, wanted: QuantConfig) -> None:
    """Layers without contents in the places of those that are to be, or were, quantised."""
    if wanted.is_stored:
        # As transformers chose what to leave out when they were.
        skip = HfQuantizer.get_modules_to_not_convert(model, wanted.skip, model._keep_in_fp32_modules)
    else:
        body = model.base_model
        heads = [name for name, child in model.named_children() if body is not model and child is not body]
        more = [*heads, *_LEFT_OUT, *(model._keep_in_fp32_modules or ())]
        skip = HfQuantizer.get_modules_to_not_convert(model, more, add_default_skips=True)
    for name, layer in quantizable(model, skip).items():
        model.set_submodule(name, empty_like(layer, wanted.scheme, wanted.double_quant))


def loading_arguments(base: str, config: PretrainedConfig, quant: str | None, double_quant: bool) -> dict[str, Any]:
    """What `from_pretrained` needs beside `config`, which is changed where the checkpoint is quantised already.

    Raises:
        ConfigError: there is no such scheme.
        ModelError: the checkpoint is quantised in a way that is not read here.
    """
    saved = getattr(config, "quantization_config", None)
    if saved is not None:
        config.quantization_config = _from_bitsandbytes(base, saved if isinstance(saved, dict) else saved.to_dict())
        return {}
    if quant is None:
        return {}
    codebook(quant)
    return {"quantization_config": QuantConfig(quant, double_quant)}


def is_quantized(config: PretrainedConfig) -> bool:
    """Whether the checkpoint of `config` holds quantised weights."""
    return getattr(config, "quantization_config", None) is not None


def _from_bitsandbytes(base: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    if saved.get("quant_method") == NAME:
        return dict(saved)
    if saved.get("quant_method") != "bitsandbytes" or not saved.get("load_in_4bit"):
        raise ModelError(
            f"{base}: its weights are quantised by {saved.get('quant_method')!r}; NF4 and FP4 of bitsandbytes are read "
            "here. Take the original, in 16 bits, and let model.quant quantise it."
        )
    return {
        "quant_method": NAME,
        "scheme": saved.get("bnb_4bit_quant_type", "fp4"),
        "double_quant": bool(saved.get("bnb_4bit_use_double_quant", False)),
        "skip": saved.get("llm_int8_skip_modules"),
        "is_stored": True,
    }


@register_quantization_config(NAME)
class QuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How a model is quantised, in transformers' terms. Written to config.json as bitsandbytes' own."""

    def __init__(
        self,
        scheme: str = "nf4",
        double_quant: bool = True,
        skip: list[str] | None = None,
        dtype: torch.dtype = torch.float32,
        is_stored: bool = False,
        quant_method: str = NAME,
    ) -> None:
        self.quant_method = quant_method
        self.scheme, self.double_quant, self.skip = scheme, double_quant, skip
        self.dtype, self.is_stored = dtype, is_stored

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": self.scheme,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": str(self.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": self.skip,
        }


@register_quantizer(NAME)
class Quantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks while it loads and saves."""

    quantization_config: QuantConfig

    # Beginning with the whole name of the parameter, as transformers matches them.
    serialized_names = {  # noqa: RUF012 - the base class has it so
        "weight": [
            "weight",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_map",
            "weight.absmax",
            *(f"weight.quant_state.bitsandbytes__{scheme}" for scheme in OF_BITSANDBYTES),
        ]
    }

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self.faults: list[str] = []
        self.files = {os.path.realpath(file) for file in checkpoint_files or ()}
        _put_layers(model, self.quantization_config)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        release_pages(self.files)
        if self.faults:
            raise ModelError("; ".join(self.faults))
        # The way back, when it is saved, is the layers' own.
        kept = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in kept if not any(isinstance(o, _Deserialize) for o in _operations(c))]
        _declare(model, self.quantization_config.scheme, self.quantization_config.double_quant)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        owner, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(owner), QuantizedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_load_operations(self) -> dict[str, type[ConversionOps]]:
        return {"deserialize": _Deserialize}

    def is_serializable(self) -> bool:
        return self.quantization_config.scheme in OF_BITSANDBYTES

    @property
    def is_trainable(self) -> bool:
        return True


class _Operation(ConversionOps):  # type: ignore[misc]
    # Under any other name transformers casts what the operation is given to the model's dtype.
    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def _give(self, model: PreTrainedModel, key: str, stored: Mapping[str, Tensor], missing: set[str] | None) -> None:
        """Let the layer whose weight is called `key` take `stored`."""
        name = key.rpartition(".")[0]
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        try:
            layer.take(stored)
        except (ConfigError, ModelError) as error:
            # All of them at the end, and nothing of this layer is missing.
            self.hf_quantizer.faults.append(f"{name}: {error}")
            layer._is_hf_initialized = True
        release_pages(self.hf_quantizer.files)
        if missing is not None:
            missing -= {f"{name}.{part}" for part in layer.stored()}


class _Quantize(_Operation):
    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        for key, value in input_dict.items():
            self._give(model, key, {"weight": _first(value)}, kwargs.get("missing_keys"))
        return {}


class _Deserialize(_Operation):
    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        if not isinstance(model.get_submodule(full_layer_name.rpartition(".")[0]), QuantizedLinear):
            return input_dict
        parts = {name: _first(value) for name, value in input_dict.items()}
        self._give(model, full_layer_name, parts, kwargs.get("missing_keys"))
        return {}


def _first(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _operations(conversion: Any) -> list[Any]:
    return list(getattr(conversion, "operations", ()))


def _declare(model: PreTrainedModel, scheme: str, double_quant: bool) -> None:
    """Let transformers know, so that the model is saved as what it is."""
    kinds = (nn.Linear,)
    quantised = {name for name, _ in layers(model)}
    rest = [n for n, m in model.named_modules() if isinstance(m, kinds) and n not in quantised]
    dtype = next(layer.dtype for _, layer in layers(model))
    model.config.quantization_config = QuantConfig(scheme, double_quant, rest, dtype)
    model.hf_quantizer = Quantizer(model.config.quantization_config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, NAME


def release_pages(files: Collection[str]) -> None:
    """Give back the memory of what was read of `files`, which are mapped and not written to: pages come back if they
    are read again.
    """
    maps = Path("/proc/self/maps")
    if not files or not maps.exists():
        return
    advise = _madvise()
    for line in maps.read_text().splitlines():
        # address perms offset dev inode path
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in files:
            begin, end = (int(address, 16) for address in fields[0].split("-"))
            advise(begin, end - begin, _MADV_DONTNEED)


def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    advise: Callable[[int, int, int], int] = function
    return advise
