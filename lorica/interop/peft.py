"""Adapter folders in PEFT's format: what we save, `peft` loads with equal logits, and the other way round.

Here a model's adapters become a folder's fields and tensors, and the other way round. How a folder stands on the disk
is in `folder.py`, what its names mean and how they are compared with a model in `content.py`.

Written for PEFT 0.21.2; the tests exchange folders with it both ways.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorica.errors import AdapterError, LoricaError
from lorica.interop.content import BESIDE, OPTIONS, PREFIX, Content, by_our_names, is_in, read_content, refuse
from lorica.interop.folder import AdapterFolder, Proof, open_weights, read_config, read_proof, write_folder
from lorica.interop.prompts import fold
from lorica.methods.attach import adapters, attach, detach
from lorica.methods.beside import Beside, input_embedding, tied_to, wrap_tokens
from lorica.methods.full import FullAdapter, master
from lorica.methods.method import Adapter, MethodOptions
from lorica.methods.selection import matching
from lorica.methods.tokens import tokens_of
from lorica.methods.virtual import VirtualTokens
from lorica.models.load import base_fingerprint
from lorica.models.tasks import CLASSIFICATION, task_of
from lorica.quant.linear import QuantizedLinear, format_of

# The PEFT version whose fields we write.
_PEFT_VERSION = "0.21.2"
# PEFT's types with LoRA's configuration, which alone has trained tokens and ties.
_LORA_TYPES = ("LORA", "ADALORA")
# The heads that PEFT expects in the folder of a classifier, where the model has them.
_PEFT_HEADS = ("classifier", "score")

Model = TypeVar("Model", bound=nn.Module)


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
    replaced = tuple(f"{name}.{key}" for name, adapter in found.items() for key in adapter.replaced)
    labels = _labels(model)
    fingerprint = base_fingerprint(model, replaced)
    tensors = _tensors(found)
    if isinstance(next(iter(found.values())).options, VirtualTokens):
        tensors = fold(tensors)
    quant = format_of(model) if any(adapter.mends for adapter in found.values()) else None
    return write_folder(folder, AdapterFolder(_config(model, found), tensors, fingerprint, replaced, labels, quant))


def load_adapter(model: Model, folder: str | Path) -> Model:
    """Adapt the plain base `model` in place as `folder` says, load its weights, and return the model.

    On any error the model is left as it was.

    Raises:
        AdapterError: the folder is no adapter folder, damaged, of another base, or uses what is not supported; the
            message lists every fault.
    """
    folder = Path(folder)
    config = read_config(folder)
    proof = read_proof(folder)
    _check_proof(model, proof, folder)
    with open_weights(folder) as opened:
        file = by_our_names(config, model, opened, folder)
        content = read_content(config, model, file, folder)
        try:
            attach(model, content.options, _beside(model, content, file))
        except LoricaError as error:
            raise AdapterError(f"{folder}: {error}") from None
        try:
            _copy_weights(model, file, folder)
        except AdapterError:
            detach(model)
            raise
    for adapter in adapters(model).values():
        adapter.mends = proof.base_quant is not None and isinstance(adapter.base, QuantizedLinear)
    return model


def _labels(model: nn.Module) -> tuple[str, ...]:
    """A classifier's classes by id."""
    config: Any = model.config if isinstance(model, PreTrainedModel) else None
    return tuple(config.id2label.values()) if task_of(model) is CLASSIFICATION else ()


def _tensors(found: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Every tensor on disk by its name there, the adapters' own."""
    own = {name: adapter for name, adapter in found.items() if not adapter.is_beside}
    shared = next(iter(own.values())).options.shared_tensors(own)
    return {f"{PREFIX}{name}.{key}": t for name, a in found.items() for key, t in a.saved_tensors().items()} | shared


def _config(model: nn.Module, found: Mapping[str, Adapter]) -> dict[str, Any]:
    options = next(iter(found.values())).options
    own = {name: adapter for name, adapter in found.items() if not adapter.is_beside}
    tokens = tokens_of(found)
    is_peft = options.peft_type is not None and (not tokens or options.peft_type in _LORA_TYPES)
    everything = _plain_names(model, found)
    biases = _lone_biases(found)
    whole = _whole_names(everything, {n: a for n, a in found.items() if n not in biases}, options)
    task = task_of(model)
    # For PEFT a classifier's folder always holds its head.
    lacks_head = task is CLASSIFICATION and any(n.endswith(_PEFT_HEADS) and not is_in(n, whole) for n in everything)
    config: dict[str, Any] = {
        "peft_type": options.peft_type if is_peft else f"LORICA_{options.method_name().upper()}",
        "base_model_name_or_path": model.config.name_or_path if isinstance(model, PreTrainedModel) else None,
        "task_type": task.peft_name if task and not lacks_head else None,
        "inference_mode": True,
    }
    if whole:
        config["modules_to_save"] = _short(whole, everything, dotted=False)
    if tokens:
        alone = list(tokens) == [input_embedding(model)]
        config["trainable_token_indices"] = next(iter(tokens.values())) if alone else tokens
    if not is_peft:
        kept = [field.name for field in fields(options) if field.name not in BESIDE]
        return {**config, OPTIONS: {name: getattr(options, name) for name in kept}}
    if options.peft_type in _LORA_TYPES and _shares(found):
        config["ensure_weight_tying"] = True
    fields_of_method = options.to_peft(own, model)
    if biases:
        fields_of_method["bias"] = "all"
    config |= {"peft_version": _PEFT_VERSION, "auto_mapping": None, "revision": None, **fields_of_method}
    if isinstance(options, VirtualTokens):
        return config
    # A module that is named by its parameters may not be named by itself too.
    holders = {parameter.rpartition(".")[0] for parameter in fields_of_method.get("target_parameters") or ()}
    return {"target_modules": _short(own.keys() - holders, everything, dotted=True), **config}


def _whole_names(everything: Sequence[str], found: Mapping[str, Adapter], options: MethodOptions) -> list[str]:
    """The modules trained whole beside the adapters: those that the options name, and those tied to them."""
    # A bias alone stands in the file under its name: of a module that is named, PEFT asks for everything.
    trained = [
        name
        for name, adapter in found.items()
        if adapter.is_beside
        and isinstance(adapter, FullAdapter)
        and len(adapter.masters) == len(dict(adapter.base.named_parameters(recurse=False)))
    ]
    named = {name for pattern in options.modules_to_save for name in matching(pattern, everything)}
    names: list[str] = []
    for name in everything:
        meant = name in trained or (name in named and any(is_in(part, [name]) for part in trained))
        # A module stands before those that it holds.
        if meant and not is_in(name, names):
            names.append(name)
    return names


def _lone_biases(found: Mapping[str, Adapter]) -> list[str]:
    """The modules of which only the bias is trained beside the adapters: PEFT's `bias: all`."""
    whole = {name: a for name, a in found.items() if a.is_beside and isinstance(a, FullAdapter)}
    return [n for n, a in whole.items() if {"bias"} == a.masters.keys() < set(a.base._parameters)]


def _shares(found: Mapping[str, Adapter]) -> bool:
    """Whether modules with one weight are trained whole."""
    masters = [id(m) for a in found.values() if a.is_beside and isinstance(a, FullAdapter) for m in a.masters.values()]
    return len(set(masters)) < len(masters)


def _plain_names(model: nn.Module, found: Mapping[str, Adapter]) -> list[str]:
    """The names of the base's modules, as PEFT will see them."""
    names = []
    for name, _ in model.named_modules():
        owner = next((module for module in found if name.startswith(f"{module}.")), None)
        if owner is None:
            names.append(name)
        elif name.startswith(f"{owner}.base."):
            names.append(f"{owner}.{name.removeprefix(f'{owner}.base.')}")
    return [name for name in names if name]


def _short(names: Iterable[str], everything: Sequence[str], *, dotted: bool) -> list[str]:
    """Tails of `names` where they mean the same modules, else whole names; vLLM reads tails.

    PEFT compares a target with whole parts of a name, and a module to save with any end of it.
    """
    chosen, result = set(names), []
    for tail in sorted({name.rsplit(".", 1)[-1] for name in chosen}):
        same_tail = {n for n in everything if n == tail or n.endswith(f".{tail}" if dotted else tail)}
        result += [tail] if same_tail <= chosen else sorted(n for n in chosen if n.rsplit(".", 1)[-1] == tail)
    return result


def _check_proof(model: nn.Module, proof: Proof, folder: Path) -> None:
    expected, replaced, quant = proof
    if quant is not None and quant != format_of(model):
        scheme, _, nested = quant.partition(", ")
        raise AdapterError(
            f"{folder} began as what quantising took from its base (init loftq), so it fits the base in {quant} alone, "
            f"and this one is {format_of(model) or 'not quantised'}. Load it with model.quant={scheme} "
            f"model.double_quant={str(bool(nested)).lower()}; in Python, lorica.load_model(base, quant={scheme!r}, "
            f"double_quant={bool(nested)})."
        )
    if expected is not None and expected != (found := base_fingerprint(model, replaced)):
        raise AdapterError(
            f"{folder} was made for another base: its fingerprint is {expected[:12]}…, this model's is "
            f"{found[:12]}…. Load the base it was trained on; if that is in float16, in the same dtype."
        )


def _beside(model: nn.Module, content: Content, file: Any) -> Beside:
    """What was trained beside the method's own adapters; a head that is tied to trained rows has them too."""
    tokens = dict(content.tokens)
    embedding = input_embedding(model)
    if embedding in tokens:
        tied = {name: tokens[embedding] for name in tied_to(model, [embedding]) if name not in content.whole}
        tokens = {**tied, **tokens}
    names = [*content.whole, *tokens]
    return Beside(names, lambda: {**_whole_adapters(model, content, file), **wrap_tokens(model, tokens)})


def _whole_adapters(model: nn.Module, content: Content, file: Any) -> dict[str, Adapter]:
    """Tied weights that the folder holds with one value are one master; what PEFT trained apart stays apart."""
    found: dict[str, Adapter] = {}
    masters: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, keys in content.whole.items():
        module, own = model.get_submodule(name), {}
        for key, parameter in module.named_parameters(recurse=False):
            at = f"{PREFIX}{name}.{key}"
            if key not in keys:
                continue
            tied = masters.setdefault(id(parameter), [])
            same = [m for other, m in tied if torch.equal(file.get_tensor(other), file.get_tensor(at))]
            own[key] = same[0] if same else master(parameter)
            tied.append((at, own[key]))
        found[name] = FullAdapter(module, content.options, own)
    return found


def _copy_weights(model: nn.Module, file: Any, folder: Path) -> None:
    faults = []
    with torch.no_grad():
        for key, ours in _tensors(adapters(model)).items():
            tensor = file.get_tensor(key)
            if not bool(torch.isfinite(tensor).all()):
                faults.append(f"{key} holds NaN or infinity")
            ours.copy_(tensor)
    refuse(folder, faults)
