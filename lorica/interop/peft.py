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

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorica.errors import AdapterError, LoricaError
from lorica.files import read_json_object, sha256, whole_folder, write_json
from lorica.methods.attach import adapt, adapters, detach
from lorica.methods.lora import LoRA, LoraAdapter, LoraEmbedding
from lorica.models.load import base_fingerprint

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROOF = "lorica.json"
_PREFIX = "base_model.model."
# The PEFT version whose fields we write.
_PEFT_VERSION = "0.21.2"

# Fields that change what the adapter computes, with the values that mean "not used".
_UNUSED: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none", None),
    "layer_replication": (None, []),
    "lora_bias": (False, None),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (False, None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "velora_config": (None,),
}
# These change the base's weights when they start, so the folder alone does not say what was trained.
_BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "kasa")

Model = TypeVar("Model", bound=nn.Module)


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Save the model's LoRA adapters as a PEFT folder, whole or not at all, and read it back.

    Args:
        folder: replaced if it is an adapter folder already; must be absent or empty otherwise.

    Raises:
        AdapterError: there is nothing to save, a weight is not finite, `folder` holds something else, or what was
            written does not read back as it was.
    """
    folder = Path(folder)
    found = _lora_adapters(model)
    tensors = {_tensor_name(name, a, part): _part(a, part) for name, a in found.items() for part in "AB"}
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise AdapterError(f"Not saved: {len(broken)} tensors hold NaN or infinity, the first is {broken[0]}.")
    check_adapter_folder(folder)
    with whole_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, _peft_config(model, found))
        files = {name: sha256(temporary / name) for name in (WEIGHTS, CONFIG)}
        write_json(temporary / PROOF, {"format": 1, "base_fingerprint": base_fingerprint(model), "sha256": files})
        _prove(tensors, temporary)
    return folder


def check_adapter_folder(folder: Path) -> None:
    """Refuse, with an AdapterError, a folder that holds something else than an adapter: saving would replace it."""
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdapterError(f"Not saved: {folder} exists and is no adapter folder. Choose an empty or a new one.")


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
        options = _options(config, _modules(shapes, model, folder), folder)
        _check_shapes(model, shapes, options, folder)
        try:
            adapt(model, options)
        except LoricaError as error:
            raise AdapterError(f"{folder}: {error}") from None
        try:
            _copy_weights(model, file, folder)
        except AdapterError:
            detach(model)
            raise
    return model


def _lora_adapters(model: nn.Module) -> dict[str, LoraAdapter]:
    found = {name: a for name, a in adapters(model).items() if isinstance(a, LoraAdapter)}
    if not found or len(found) != len(adapters(model)):
        raise AdapterError("Not saved: the model carries no adapters that PEFT's format can hold.")
    return found


def _part(adapter: LoraAdapter, part: str) -> Tensor:
    tensor = adapter.lora_a if part == "A" else adapter.lora_b
    return tensor.detach().to("cpu", copy=True).contiguous()


def _tensor_name(name: str, adapter: LoraAdapter, part: str) -> str:
    kind = f"lora_embedding_{part}" if isinstance(adapter, LoraEmbedding) else f"lora_{part}.weight"
    return f"{_PREFIX}{name}.{kind}"


def _peft_config(model: nn.Module, found: Mapping[str, LoraAdapter]) -> dict[str, Any]:
    options = next(iter(found.values())).options
    assert isinstance(options, LoRA)
    ranks = {name: a.rank for name, a in found.items()}
    # PEFT divides alpha by the rank again, or by its root.
    alphas = {n: a.scale * (math.sqrt(a.rank) if options.rslora else a.rank) for n, a in found.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return {
        "peft_type": "LORA",
        "peft_version": _PEFT_VERSION,
        "task_type": "CAUSAL_LM" if _is_causal_lm(model) else None,
        "auto_mapping": None,
        "base_model_name_or_path": model.config.name_or_path if isinstance(model, PreTrainedModel) else None,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": options.dropout,
        "rank_pattern": {re.escape(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(name): a for name, a in alphas.items() if a != alpha},
        "target_modules": _target_names(model, list(found)),
        "use_rslora": options.rslora,
        "init_lora_weights": True if options.init == "kaiming" else options.init,
        "fan_in_fan_out": any(isinstance(a.base, Conv1D) for a in found.values()),
        "bias": "none",
        "lora_bias": False,
        "use_dora": False,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
    }


def _is_causal_lm(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and model.can_generate() and not model.config.is_encoder_decoder


def _most_common(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


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
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"{folder / CONFIG}: peft_type is {kind!r}; LORA is what can be loaded.")
    faults = [
        f"{key} is {config[key]!r}, which is not supported"
        for key, unused in _UNUSED.items()
        if key in config and config[key] not in unused
    ]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        faults.append(f"init_lora_weights is {init!r}, which changed the base; let PEFT convert it to plain LoRA first")
    if faults:
        raise AdapterError(f"{folder / CONFIG}: " + "; ".join(faults) + ".")
    return config


def _check_proof(model: nn.Module, folder: Path) -> None:
    if not (folder / PROOF).is_file():
        return
    try:
        proof = read_json_object(folder / PROOF)
    except (OSError, ValueError) as error:
        raise AdapterError(str(error)) from None
    for name, digest in dict(proof.get("sha256", {})).items():
        if name in (WEIGHTS, CONFIG) and (folder / name).is_file() and sha256(folder / name) != digest:
            raise AdapterError(f"{folder / name} is damaged: its SHA-256 is not the one in {PROOF}.")
    expected = proof.get("base_fingerprint")
    if expected is not None and expected != base_fingerprint(model):
        raise AdapterError(
            f"{folder} was made for another base: its fingerprint is {str(expected)[:12]}…, this model's is "
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


def _modules(shapes: Mapping[str, tuple[int, ...]], model: nn.Module, folder: Path) -> list[str]:
    """The names of the modules that the tensors belong to; every tensor must be accounted for."""
    names: dict[str, set[str]] = {}
    unknown = []
    for key in shapes:
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", key)
        if match:
            names.setdefault(match[1], set()).add(match[2])
        elif not _is_copy_of_base(key):
            unknown.append(key)
    faults = [f"{key} is no LoRA tensor" for key in unknown]
    faults += [
        f"{name} has lora_{'A' if 'A' in parts else 'B'} only" for name, parts in names.items() if len(parts) < 2
    ]
    present = dict(model.named_modules())
    faults += [f"{name} is no module of {type(model).__name__}" for name in names if name not in present]
    if not names:
        faults.append("there is no LoRA tensor in it")
    _refuse(folder, faults)
    return list(names)


def _is_copy_of_base(key: str) -> bool:
    # PEFT saves the embedding itself beside an adapter on it; `_copy_weights` compares it with the base.
    return key.startswith(_PREFIX) and key.endswith((".base_layer.weight", "lm_head.weight", "embed_tokens.weight"))


def _options(config: Mapping[str, Any], names: list[str], folder: Path) -> LoRA:
    try:
        return LoRA(
            rank=int(config["r"]),
            alpha=float(config.get("lora_alpha", 8)),
            dropout=float(config.get("lora_dropout") or 0.0),
            rslora=bool(config.get("use_rslora", False)),
            targets=tuple(re.escape(name) for name in names),
            init="gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming",
            rank_pattern={str(k): int(v) for k, v in (config.get("rank_pattern") or {}).items()},
            alpha_pattern={str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError, LoricaError) as error:
        raise AdapterError(f"{folder / CONFIG}: {type(error).__name__}: {error}") from None


def _check_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], options: LoRA, folder: Path) -> None:
    """Compare every shape with what the config and the model ask for, before a single number is read."""
    faults = []
    for target in options.targets:
        name = re.sub(r"\\(.)", r"\1", target)
        module = model.get_submodule(name)
        rank, _ = options.rank_and_scale(name)
        if isinstance(module, nn.Embedding):
            kind, expected = "lora_embedding_{}", ((rank, module.num_embeddings), (module.embedding_dim, rank))
        elif isinstance(module, nn.Linear | Conv1D):
            out_size, in_size = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape
            kind, expected = "lora_{}.weight", ((rank, in_size), (out_size, rank))
        else:
            faults.append(f"{name} is a {type(module).__name__}, which LoRA cannot wrap")
            continue
        for part, shape in zip("AB", expected, strict=True):
            key = f"{_PREFIX}{name}.{kind.format(part)}"
            if shapes.get(key) != shape:
                faults.append(f"{key} is {list(shapes.get(key, ()))}, expected {list(shape)}")
    _refuse(folder, faults)


def _copy_weights(model: nn.Module, file: Any, folder: Path) -> None:
    faults = []
    found = _lora_adapters(model)
    with torch.no_grad():
        for name, adapter in found.items():
            for part, parameter in (("A", adapter.lora_a), ("B", adapter.lora_b)):
                tensor = file.get_tensor(_tensor_name(name, adapter, part))
                if not bool(torch.isfinite(tensor).all()):
                    faults.append(f"{_tensor_name(name, adapter, part)} holds NaN or infinity")
                parameter.copy_(tensor)
    present = dict(model.named_modules())
    for key in file.keys():  # noqa: SIM118 - not a dict
        if _is_copy_of_base(key):
            module = present.get(key.removeprefix(_PREFIX).removesuffix(".weight").removesuffix(".base_layer"))
            weight = getattr(module, "weight", None)
            if weight is None or not torch.equal(file.get_tensor(key).to(weight), weight):
                faults.append(f"{key} is not the base's: a trained embedding or head cannot be loaded")
    _refuse(folder, faults)


def _refuse(folder: Path, faults: list[str]) -> None:
    if faults:
        shown = faults[:10] + ([f"and {len(faults) - 10} more"] if len(faults) > 10 else [])
        raise AdapterError(f"{folder} does not fit this model:\n  " + "\n  ".join(shown))
