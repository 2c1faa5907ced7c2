"""`lorica adapter inspect | verify | convert | combine | scale`: what can be asked of an adapter, and computed with it.

ADAPTER is an adapter folder or a run folder. The base is loaded by `verify`, which needs its logits, and by `inspect`
where `--base` asks for relative sizes; everything else works on the low-rank pairs alone. Every folder that is written
is plain LoRA of one rank with the scale in B (see interop/low_rank.py), and is read back before it gets its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorica.errors import AdapterError, ConfigError
from lorica.interop.arithmetic import Approximation, How, LowRank, combine, norm, relative_error, truncate
from lorica.interop.folder import CONFIG, PROOF, read_folder
from lorica.interop.loralib import read_loralib
from lorica.interop.low_rank import LowRankAdapter, module_names, read_low_rank, write_low_rank
from lorica.interop.pair_layouts import EMBEDDING, MATRIX, Layout
from lorica.interop.peft import load_adapter
from lorica.methods.attach import adapters, detach
from lorica.methods.lora import LoRA
from lorica.methods.lora_kinds import LoraAdapter
from lorica.models.load import load_config
from lorica.recipes import console
from lorica.recipes.merge import check_free, probe_ids
from lorica.recipes.opening import find_source
from lorica.recipes.proof import agreement, logits_of
from lorica.strict_yaml import dump_value


@dataclass(frozen=True, slots=True)
class Part:
    """A module's update, or a single tensor of a method that is no LoRA.

    shape: [out, in] of the update. norm: its Frobenius norm. relative: that norm over the base weight's.
    """

    name: str
    shape: list[int]
    rank: int | None
    scale: float | None
    norm: float
    relative: float | None
    bytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What an adapter folder holds. options: what its configuration sets. base_fingerprint: None where not known.

    base_quant: the only format of the base that it fits; None: any.
    """

    adapter: str
    method: str
    base: str | None
    base_fingerprint: str | None
    base_quant: str | None
    num_tensors: int
    num_parameters: int
    bytes: int
    options: dict[str, Any]
    parts: list[Part]


@dataclass(frozen=True, slots=True)
class Verification:
    """That an adapter fits its base and changes it. kl: mean nats a token from the base. hashed: has SHA-256 sums."""

    adapter: str
    base: str
    num_tensors: int
    num_modules: int
    hashed: bool
    max_difference: float
    kl: float
    top1: float


@dataclass(frozen=True, slots=True)
class Computed:
    """A written adapter folder. error: relative Frobenius error over all modules; errors: of each module."""

    output: str
    rank: int
    error: float
    errors: dict[str, float]


def inspect(adapter: str | Path, *, base: str | None = None) -> Inspection:
    """Print what `adapter` holds; with `base`, how large each update is beside the weight that it changes.

    Raises:
        AdapterError: it is no adapter folder, damaged, or does not fit `base`.
    """
    folder = _folder(adapter)
    content = read_folder(folder)
    weights = {} if base is None else _weights(base, folder)
    try:
        pairs = read_low_rank(folder).pairs
        parts = [_part(name, pair, weights.get(name)) for name, pair in pairs.items()]
    except AdapterError as error:
        console.log(f"Shown tensor by tensor, being no low-rank pairs. {error}")
        parts = [
            Part(key, list(x.shape), None, None, float(x.double().norm()), None, x.nbytes)
            for key, x in content.tensors.items()
        ]
    result = Inspection(
        adapter=str(folder),
        method=str(content.config.get("peft_type")),
        base=content.config.get("base_model_name_or_path"),
        base_fingerprint=content.base_fingerprint,
        base_quant=content.base_quant,
        num_tensors=len(content.tensors),
        num_parameters=sum(tensor.numel() for tensor in content.tensors.values()),
        bytes=sum(tensor.nbytes for tensor in content.tensors.values()),
        options={key: value for key, value in content.config.items() if value not in (None, False, "none", {}, [])},
        parts=parts,
    )
    _print_inspection(result)
    return result


def verify(adapter: str | Path, *, base: str | None = None) -> Verification:
    """Prove that `adapter` fits its base, every tensor of it, and that it changes what the base says.

    Raises:
        AdapterError: it is damaged, holds a tensor that the base has no place for or a number that is not finite, was
            made for another base, or changes no logit.
    """
    folder = _folder(adapter)
    content = read_folder(folder)
    source = find_source(folder, [] if base is None else [f"model.base={dump_value(base)}"])
    # It refuses names, shapes, numbers and a fingerprint that do not fit.
    model = load_adapter(source.load_base(), folder).eval()
    found = adapters(model)
    ids = probe_ids(model)
    adapted = logits_of(model, ids)
    plain = logits_of(detach(model), ids)
    change = agreement(adapted, plain, plain, model.dtype)
    # Less than float32 can tell is what combining left of updates that cancel out.
    if not change.max_difference > torch.finfo(torch.float32).eps * float(plain.abs().max()):
        what = "makes logits that are not finite" if math.isnan(change.max_difference) else "changes no logit"
        raise AdapterError(
            f"{folder} fits {source.model.base} and {what}: compared on {change.num_tokens} tokens. Was it trained?"
        )
    console.log(
        f"{folder} fits {source.model.base}: all {len(content.tensors)} tensors, in {len(found)} modules, are finite "
        f"and have their place. It changes logits by up to {change.max_difference:.3g}; KL {change.kl:.2g} nats a "
        f"token, another first choice at {1 - change.top1:.1%} of {change.num_tokens} positions."
    )
    return Verification(
        adapter=str(folder),
        base=source.model.base,
        num_tensors=len(content.tensors),
        num_modules=len(found),
        hashed=(folder / PROOF).is_file(),
        max_difference=change.max_difference,
        kl=change.kl,
        top1=change.top1,
    )


def convert(
    adapter: str | Path,
    output: str | Path,
    *,
    rank: int | None = None,
    base: str | None = None,
    alpha: float | None = None,
    enabled: Mapping[str, Sequence[bool]] | None = None,
) -> Computed:
    """Write `adapter` with the scale folded into B, cut to `rank` by truncated SVD where one is given.

    Args:
        base, alpha, enabled: of a loralib state, which `adapter` is where it names a .safetensors file; see
            `interop.loralib`.

    Raises:
        AdapterError: `adapter` cannot be read or is no LoRA.
        ConfigError: `output` exists and is not empty, or a loralib state comes without alpha or base.
    """
    check_free(Path(output))
    if Path(adapter).is_file():
        source = _from_loralib(Path(adapter), base, alpha, enabled or {})
    elif base is not None or alpha is not None or enabled:
        raise ConfigError("--base, --alpha and --enabled are for a loralib state, a .safetensors file.")
    else:
        source = read_low_rank(_folder(adapter))
    _check_rank(source, rank)
    parts = {
        name: Approximation(pair, 0.0, norm(pair)) if rank is None else truncate(pair, rank)
        for name, pair in source.pairs.items()
    }
    return _write(output, source, parts)


def scale(adapter: str | Path, factor: float, output: str | Path) -> Computed:
    """Write `adapter` with its update multiplied by `factor`; errors as `convert`."""
    if not math.isfinite(factor):
        raise ConfigError(f"The factor is {factor}; expected a finite number.")
    check_free(Path(output))
    source = read_low_rank(_folder(adapter))
    _check_learned(_folder(adapter), source)
    scaled = {name: pair._replace(scale=pair.scale * factor) for name, pair in source.pairs.items()}
    return _write(output, source, {name: Approximation(pair, 0.0, norm(pair)) for name, pair in scaled.items()})


def combine_adapters(
    sources: Sequence[str],
    output: str | Path,
    how: How,
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> Computed:
    """Write the combination of `sources`, each ADAPTER or ADAPTER=WEIGHT; see `interop.arithmetic` for `how`.

    Raises:
        AdapterError: one cannot be read or is no LoRA, or they were made for different bases.
        ConfigError: fewer than two, a weight that is no number, or `output` exists and is not empty.
    """
    check_free(Path(output))
    if len(sources) < 2:
        raise ConfigError("combine takes two adapters or more. To multiply one, use `lorica adapter scale`.")
    folders, weights = zip(*(_weighted(source) for source in sources), strict=True)
    found = [read_low_rank(folder) for folder in folders]
    _check_one_base(dict(zip(map(str, folders), found, strict=True)))
    for folder, adapter in zip(folders, found, strict=True):
        _check_learned(folder, adapter)
        _check_rank(adapter, rank)
    pairs = [adapter.pairs for adapter in found]
    parts = combine(pairs, weights, how, rank=rank, density=density, seed=seed)
    layouts = {name: layout for adapter in found for name, layout in adapter.layouts.items()}
    config = dict(found[0].config)
    if any(adapter.pairs.keys() != parts.keys() for adapter in found):
        # The first one's pattern would leave out what only another one has.
        parameters = {name: None for adapter in found for name in adapter.config.get("target_parameters") or ()}
        config |= {"target_parameters": list(parameters) or None, "exclude_modules": None}
        config |= {"target_modules": module_names(layouts, config)}
        config |= {"layers_to_transform": None, "layers_pattern": None}
    merged = LowRankAdapter(
        pairs={name: part.pair for name, part in parts.items()},
        layouts=layouts,
        config=config,
        # Known only where all say it: the others may be of a base that merely has the same shapes.
        base_fingerprint=found[0].base_fingerprint if all(adapter.base_fingerprint for adapter in found) else None,
        copies=_common_copies(found),
    )
    return _write(output, merged, parts)


def _write(output: str | Path, source: LowRankAdapter, parts: Mapping[str, Approximation]) -> Computed:
    rank = write_low_rank(output, replace(source, pairs={name: part.pair for name, part in parts.items()}))
    errors = {name: relative_error([part]) for name, part in parts.items()}
    result = Computed(str(output), rank, relative_error(parts.values()), errors)
    if any(errors.values()):
        rows = [(name, f"{error:.2%}") for name, error in errors.items()]
        console.table("", ("module", "relative error"), rows, numeric=("relative error",))
    console.log(
        f"Written to {output} and read back: {len(parts)} modules of rank {rank}, relative error {result.error:.2%}."
    )
    return result


def _check_rank(adapter: LowRankAdapter, rank: int | None) -> None:
    """Refuse a rank for convolutions with groups, each of which has its share of it."""
    grouped = [name for name, layout in adapter.layouts.items() if layout.num_groups > 1]
    if rank is not None and grouped:
        raise AdapterError(f"{', '.join(grouped[:5])}: a convolution with groups cannot be given another rank.")


def _check_learned(folder: Path, adapter: LowRankAdapter) -> None:
    """Refuse an update of which a part was not learned, for arithmetic on what was."""
    if adapter.base_quant is not None:
        raise AdapterError(
            f"{folder} began as what quantising took from its base (init loftq). That part belongs to the base in "
            f"{adapter.base_quant} once and whole, so the adapter cannot be scaled or combined with others."
        )


def _folder(adapter: str | Path) -> Path:
    """The adapter folder itself, or that in a run folder."""
    path = Path(adapter)
    inside = path / "adapter"
    return inside if not (path / CONFIG).is_file() and (inside / CONFIG).is_file() else path


def _weighted(source: str) -> tuple[Path, float]:
    path, equals, weight = source.rpartition("=")
    if not equals or Path(source).exists():
        return _folder(source), 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{source}: {weight!r} is no weight. Write ADAPTER or ADAPTER=WEIGHT, as in runs/first=0.5.")
    return _folder(path), number


def _check_one_base(found: Mapping[str, LowRankAdapter]) -> None:
    prints = {path: x.base_fingerprint for path, x in found.items() if x.base_fingerprint is not None}
    if len(set(prints.values())) > 1:
        lines = [f"{path}: fingerprint {value[:12]}…" for path, value in prints.items()]
        raise AdapterError("The adapters were made for different bases:\n  " + "\n  ".join(lines))
    bases = {x.config.get("base_model_name_or_path") for x in found.values()}
    if len(prints) < len(found) and len(bases) > 1:
        console.log(f"Warning: the adapters name {', '.join(map(str, bases))}; nothing tells whether that is one base.")
    kinds: dict[str, set[Layout]] = {}
    for name, layout in (item for x in found.values() for item in x.layouts.items()):
        kinds.setdefault(name, set()).add(layout)
    if mixed := [name for name, layouts in kinds.items() if len(layouts) > 1]:
        raise AdapterError(f"{', '.join(mixed[:5])} is one kind of layer in one adapter and another kind in another.")


def _common_copies(found: Sequence[LowRankAdapter]) -> dict[str, Tensor]:
    copies: dict[str, Tensor] = {}
    for adapter in found:
        for key, tensor in adapter.copies.items():
            if not torch.equal(copies.setdefault(key, tensor), tensor):
                raise AdapterError(f"{key}, a tensor of the base that both adapters carry, differs between them.")
    return copies


def _from_loralib(
    file: Path, base: str | None, alpha: float | None, enabled: Mapping[str, Sequence[bool]]
) -> LowRankAdapter:
    """The pairs in `file`; the base's modules, without their weights, say which of them are embeddings."""
    if base is None or alpha is None:
        raise ConfigError("A loralib state knows neither its base nor its alpha: give --base and --alpha.")
    if file.suffix != ".safetensors":
        raise AdapterError(
            f"{file} is no safetensors file. loralib's .pt is pickled, and loading a pickle can run code; where you "
            f"trust it: save_file(torch.load({file.name!r}, weights_only=True), '{file.stem}.safetensors')."
        )
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{file} is damaged: {error}") from None
    pairs = read_loralib(state, alpha=alpha, enabled=enabled)
    with torch.device("meta"):
        modules = dict(AutoModelForCausalLM.from_config(load_config(base)).named_modules())
    kinds = (*LoRA.linear_kinds, nn.Embedding)
    if lost := [name for name in pairs if not isinstance(modules.get(name), kinds)]:
        raise AdapterError(f"{file}: {base} has no layer at {', '.join(lost[:5])}.")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "target_modules": sorted(pairs),
        "fan_in_fan_out": any(not isinstance(modules[name], nn.Linear | nn.Embedding) for name in pairs),
        "bias": "none",
    }
    layouts = {name: Layout(EMBEDDING if isinstance(modules[name], nn.Embedding) else MATRIX) for name in pairs}
    return LowRankAdapter(pairs, layouts, config, None, {})


def _weights(base: str, folder: Path) -> dict[str, Tensor]:
    """The weights that the adapter in `folder` changes, by module; it must fit `base`."""
    source = find_source(folder, [f"model.base={dump_value(base)}"])
    found = adapters(load_adapter(source.load_base(), folder))
    return {name: adapter.weight for name, adapter in found.items() if isinstance(adapter, LoraAdapter)}


def _part(name: str, pair: LowRank, weight: Tensor | None) -> Part:
    size = norm(pair)
    relative = None if weight is None else size / float(weight.detach().double().norm())
    shape = [pair.b.shape[0], pair.a.shape[1]]
    return Part(name, shape, pair.rank, pair.scale, size, relative, pair.a.nbytes + pair.b.nbytes)


def _print_inspection(result: Inspection) -> None:
    console.table(
        f"{result.adapter}: {result.method}, {console.human_count(result.num_parameters)} parameters, "
        f"{console.human_bytes(result.bytes)}",
        ("module", "shape", "rank", "scale", "norm", "of the base's", "bytes"),
        [
            (
                part.name,
                " x ".join(map(str, part.shape)),
                part.rank,
                None if part.scale is None else f"{part.scale:g}",
                f"{part.norm:.4g}",
                None if part.relative is None else f"{part.relative:.2%}",
                f"{part.bytes:,}",
            )
            for part in result.parts
        ],
        numeric=("shape", "rank", "scale", "norm", "of the base's", "bytes"),
    )
    facts = {
        "base_fingerprint": result.base_fingerprint or "not known",
        **({"base_quant": result.base_quant} if result.base_quant else {}),
        **result.options,
    }
    console.table("", ("option", "value"), [(key, value) for key, value in facts.items()])
