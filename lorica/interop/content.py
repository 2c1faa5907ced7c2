"""What the names in an adapter folder mean, compared with the model before anything is allocated.

    base_model.model.<module>.lora_A.weight and the like                 the method's own
    base_model.model.<module>.<parameter of the base>                    trained whole: it takes that parameter's place
    base_model.model.<module>.token_adapter.trainable_tokens_delta       trained rows of an embedding or a head
    base_model.model.<module>.base_layer.weight                          PEFT's copy of the base's embedding

What is trained whole is told by the file, as PEFT does it, whether `modules_to_save` names it or not; a parameter that
it does not name and that equals the base's is a copy too. A field that would change the result and that we do not
implement refuses with its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import AdapterError, LoricaError
from lorica.interop.folder import CONFIG
from lorica.interop.hydra import AuthorsHeads
from lorica.interop.prompts import Unfolded
from lorica.methods.beside import parts
from lorica.methods.full import FullFineTuning, persistent_buffers
from lorica.methods.hydra import HydraLoRA
from lorica.methods.method import MethodOptions, method_names, method_options
from lorica.methods.virtual import SAVED, VirtualTokens

PREFIX = "base_model.model."
OPTIONS = "lorica_options"
"""Where a method that PEFT does not have keeps its options."""
BESIDE = {"modules_to_save": "modules_to_save", "trainable_tokens": "trainable_token_indices"}
"""What every method may train beside its own adapters: our options, and the fields of them that every folder has."""
_ROWS = "token_adapter.trainable_tokens_delta"
_Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Content:
    """What a folder's tensors are for.

    Attributes:
        options: with what is trained beside the method's own adapters.
        own: the names in the file of the method's own tensors, by module.
        whole: the names of the parameters (and statistics) that are replaced, by module.
        tokens: the tokens of trained rows, by module.
    """

    options: MethodOptions
    own: dict[str, list[str]]
    whole: dict[str, list[str]]
    tokens: dict[str, tuple[int, ...]]


def read_content(config: Mapping[str, Any], model: nn.Module, file: Any, folder: Path) -> Content:
    """What the tensors of `file`, opened by safetensors, are for in the plain base `model`.

    Raises:
        AdapterError: lists every tensor that has no place, is missing or has another shape.
    """
    method = _method(config, folder)
    present = dict(model.named_modules())
    # PEFT takes any end of a name, and passes over what the model has not: for every classifier it names two.
    ends = tuple(map(str, config.get("modules_to_save") or ()))
    saved = [name for name in present if ends and name.endswith(ends)]
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
    own: dict[str, list[str]] = {}
    whole: dict[str, list[str]] = {name: [] for top in saved for name in parts(model, top)}
    tokens: dict[str, tuple[int, ...]] = {}
    copies, faults = [], []
    for key in shapes:
        if key in method.shared_names:
            continue
        name, rest = _owner(key.removeprefix(PREFIX), present)
        if name is None:
            faults.append(f"{key} belongs to no module of {type(model).__name__}")
            continue
        state = _state(present[name])
        copied = state.get(rest.removeprefix("token_adapter.").removeprefix("base_layer."))
        if rest == _ROWS:
            tokens[name] = _token_ids(config, name)
        elif copied is None or (method is FullFineTuning and name not in whole) or _is_trained_bias(rest, config):
            own.setdefault(name, []).append(key)
        elif name not in whole and _equal(file, key, shapes[key], copied):
            copies.append(key)
        elif rest in state:
            whole.setdefault(name, []).append(rest)
        else:
            copies.append(key)
            faults.append(f"{key} is not the base's, which the adapter was trained on")
    if not own:
        faults.append("there is no adapter's tensor in it")
    refuse(folder, faults)
    options = _options(config, method, list(own), folder)
    for key in copies:
        del shapes[key]
    _check(folder, shapes, model, Content(options, own, whole, tokens), saved)
    tops = [name for name in (*saved, *whole) if not is_in(name, [top for top in saved if top != name])]
    options = replace(
        options,
        modules_to_save=tuple(re.escape(name) for name in dict.fromkeys(tops)),
        trainable_tokens={re.escape(name): ids for name, ids in tokens.items()} or (),
    )
    return Content(options, own, whole, tokens)


def by_our_names(config: Mapping[str, Any], model: nn.Module, file: Any, folder: Path) -> Any:
    """`file` itself, or a view of one with other names: PEFT's of virtual tokens, the authors' of HydraLoRA.

    Raises:
        AdapterError: as `read_content`.
    """
    method = _method(config, folder)
    is_authors = method is HydraLoRA and method.is_peft(config)
    is_folded = issubclass(method, VirtualTokens) and SAVED in file.keys()  # noqa: SIM118 - not a dict
    if not is_authors and not is_folded:
        return file
    options = _options(config, method, () if is_folded else ("any",), folder)
    try:
        return AuthorsHeads(file, options) if isinstance(options, HydraLoRA) else Unfolded(file, options, model)
    except LoricaError as error:
        raise AdapterError(f"{folder}: {error}") from None


def is_in(name: str, modules: Iterable[str]) -> bool:
    """Whether `name` is one of `modules` or stands in one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def refuse(folder: Path, faults: list[str]) -> None:
    """Raise an AdapterError with the first of the faults, if there are any."""
    if faults:
        shown = faults[:10] + ([f"and {len(faults) - 10} more"] if len(faults) > 10 else [])
        raise AdapterError(f"{folder} does not fit this model:\n  " + "\n  ".join(shown))


def _method(config: Mapping[str, Any], folder: Path) -> type[MethodOptions]:
    kind = str(config.get("peft_type"))
    methods = [method_options(name) for name in method_names()]
    found = next((m for m in methods if m.is_peft(config) or kind == f"LORICA_{m.method_name().upper()}"), None)
    if found is None:
        known = sorted({m.peft_type for m in methods if m.peft_type})
        raise AdapterError(f"{folder / CONFIG}: peft_type is {kind!r}; {', '.join(known)} can be loaded.")
    return found


def _options(
    config: Mapping[str, Any], method: type[MethodOptions], names: Sequence[str], folder: Path
) -> MethodOptions:
    """The method's options, without what is trained beside its adapters."""
    try:
        if str(config["peft_type"]).startswith("LORICA_"):
            return method(**{**config[OPTIONS], "targets": [re.escape(name) for name in names]})
        return method.from_peft({key: v for key, v in config.items() if key not in BESIDE.values()}, names)
    except (KeyError, TypeError, ValueError, AttributeError, LoricaError) as error:
        what = str(error) if isinstance(error, LoricaError) else f"{type(error).__name__}: {error}"
        raise AdapterError(f"{folder / CONFIG}: {what}") from None


def _owner(key: str, present: Mapping[str, nn.Module]) -> tuple[str | None, str]:
    """The module that a tensor belongs to, the longest name in front that the model has, and what stands behind it."""
    ends = (at for at in range(len(key) - 1, 0, -1) if key[at] == ".")
    return next(((key[:at], key[at + 1 :]) for at in ends if key[:at] in present), (None, key))


def _state(module: nn.Module) -> dict[str, Tensor]:
    """What a saved model holds of `module` itself."""
    buffers = {name: module.get_buffer(name) for name in persistent_buffers(module)}
    return {**dict(module.named_parameters(recurse=False)), **buffers}


def _is_trained_bias(rest: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is the bias of an adapted layer that the adapter trained, too."""
    return rest == "base_layer.bias" and config.get("bias") in ("all", "lora_only")


def _equal(file: Any, key: str, shape: tuple[int, ...], parameter: Tensor) -> bool:
    return shape == tuple(parameter.shape) and torch.equal(file.get_tensor(key).to(parameter), parameter)


def _token_ids(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """PEFT's list is for the input embedding, a mapping for the modules whose names end so."""
    given = config.get(BESIDE["trainable_tokens"])
    if isinstance(given, Mapping):
        given = next((ids for end, ids in given.items() if name.endswith(end)), None)
    return tuple(given) if isinstance(given, list) and all(type(item) is int for item in given) else ()


def _check(folder: Path, shapes: _Shapes, model: nn.Module, content: Content, saved: Sequence[str]) -> None:
    """Compare every name and shape with what config and model ask for."""
    faults: list[str] = []
    expected: _Shapes = {}
    method = content.options.method_name()
    taken = content.options.shapes_in(model, list(content.own))
    for name, found in content.own.items():
        if name in taken:
            expected |= {f"{PREFIX}{name}.{key}": x for key, x in taken[name].items()}
        else:
            kind = type(model.get_submodule(name)).__name__
            faults.append(f"{found[0]}: {name} is a {kind}, which {method} cannot wrap")
            expected |= {key: shapes[key] for key in found}
    expected |= content.options.shared_shapes([model.get_submodule(name) for name in content.own])
    for name, keys in content.whole.items():
        state = _state(model.get_submodule(name))
        # PEFT saves all of a module that it names, and we the statistics with the parameters.
        wanted = state.keys() if is_in(name, saved) else {*keys, *persistent_buffers(model.get_submodule(name))}
        expected |= {f"{PREFIX}{name}.{key}": tuple(state[key].shape) for key in wanted}
    for name, ids in content.tokens.items():
        weight: Any = model.get_submodule(name)._parameters.get("weight")
        num_rows, size = (0, 0) if weight is None or weight.dim() != 2 else weight.shape
        if not ids or min(ids) < 0 or max(ids) >= num_rows or len(set(ids)) < len(ids):
            faults.append(f"trainable_token_indices: {list(ids)[:8]} are no rows of {name}, which has {num_rows:,}")
        expected[f"{PREFIX}{name}.{_ROWS}"] = (len(ids), int(size))
    for key, shape in expected.items():
        if key not in shapes:
            faults.append(f"{key} is missing")
        elif shapes[key] != shape:
            faults.append(f"{key} is {list(shapes[key])}, expected {list(shape)}")
    faults += [f"{key} is no tensor of {method}" for key in shapes.keys() - expected]
    refuse(folder, faults)
