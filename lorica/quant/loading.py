"""Quantised models: made from one in memory (`quantize`), or while a checkpoint streams in, a tensor at a time.

transformers loads, through its registry of quantisers: it hands each tensor of a checkpoint to `_Quantize`, which turns
it into codes before the next one is read, so no more than one tensor is ever held in 16 or 32 bits. Checkpoints that
bitsandbytes or we have quantised are read as they are, by `_Deserialize`. What is saved is bitsandbytes' layout
(`linear.py`) under its own name in config.json, so transformers needs bitsandbytes to read it, and Lorica does not.

Files are mapped into memory, and pages that were read stay: after each tensor they are given back, or the process
would grow by the size of the whole checkpoint.

Experts that a checkpoint holds one by one are merged while they are quantised, so a merge is never there in 16 bits.

What it gives up: the output head stays in 16 bits, on purpose. Experts that are made of a checkpoint's tensors by
another of transformers' ways than one stack of each are merged first, in up to three times their size.
"""

from __future__ import annotations

import copy
import ctypes
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, MergeModulelist, PrefixChange, WeightConverter
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lorica.errors import ConfigError, ModelError
from lorica.quant.codebooks import codebook
from lorica.quant.experts import QuantizedExperts, empty_experts, expert_parameters, put_experts, put_plain
from lorica.quant.linear import QuantizedLinear, empty_like, layers, quantizable, stored_layer
from lorica.quant.weight import OF_BITSANDBYTES, Mender, QuantizedWeight, frozen

NAME = "lorica"
HEADS = ("lm_head",)
# A masked language model's checkpoint lacks it, and then it has to be made anew and trained.
_LEFT_OUT = (".*pooler",)
_MADV_DONTNEED = 4
# Experts of a merge that are read before their pages are given back, which takes about a millisecond.
_BETWEEN_RELEASES = 8
# bitsandbytes' configuration has no word for it.
_EXPERTS = "quantized_experts"

Model = TypeVar("Model", bound=nn.Module)


class Method(Protocol):
    """What is asked here of the method that a model will be adapted with."""

    def menders(self, model: nn.Module) -> Mapping[str, Mender]:
        """By layer, what wants to see what quantising takes from its weight."""


def quantize(
    model: Model,
    scheme: str = "nf4",
    *,
    double_quant: bool = True,
    skip: Collection[str] = HEADS,
    method: Method | None = None,
) -> Model:
    """Quantise the weights of the linear layers and experts of `model`, in place and for good, and return it.

    Args:
        scheme: of `quant.codebooks`: nf4, fp4, e2m1, int4, int8, dynamic.
        double_quant: quantise the scales too.
        skip: what stays: names, beginnings up to a dot, or ends of names. Weights that two modules share stay.
        method: that the model will be adapted with, where it starts from what is taken away: `LoRA(init="loftq")`.

    Raises:
        ConfigError: there is no such scheme, nothing to quantise, a weight cannot be, or the model is adapted already.
    """
    codebook(scheme)
    if wrapped := [name for name, m in model.named_modules() if "base" in m._modules and "options" in vars(m)]:
        raise ConfigError(f"{wrapped[0]} carries an adapter. Quantise the model before it is adapted.")
    found: dict[str, nn.Module | nn.Parameter] = {**quantizable(model, skip), **expert_parameters(model, skip)}
    if not found:
        left = f" but what skip={tuple(skip)} leaves out" if skip else ""
        raise ConfigError(f"{type(model).__name__} has no linear layer to quantise{left}.")
    made: dict[str, QuantizedWeight] = {}
    menders = {} if method is None else method.menders(model)
    for name, plain in found.items():
        made[name] = _empty(plain, scheme, double_quant)
        made[name].mender = menders.get(name)
        try:
            made[name].take({"weight": plain.weight if isinstance(plain, nn.Module) else plain})  # type: ignore[dict-item]
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
    for name, weight in made.items():
        _put(model, name, weight)
    if isinstance(model, PreTrainedModel):
        _declare(model, scheme, double_quant)
    return model


def dequantize(model: Model) -> Model:
    """Put plain layers in the places of quantised ones, in place, and return `model`: what was taken stays away."""
    for name, held in list(layers(model)):
        if isinstance(held, QuantizedLinear):
            model.set_submodule(name, stored_layer(held.plain(), held.transposed))
            continue
        holder, _, key = name.rpartition(".")
        put_plain(model.get_submodule(holder), key, frozen(held.dense()))
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model


def quantize_skeleton(
    model: PreTrainedModel, quant: str | None, double_quant: bool, method: Method | None = None
) -> None:
    """Give `model`, made without a checkpoint, the quantised layers, without contents, that `load_model` gives it.

    ModelError where it has nothing to quantise.
    """
    arguments = loading_arguments(type(model).__name__, model.config, quant, double_quant, method)
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
    found: dict[str, nn.Module | nn.Parameter] = {**quantizable(model, skip)}
    if wanted.experts or not wanted.is_stored:
        found |= expert_parameters(model, skip)
    if not found:
        raise ModelError(
            f"{type(model).__name__} holds no weight that could be quantised, which model.quant or its own config.json "
            "asks for: leave model.quant null."
        )
    for name, plain in found.items():
        _put(model, name, _empty(plain, wanted.scheme, wanted.double_quant))
    menders = {} if wanted.method is None else wanted.method.menders(model)
    for name, made in layers(model):
        made.mender = menders.get(name)


def _empty(plain: nn.Module | nn.Parameter, scheme: str, double_quant: bool) -> QuantizedWeight:
    return (empty_like if isinstance(plain, nn.Module) else empty_experts)(plain, scheme, double_quant)  # type: ignore[arg-type]


def _put(model: nn.Module, name: str, weight: QuantizedWeight) -> None:
    if isinstance(weight, QuantizedExperts):
        put_experts(model, name, weight)
    else:
        model.set_submodule(name, weight)


def loading_arguments(
    base: str, config: PretrainedConfig, quant: str | None, double_quant: bool, method: Method | None = None
) -> dict[str, Any]:
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
    return {"quantization_config": QuantConfig(quant, double_quant, method=method)}


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
        "experts": bool(saved.get(_EXPERTS, False)),
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
        experts: bool = False,
        method: Method | None = None,
    ) -> None:
        self.quant_method, self.experts = quant_method, experts
        self.scheme, self.double_quant, self.skip = scheme, double_quant, skip
        self.dtype, self.is_stored, self.method = dtype, is_stored, method

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
            **({_EXPERTS: True} if self.experts else {}),
        }


@register_quantizer(NAME)
class Quantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks while it loads and saves."""

    quantization_config: QuantConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self.faults: dict[str, str] = {}
        self.files = {os.path.realpath(file) for file in checkpoint_files or ()}
        _put_layers(model, self.quantization_config)
        found = {held.name_in_state(name): held for name, held in layers(model)}
        self.awaited = set(found)
        self.parts = {key + part.removeprefix("weight") for key, held in found.items() for part in held.stored()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        release_pages(self.files)
        if self.awaited:
            raise ModelError(lacks(self.awaited))
        if self.faults:
            raise ModelError("; ".join(f"{key}: {fault}" for key, fault in sorted(self.faults.items())))
        _declare(model, self.quantization_config.scheme, self.quantization_config.double_quant)
        return model

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return _held(model, param_name) is not None

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """The model's own ones, where those that merge experts quantise them on the way; for a checkpoint that is
        quantised already, one more for each name of a parameter, which gathers its parts.
        """
        if self.pre_quantized:
            names = {held.name_in_state(name).rpartition(".")[2] for name, held in layers(model)}
            return [*weight_conversions, *(self._gathering(name) for name in sorted(names))]
        return [self._merging(c) if _makes_experts(c, model) else c for c in weight_conversions]

    def _merging(self, conversion: WeightConverter) -> WeightConverter:
        if not isinstance(conversion.operations[0], MergeModulelist) or len(conversion.target_patterns) > 1:
            return conversion
        operations = [_MergeExperts(self, conversion.operations)]
        patterns = conversion._original_source_patterns, conversion._original_target_patterns
        return conversion.copy(*patterns, operations=operations)

    def _gathering(self, name: str) -> WeightConverter:
        parts = ("nested_absmax", "nested_quant_map", "quant_map", "absmax")
        states = [f"quant_state.bitsandbytes__{scheme}" for scheme in OF_BITSANDBYTES]
        # The name alone is that of the codes: layers of the same name have a dot and more behind it.
        sources = [rf"\.{name}$", *(f".{name}.{part}" for part in (*parts, *states))]
        return WeightConverter(sources, f".{name}", [_Deserialize(self)])

    def is_serializable(self) -> bool:
        """Asked before anything is written."""
        scheme = self.quantization_config.scheme
        if scheme not in OF_BITSANDBYTES:
            raise ModelError(
                f"A model quantised to {scheme} cannot be saved: files hold {' and '.join(OF_BITSANDBYTES)} alone. "
                "Save the base, or the adapter, and quantise it when it is loaded."
            )
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class _Operation(ConversionOps):  # type: ignore[misc]
    # Under any other name transformers casts what the operation is given to the model's dtype.
    def __init__(self, hf_quantizer: Quantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Operation:
        # transformers copies an operation for each tensor, and there is one quantizer.
        return copy.copy(self)

    def _give(self, model: PreTrainedModel, key: str, take: Callable[[Any], None], missing: set[str] | None) -> None:
        """Let the quantised weight called `key` `take` what came."""
        held = _held(model, key)
        assert held is not None
        try:
            take(held)
        except (ConfigError, ModelError) as error:
            # All of them at the end.
            self.hf_quantizer.faults[key] = str(error)
            held._is_hf_initialized = True
        self.hf_quantizer.awaited.discard(key)
        release_pages(self.hf_quantizer.files)
        if missing is not None:
            # Those of weights that never come too, which transformers would stumble over; they are told at the end.
            missing -= self.hf_quantizer.parts


class _Quantize(_Operation):
    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        for key, value in input_dict.items():
            self._give(model, key, methodcaller("take", {"weight": _first(value)}), kwargs.get("missing_keys"))
        return {}


class _MergeExperts(_Operation):
    """Experts that a checkpoint holds one by one, merged and quantised one by one: `operations` are transformers' own,
    of which the first stacks.
    """

    def __init__(self, hf_quantizer: Quantizer, operations: list[ConversionOps]) -> None:
        super().__init__(hf_quantizer)
        self.operations = operations

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        held = _held(model, full_layer_name)
        if not isinstance(held, QuantizedExperts) or not held.is_aligned:
            return self._merged(input_dict, kwargs)
        sources = {pattern: list(tensors) for pattern, tensors in input_dict.items()}
        input_dict.clear()

        def take(held: QuantizedExperts) -> None:
            if wrong := {pattern: len(tensors) for pattern, tensors in sources.items() if len(tensors) != len(held)}:
                told = ", ".join(f"{count} of {pattern}" for pattern, count in wrong.items())
                raise ModelError(f"the checkpoint has {told}; {len(held)} are expected")
            held.take_experts(self._one_by_one(sources, len(held), kwargs))

        self._give(model, full_layer_name, take, kwargs.get("missing_keys"))
        return {}

    def _one_by_one(self, sources: dict[str, list[Tensor]], num: int, kwargs: dict[str, Any]) -> Iterator[Tensor]:
        for i in range(num):
            try:
                made = self._merged({pattern: [tensors[i]] for pattern, tensors in sources.items()}, kwargs)
            except (RuntimeError, ValueError) as error:
                # Sizes that do not fit, or a whole kind of tensor that is not there.
                raise ModelError(f"expert {i}: {', '.join(sources)} cannot be merged: {error}") from None
            yield _first(next(iter(made.values())))[0]
            if i % _BETWEEN_RELEASES == 0:
                release_pages(self.hf_quantizer.files)

    def _merged(self, tensors: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        for operation in self.operations:
            tensors = operation.convert(tensors, **kwargs)
        return tensors


class _Deserialize(_Operation):
    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **kwargs: Any
    ) -> dict[str, Any]:
        name = full_layer_name.rpartition(".")[2]
        parts = {f"weight{key.rstrip('$').rpartition(name)[2]}": _first(value) for key, value in input_dict.items()}
        if _held(model, full_layer_name) is not None:
            self._give(model, full_layer_name, methodcaller("take", parts), kwargs.get("missing_keys"))
            return {}
        if parts.keys() != {"weight"}:
            self.hf_quantizer.faults[full_layer_name] = "it is quantised, and config.json says that it is not"
            return {}
        return {full_layer_name: parts["weight"].to(model.get_parameter_or_buffer(full_layer_name).dtype)}


def _held(model: nn.Module, key: str) -> QuantizedWeight | None:
    """The quantised weight that a state dict of `model` calls `key`."""
    for name in (key, key.removesuffix(".weight")):
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(module, QuantizedWeight) and module.name_in_state(name) == key:
            return module
    return None


def _first(value: Any) -> Tensor:
    tensor: Tensor = value[0] if isinstance(value, list) else value
    return tensor


def _declare(model: PreTrainedModel, scheme: str, double_quant: bool) -> None:
    """Let transformers know, so that the model is saved as what it is."""
    held = dict(layers(model))
    rest = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in held]
    experts = any(isinstance(each, QuantizedExperts) for each in held.values())
    rest += expert_parameters(model) if experts else ()
    dtype = next(each.dtype for each in held.values())
    model.config.quantization_config = QuantConfig(scheme, double_quant, rest, dtype, experts=experts)
    model.hf_quantizer = Quantizer(model.config.quantization_config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, NAME
    _save_as_it_is(model)


def _save_as_it_is(model: PreTrainedModel) -> None:
    """Let transformers undo, when it saves `model`, no conversion that would take codes for tensors."""
    kept = getattr(model, "_weight_conversions", None)
    if kept is None and any(isinstance(held, QuantizedExperts) for _, held in layers(model)):
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        kept = [conversion for conversion in mapping if not isinstance(conversion, PrefixChange)]
    if kept is not None:
        model._weight_conversions = [c for c in kept if not _makes_experts(c, model) and not _gathers(c)]


def _makes_experts(conversion: Any, model: nn.Module) -> bool:
    names = {name.rpartition(".")[2] for name, held in layers(model) if isinstance(held, QuantizedExperts)}
    if not isinstance(conversion, WeightConverter):
        return False
    return any(target.rstrip("$").rpartition(".")[2] in names for target in conversion.target_patterns)


def _gathers(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and isinstance(conversion.operations[0], _Deserialize)


def lacks(names: Collection[str]) -> str:
    """What is said of a checkpoint without the weights `names`."""
    first, more = ", ".join(sorted(names)[:5]), len(names) - 5
    rest = f" and {more} more" if more > 0 else ""
    return f"the checkpoint lacks {len(names)} of the model's weights: {first}{rest}. Is it whole, and of this model?"


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
