"""Adapter folders in PEFT's format: what we save, `peft` loads with equal logits, and the other way round.

    adapter_config.json          PEFT's fields
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight and the like
    lorica.json                  fingerprint of the base, hashes of the other two: what PEFT has no place for

A folder is read with suspicion: JSON of bounded size, safetensors only, and every name and shape is compared with the
model before anything is allocated. A field that would change the result and that we do not implement refuses with its
name; an adapter made for another base is refused by fingerprint. PEFT's own folders have no `lorica.json`; names and
shapes guard them.

Written for PEFT 0.21.2; the tests exchange folders with it both ways.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorica.errors import AdapterError, LoricaError
from lorica.files import read_json_object, sha256, whole_folder, write_json
from lorica.methods.attach import adapt, adapters, detach
from lorica.methods.method import Adapter, MethodOptions, method_names, method_options
from lorica.models.load import base_fingerprint

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROOF = "lorica.json"
_PREFIX = "base_model.model."
# Where a method that PEFT does not have keeps its options.
_OPTIONS = "lorica_options"
# The PEFT version whose fields we write.
_PEFT_VERSION = "0.21.2"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder holds, read or to be written without its base. PEFT's own have no `base_fingerprint`."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    base_fingerprint: str | None


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Save the model's adapters, whole or not at all, and read them back: as a PEFT folder if PEFT has the method.

    Args:
        folder: replaced if it is an adapter folder already; must be absent or empty otherwise.

    Raises:
        AdapterError: there is nothing to save, a weight is not finite, `folder` holds something else, or what was
            written does not read back as it was.
    """
    found = adapters(model)
    if not found:
        raise AdapterError("Not saved: the model carries no adapters.")
    return write_folder(folder, AdapterFolder(_config(model, found), _tensors(found), base_fingerprint(model)))


def write_folder(folder: str | Path, content: AdapterFolder) -> Path:
    """Write an adapter folder, whole or not at all, and read it back; as `save_adapter`, without a model."""
    folder = Path(folder)
    tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in content.tensors.items()}
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise AdapterError(f"Not saved: {len(broken)} tensors hold NaN or infinity, the first is {broken[0]}.")
    check_adapter_folder(folder)
    with whole_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, content.config)
        files = {name: sha256(temporary / name) for name in (WEIGHTS, CONFIG)}
        write_json(temporary / PROOF, {"format": 1, "base_fingerprint": content.base_fingerprint, "sha256": files})
        _prove(tensors, temporary)
    return folder


def check_adapter_folder(folder: Path) -> None:
    """Refuse, with an AdapterError, a folder that holds something else than an adapter: saving would replace it."""
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdapterError(f"Not saved: {folder} exists and is no adapter folder. Choose an empty or a new one.")


def read_folder(folder: str | Path) -> AdapterFolder:
    """What an adapter folder holds, its hashes checked where it has them.

    Raises:
        AdapterError: it is no adapter folder, or damaged.
    """
    folder = Path(folder)
    config = _read_config(folder)
    fingerprint = _read_proof(folder)
    with _open_weights(folder) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    return AdapterFolder(config, tensors, fingerprint)


def load_adapter(model: Model, folder: str | Path) -> Model:
    """Adapt the plain base `model` in place as `folder` says, load its weights, and return the model.

    On any error the model is left as it was.

    Raises:
        AdapterError: the folder is no adapter folder, damaged, of another base, or uses what is not supported; the
            message lists every fault.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _check_proof(model, folder)
    with _open_weights(folder) as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict
        copies = [] if _OPTIONS in config else [key for key in shapes if _is_copy_of_base(key)]
        for key in copies:
            del shapes[key]
        options, names = _options(config, shapes, model, folder)
        _check_shapes(model, shapes, options, names, folder)
        try:
            adapt(model, options)
        except LoricaError as error:
            raise AdapterError(f"{folder}: {error}") from None
        try:
            _copy_weights(model, file, copies, folder)
        except AdapterError:
            detach(model)
            raise
    return model


def _tensors(found: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Every tensor on disk by its name there, the adapters' own."""
    return {f"{_PREFIX}{name}.{key}": t for name, a in found.items() for key, t in a.saved_tensors().items()}


def _config(model: nn.Module, found: Mapping[str, Adapter]) -> dict[str, Any]:
    options = next(iter(found.values())).options
    common = {
        "peft_type": options.peft_type or f"LORICA_{options.method_name().upper()}",
        "base_model_name_or_path": model.config.name_or_path if isinstance(model, PreTrainedModel) else None,
        "task_type": "CAUSAL_LM" if _is_causal_lm(model) else None,
        "inference_mode": True,
    }
    if options.peft_type is None:
        return {**common, _OPTIONS: {field.name: getattr(options, field.name) for field in fields(options)}}
    return {
        **common,
        "peft_version": _PEFT_VERSION,
        "auto_mapping": None,
        "revision": None,
        "target_modules": _target_names(model, list(found)),
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        **options.to_peft(found, model),
    }


def _is_causal_lm(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and model.can_generate() and not model.config.is_encoder_decoder


def _target_names(model: nn.Module, names: list[str]) -> list[str]:
    """PEFT matches a target as a whole name or a tail of it: a tail where that selects the same modules, else all
    names.

    vLLM reads the tails.
    """
    # An adapter shows its insides (`q_proj.base`); only the module itself has a name that PEFT will see.
    everything = [n for n, m in model.named_modules() if n and not n.endswith(".base")]
    chosen = set(names)
    targets = []
    for tail in sorted({name.rsplit(".", 1)[-1] for name in names}):
        same_tail = {n for n in everything if n == tail or n.endswith(f".{tail}")}
        targets += [tail] if same_tail <= chosen else sorted(same_tail & chosen)
    return targets


def _prove(tensors: Mapping[str, Tensor], folder: Path) -> None:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        same = set(file.keys()) == set(tensors)
        if not same or not all(torch.equal(file.get_tensor(key), tensor) for key, tensor in tensors.items()):
            raise AdapterError(f"{folder}: what was written does not read back as it was. The disk may be failing.")


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} is no adapter folder: it has no {CONFIG}.")
    try:
        config = read_json_object(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise AdapterError(str(error)) from None
    return config


def _read_proof(folder: Path) -> str | None:
    """The fingerprint of the base, where it is known; AdapterError where a hash is not that of its file."""
    if not (folder / PROOF).is_file():
        return None
    try:
        proof = read_json_object(folder / PROOF)
    except (OSError, ValueError) as error:
        raise AdapterError(str(error)) from None
    for name, digest in dict(proof.get("sha256", {})).items():
        if name in (WEIGHTS, CONFIG) and (folder / name).is_file() and sha256(folder / name) != digest:
            raise AdapterError(f"{folder / name} is damaged: its SHA-256 is not the one in {PROOF}.")
    expected = proof.get("base_fingerprint")
    return None if expected is None else str(expected)


def _check_proof(model: nn.Module, folder: Path) -> None:
    expected = _read_proof(folder)
    if expected is not None and expected != base_fingerprint(model):
        raise AdapterError(
            f"{folder} was made for another base: its fingerprint is {expected[:12]}…, this model's is "
            f"{base_fingerprint(model)[:12]}…. Load the base it was trained on; if that is in "
            "float16, in the same dtype."
        )


def _open_weights(folder: Path) -> Any:
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = [p.name for p in (folder / "adapter_model.bin", folder / "adapter_model.pt") if p.is_file()]
        if pickled:
            raise AdapterError(
                f"{folder / pickled[0]} is pickled, and loading a pickle can run code. Convert it to safetensors first."
            )
        raise AdapterError(f"{folder} has no {WEIGHTS}.")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged: {error}") from None


def _options(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], model: nn.Module, folder: Path
) -> tuple[MethodOptions, list[str]]:
    """The method's options, and the names of the modules that the folder's tensors belong to."""
    kind = str(config.get("peft_type"))
    own = kind.startswith("LORICA_")
    methods = [method_options(name) for name in method_names()]
    found = next((m for m in methods if m.is_peft(config) or kind == f"LORICA_{m.method_name().upper()}"), None)
    if found is None:
        known = sorted({m.peft_type for m in methods if m.peft_type})
        raise AdapterError(f"{folder / CONFIG}: peft_type is {kind!r}; {', '.join(known)} can be loaded.")
    present = dict(model.named_modules())
    keys = [key.removeprefix(_PREFIX) for key in shapes]
    names = list(dict.fromkeys(name for key in keys if (name := _owner(key, present)) is not None))
    faults = [f"{key} belongs to no module of {type(model).__name__}" for key in keys if _owner(key, present) is None]
    if not names:
        faults.append("there is no adapter's tensor in it")
    _refuse(folder, faults)
    try:
        if own:
            return found(**{**config[_OPTIONS], "targets": [re.escape(name) for name in names]}), names
        return found.from_peft(config, names), names
    except (KeyError, TypeError, ValueError, AttributeError, LoricaError) as error:
        what = str(error) if isinstance(error, LoricaError) else f"{type(error).__name__}: {error}"
        raise AdapterError(f"{folder / CONFIG}: {what}") from None


def _owner(key: str, present: Mapping[str, nn.Module]) -> str | None:
    """The module whose adapter a tensor belongs to: the longest name in front that the model has."""
    parts = key.split(".")
    return next((name for n in range(len(parts) - 1, 0, -1) if (name := ".".join(parts[:n])) in present), None)


def _is_copy_of_base(key: str) -> bool:
    # PEFT saves the embedding itself beside an adapter on it; `_copy_weights` compares it with the base.
    return key.startswith(_PREFIX) and key.endswith((".base_layer.weight", "lm_head.weight", "embed_tokens.weight"))


def _check_shapes(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], options: MethodOptions, names: list[str], folder: Path
) -> None:
    """Compare every name and shape with what config and model ask for, before a number is read."""
    faults = []
    expected: set[str] = set()
    present = dict(model.named_modules())
    for name in names:
        module = model.get_submodule(name)
        if not options.takes(module):
            lost = [key for key in shapes if _owner(key.removeprefix(_PREFIX), present) == name]
            faults.append(f"{lost[0]}: {name} is a {type(module).__name__}, which {options.method_name()} cannot wrap")
            expected.update(lost)
            continue
        for key, shape in options.shapes(module, name).items():
            expected.add(f"{_PREFIX}{name}.{key}")
            found = shapes.get(f"{_PREFIX}{name}.{key}")
            if found is None:
                faults.append(f"{_PREFIX}{name}.{key} is missing")
            elif found != shape:
                faults.append(f"{_PREFIX}{name}.{key} is {list(found)}, expected {list(shape)}")
    faults += [f"{key} is no tensor of {options.method_name()}" for key in shapes.keys() - expected]
    _refuse(folder, faults)


def _copy_weights(model: nn.Module, file: Any, copies: Sequence[str], folder: Path) -> None:
    faults = []
    with torch.no_grad():
        for key, ours in _tensors(adapters(model)).items():
            tensor = file.get_tensor(key)
            if not bool(torch.isfinite(tensor).all()):
                faults.append(f"{key} holds NaN or infinity")
            ours.copy_(tensor)
    present = dict(model.named_modules())
    for key in copies:
        module = present.get(key.removeprefix(_PREFIX).removesuffix(".weight").removesuffix(".base_layer"))
        weight = getattr(module, "weight", None)
        if weight is None or not torch.equal(file.get_tensor(key).to(weight), weight):
            faults.append(f"{key} is not the base's: a trained embedding or head cannot be loaded")
    _refuse(folder, faults)


def _refuse(folder: Path, faults: list[str]) -> None:
    if faults:
        shown = faults[:10] + ([f"and {len(faults) - 10} more"] if len(faults) > 10 else [])
        raise AdapterError(f"{folder} does not fit this model:\n  " + "\n  ".join(shown))
