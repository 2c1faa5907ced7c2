"""Loading a base: any folder in Hugging Face format, any hub id, or the model embedded in the package.

Safe and quiet on purpose: a local folder never touches the network, weights come from safetensors only (no pickle),
and no code from a model folder is ever run. `equip` then sets our attention and our layers where they fit.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from lorica.assets import embedded_base
from lorica.errors import ModelError
from lorica.files import read_json_object
from lorica.kernels.linear import Linear, cpu_computes, is_widened
from lorica.models import attention
from lorica.models.lean import use_lean_layers

EMBEDDED = "embedded"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Where the CPU has no arithmetic for a 16-bit type, that type saves only memory, and costs precision.
_FALLBACK_DTYPE = torch.float32


def load_model(
    base: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model, frozen nowhere and adapted nowhere, in evaluation mode.

    Args:
        base: a folder in Hugging Face format, a hub id, or `"embedded"`.
        dtype: a torch dtype or its name. None or `"auto"`: the checkpoint's own, but float32 on a CPU that would
        emulate
            a 16-bit type.
        device: None or `"auto"`: CUDA if there is one, else the CPU.
        revision: of a hub id.

    Raises:
        ModelError: the folder is missing or damaged, holds pickled weights only, or asks for code of its own.
    """
    config = load_config(base, revision=revision)
    place = pick_device(device)
    transformers_logging.disable_progress_bar()
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            _name(base),
            config=config,
            dtype=pick_dtype(dtype, config, place),
            use_safetensors=True,
            **_where(base, revision),
        )
    except Exception as error:
        # from_pretrained raises whatever its many parts raise; every one of them means that this base cannot be used.
        raise ModelError(f"{base}: the model cannot be loaded. {type(error).__name__}: {error}") from error
    return equip(model.to(place)).eval()


def equip(model: PreTrainedModel) -> PreTrainedModel:
    """Give `model`, in place, what makes it train faster and in less memory, and return it: `load_model` does it.

    Our attention where the architecture allows it, layers that keep less for backward, and float32 products where the
    model is in a 16-bit type that its CPU cannot compute in. Parameters, their names and outputs stay what they were.
    """
    attention.register()
    if model._can_set_attn_implementation():
        model.set_attn_implementation(attention.NAME)
    use_lean_layers(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and is_widened(module.weight):
            model.set_submodule(name, Linear(module))
    return model


def load_tokenizer(base: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The base's tokenizer.

    Raises:
        ModelError: there is none, or it asks for code of its own.
    """
    _check_folder(base)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(_name(base), **_where(base, revision))
    except Exception as error:
        # As above: any failure means that the folder holds no tokenizer that can be used.
        raise ModelError(_because(base, "the tokenizer cannot be loaded", error)) from error
    return tokenizer


def load_config(base: str | Path, *, revision: str | None = None) -> PretrainedConfig:
    """The base's configuration; no weights are read.

    Raises:
        ModelError: the folder is missing, asks for code of its own, or holds no causal language model.
    """
    _check_folder(base)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(_name(base), **_where(base, revision))
    except Exception as error:
        # As above.
        raise ModelError(_because(base, "config.json cannot be used", error)) from error
    # Loaded as causal, such a model still sees the token it should predict: its loss would fall and mean nothing.
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", True):
        raise ModelError(
            f"{base}: a {config.model_type} model reads in both directions, and a causal language model is wanted. "
            "lorica.adapt takes it, in a training loop of your own."
        )
    return config


def pick_device(device: torch.device | str | None) -> torch.device:
    """The device asked for; CUDA if there is one, else the CPU, for None and `"auto"`."""
    if device in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def pick_dtype(dtype: torch.dtype | str | None, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype asked for; for None and `"auto"` the checkpoint's own where the device computes in it."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in (None, "auto"):
        if dtype not in DTYPES:
            raise ModelError(f"dtype {dtype!r} is not known; expected auto, {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    if device.type == "cpu" and not cpu_computes(own):
        return _FALLBACK_DTYPE
    return own


def base_fingerprint(model: nn.Module) -> str:
    """A short hash that tells one base's weights from another's: 64 hexadecimal digits.

    It covers the name and shape of every frozen tensor of the base and up to 64 values of each, spread over it,
    rounded to bfloat16, so the same checkpoint gives the same fingerprint in float32 and in bfloat16, adapted or not.
    (In float16 it may give another: values are rounded twice.)
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_base_tensors(model).items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64]
        digest.update(sample.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _base_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    # An adapter holds the module it wraps as `base`, and what it adds is float32 beside it.
    wrapped = {name for name, module in model.named_modules() if "base" in module._modules and name}
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        owner = next((w for w in wrapped if name.startswith(f"{w}.")), None)
        if owner is None:
            tensors[name] = parameter
        elif name.startswith(f"{owner}.base."):
            tensors[f"{owner}.{name[len(owner) + 6 :]}"] = parameter
    return tensors


def is_local(base: str | Path) -> bool:
    """Whether `base` is a folder here; else it is looked for in the hub's cache and on the hub."""
    return Path(_name(base)).is_dir()


def _because(base: str | Path, what: str, error: Exception) -> str:
    if is_local(base):
        return f"{base}: {what}. {type(error).__name__}: {error}"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{base}: there is no such folder here, and the hub did not give it either: {reason}\n"
        "Expected a folder in Hugging Face format, a hub id, or embedded."
    )


def _name(base: str | Path) -> str:
    return str(embedded_base()) if str(base) == EMBEDDED else str(base)


def _where(base: str | Path, revision: str | None) -> dict[str, Any]:
    local = is_local(base)
    return {"local_files_only": local, "revision": None if local else revision, "trust_remote_code": False}


def _check_folder(base: str | Path) -> None:
    """Refuse, before anything is loaded, what would need a network, a pickle or foreign code."""
    folder = Path(_name(base))
    if not folder.is_dir():
        looks_like_path = str(base).startswith((".", "/", "~")) or str(base).count("/") > 1 or folder.exists()
        if looks_like_path:
            raise ModelError(f"{base}: there is no such folder. Expected a folder in Hugging Face format or a hub id.")
        return
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{folder}: there is no config.json. Expected a folder in Hugging Face format.")
    for file in (config, folder / "tokenizer_config.json"):
        if file.is_file() and "auto_map" in _json_object(file):
            raise ModelError(f"{file}: auto_map asks to run code from the model's folder, which Lorica never does.")
    weights = {path.suffix for path in folder.iterdir()}
    if weights & {".bin", ".pt", ".pth"} and ".safetensors" not in weights:
        raise ModelError(
            f"{folder}: the weights are pickled (.bin, .pt), and loading a pickle can run code. "
            "Convert them to safetensors first."
        )


def _json_object(file: Path) -> dict[str, Any]:
    try:
        return read_json_object(file)
    except (OSError, ValueError) as error:
        raise ModelError(str(error)) from None
