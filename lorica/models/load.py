"""Loading a base: any folder in Hugging Face format, any hub id, or the model embedded in the package.

Safe and quiet on purpose: a local folder never touches the network, weights come from safetensors only (no pickle),
and no code from a model folder is ever run. `equip` then sets our attention and our layers where they fit.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lorica.assets import embedded_base
from lorica.errors import ModelError, TargetError
from lorica.files import read_json_object
from lorica.kernels import attention
from lorica.kernels.linear import Linear, cpu_computes
from lorica.models.lean import use_lean_layers
from lorica.models.tasks import CLASSIFICATION, choose_task, head_modules, is_encoder, own_labels, set_labels
from lorica.quant.linear import layers as quantized_layers
from lorica.quant.loading import Method, lacks, loading_arguments
from lorica.quant.weight import fingerprint

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
    task: str = "auto",
    labels: Sequence[str] = (),
    seed: int = 0,
    quant: str | None = None,
    double_quant: bool = True,
    method: Method | None = None,
) -> PreTrainedModel:
    """Load a model, frozen nowhere and adapted nowhere, in evaluation mode.

    Args:
        base: a folder in Hugging Face format, a hub id, or `"embedded"`.
        dtype: a torch dtype or its name. None or `"auto"`: the checkpoint's own, but float32 on a CPU that would
            emulate a 16-bit type.
        device: None or `"auto"`: CUDA if there is one, else the CPU.
        revision: of a hub id.
        task: `causal`, `classification`, `seq2seq`, or `auto`; see `models/tasks.py`.
        labels: a classifier's classes by id; none: those of a checkpoint that is a classifier. With others than the
            checkpoint's own, its head is new.
        seed: of a new head.
        quant: `"nf4"` quantises the linear layers, but for the output head, while they are read, a tensor at a time;
            `dtype` is then that of the rest. A checkpoint that is quantised already is read as it is.
        double_quant: quantise the scales too.
        method: that the model will be adapted with. Only `LoRA(init="loftq")`, which starts from what quantising takes
            away, must be known here.

    Raises:
        ModelError: the folder is missing or damaged, holds pickled weights only, asks for code of its own, or cannot
            do the task; its weights are quantised in a way that is not known.
        ConfigError: `quant` is no scheme; TargetError, one of them: `method.targets` matches nothing.
    """
    return load_with_head(
        base,
        dtype=dtype,
        device=device,
        revision=revision,
        task=task,
        labels=labels,
        seed=seed,
        quant=quant,
        double_quant=double_quant,
        method=method,
    )[0]


def load_with_head(
    base: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    task: str = "auto",
    labels: Sequence[str] = (),
    seed: int = 0,
    quant: str | None = None,
    double_quant: bool = True,
    method: Method | None = None,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """As `load_model`, and the names of the modules that have to be trained whole: a classifier's head, and whatever
    else the checkpoint does not hold (the pooling layer of a masked language model).
    """
    config = load_config(base, revision=revision)
    chosen, place = choose_task(task, config, str(base)), pick_device(device)
    own = own_labels(config)
    if chosen is CLASSIFICATION:
        if not (labels or own):
            raise ModelError(f"{base}: a classifier's head needs the names of its classes: labels=(...).")
        set_labels(config, labels or own)
    quantisation = loading_arguments(str(base), config, quant, double_quant, method)
    transformers_logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]), _quiet(chosen is CLASSIFICATION):
            torch.manual_seed(seed)
            model, report = chosen.auto.from_pretrained(
                _name(base),
                config=config,
                dtype=pick_dtype(dtype, config, place),
                use_safetensors=True,
                ignore_mismatched_sizes=chosen is CLASSIFICATION,
                output_loading_info=True,
                **quantisation,
                **_where(base, revision),
            )
            if chosen is CLASSIFICATION and tuple(labels or own) != own:
                _renew_head(model)
    except TargetError:
        raise
    except ModelError as error:
        raise ModelError(f"{base}: {error}") from None
    except Exception as error:
        # from_pretrained raises whatever its many parts raise; every one of them means that this base cannot be used.
        raise ModelError(f"{base}: the model cannot be loaded. {type(error).__name__}: {error}") from error
    if report["missing_keys"] and chosen is not CLASSIFICATION:
        raise ModelError(f"{base}: {lacks(report['missing_keys'])}")
    heads = head_modules(model)
    missing = [key.rpartition(".")[0] for key in report["missing_keys"] if chosen is CLASSIFICATION]
    others = sorted({name for name in missing if name.partition(".")[0] not in heads})
    return equip(model.to(place)).eval(), (*heads, *others)


@contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """Without transformers' table of what a new head lacks: the caller is told by its names."""
    level = transformers_logging.get_verbosity()
    if wanted:
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _renew_head(model: PreTrainedModel) -> None:
    """A head of the same size that was trained for other classes would be kept by `from_pretrained`."""
    with torch.no_grad():
        for name in head_modules(model):
            for module in model.get_submodule(name).modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(0.0, getattr(model.config, "initializer_range", 0.02))
                    if module.bias is not None:
                        module.bias.zero_()


def equip(model: PreTrainedModel) -> PreTrainedModel:
    """Give `model`, in place, what makes it train faster and in less memory, and return it: `load_model` does it.

    Our attention where the architecture allows it, layers that keep less for backward, float32 products where the model
    is in a 16-bit type that its CPU cannot compute in, and products of few rows for decoding. Parameters, their names
    and outputs stay what they were.
    """
    attention.register()
    if model._can_set_attn_implementation():
        model.set_attn_implementation(attention.NAME)
    use_lean_layers(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module.weight.is_cpu and module.weight.dtype in DTYPES.values():
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
        ModelError: the folder is missing, asks for code of its own, or holds no model.
    """
    _check_folder(base)
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(_name(base), **_where(base, revision))
    except Exception as error:
        # As above.
        raise ModelError(_because(base, "config.json cannot be used", error)) from error
    return config


def context_length(config: PretrainedConfig) -> int | None:
    """Most tokens that the base has positions for, or None where it states no limit."""
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not limit or not is_encoder(config):
        return limit or None
    # RoBERTa and its kin count positions from behind the padding token's, as their embedding of positions tells.
    with torch.device("meta"):
        embeddings = getattr(AutoModel.from_config(copy.deepcopy(config)), "embeddings", None)
    positions = getattr(embeddings, "position_embeddings", None)
    first = getattr(positions, "padding_idx", None)
    return int(limit) if first is None else int(limit) - first - 1


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


def base_fingerprint(model: nn.Module, without: Collection[str] = ()) -> str:
    """A short hash that tells one base's weights from another's: 64 hexadecimal digits.

    The modules and parameters `without` do not count: those that are trained whole, of which a new head is another at
    each loading.

    It covers the name and shape of every frozen tensor of the base and up to 64 values of each, spread over it,
    rounded to bfloat16, so the same checkpoint gives the same fingerprint in float32 and in bfloat16, adapted or not.
    (In float16 it may give another: values are rounded twice.) So it does if it is quantised while it is loaded: what
    counts is what a weight was before. A checkpoint that is quantised already is a base of its own.
    """
    digest = hashlib.sha256()
    for name, sample in sorted(_base_samples(model).items()):
        if not any(f"{name}.".startswith(f"{left_out}.") for left_out in without):
            digest.update(f"{name} ".encode() + sample())
    return digest.hexdigest()


def _base_samples(model: nn.Module) -> dict[str, Callable[[], bytes]]:
    """What gives the `fingerprint` of each of the base's tensors, by the name that it has in the bare model."""
    # An adapter holds the module it wraps as `base`, and what it adds is float32 beside it.
    wrapped = {name for name, module in model.named_modules() if "base" in module._modules and name}
    weights = dict(quantized_layers(model))
    samples: dict[str, Callable[[], bytes]] = {}
    for name, parameter in model.named_parameters():
        holder, _, kind = name.rpartition(".")
        weight = None if kind == "bias" else weights.get(holder)
        origin = None if weight is None else weight.origin
        # The parts of a quantised weight stand for the one that it was made of.
        shown = name if weight is None or origin is None else weight.name_in_state(holder)
        sample = partial(fingerprint, parameter) if origin is None else partial(bytes, origin)
        owner = next((w for w in wrapped if name.startswith(f"{w}.")), None)
        if owner is None:
            samples[shown] = sample
        elif name.startswith(f"{owner}.base."):
            samples[f"{owner}.{shown[len(owner) + 6 :]}"] = sample
    return samples


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
