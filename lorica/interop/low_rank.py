"""LoRA folders as low-rank pairs, read and written without their base: what `arithmetic` works on.

A module has one pair, or one for each group of its convolution or each of its experts (`pair_layouts.py`). Of an
attention's output projection the scale here is half of what it computes with (see `methods/lora_weights.py`).

Written is plain LoRA of one rank, alpha = rank, the scale folded into B: whoever reads only part of the scale's fields
(vLLM no patterns, llama.cpp no rsLoRA either) computes the same as PEFT. What it gives up: where ranks differ, the
smaller ones are padded with zeros, which take space and would not train on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.errors import AdapterError, LoricaError
from lorica.files import whole_folder
from lorica.interop.arithmetic import LowRank, fold, pad
from lorica.interop.folder import AdapterFolder, read_folder, write_folder
from lorica.interop.pair_layouts import EMBEDDING, MATRIX, Layout, layout_of
from lorica.methods.lora import LoRA
from lorica.methods.low_rank import matches

_PREFIX = "base_model.model."
# What PEFT saves of the base itself beside an adapter on an embedding.
_COPIES = (".base_layer.weight", "lm_head.weight", "embed_tokens.weight")


@dataclass(frozen=True)
class LowRankAdapter:
    """A LoRA adapter without its base.

    pairs: by the names that `layouts`, which are by module, give to the pairs of a module. config: PEFT's fields.
    base_fingerprint: None where it is not known. copies: tensors of the base that stand in the folder, by their names
    there. base_quant: as in `AdapterFolder`.
    """

    pairs: Mapping[str, LowRank]
    layouts: Mapping[str, Layout]
    config: Mapping[str, Any]
    base_fingerprint: str | None
    copies: Mapping[str, Tensor]
    base_quant: str | None = None


def read_low_rank(folder: str | Path) -> LowRankAdapter:
    """Read a folder that holds LoRA.

    Raises:
        AdapterError: it is no adapter folder, damaged, of another method, uses what plain LoRA has not, or holds a
            tensor that is no part of a pair; the message lists every fault.
    """
    content = read_folder(folder)
    if not LoRA.is_peft(content.config):
        kind = "DoRA" if content.config.get("use_dora") else repr(content.config.get("peft_type"))
        hint = " `lorica adapter static` writes a LoRA of it." if "HYDRA" in kind else ""
        raise AdapterError(f"{folder}: peft_type is {kind}; this can be computed for LORA only.{hint}")
    halves: dict[str, dict[str, Tensor]] = {}
    copies, faults = {}, []
    for key, tensor in content.tensors.items():
        ends = [end for end in (*MATRIX, *EMBEDDING) if key.endswith(f".{end}")]
        if key.startswith(_PREFIX) and ends:
            halves.setdefault(key.removeprefix(_PREFIX).removesuffix(f".{ends[0]}"), {})[ends[0]] = tensor
            if not bool(torch.isfinite(tensor).all()):
                faults.append(f"{key} holds NaN or infinity")
        elif key.endswith(_COPIES):
            copies[key] = tensor
        else:
            faults.append(f"{key} is no tensor of LoRA's pairs, and only they can be computed with")
    try:
        options = LoRA.from_peft(content.config, [_module(name) for name in halves])
    except (LoricaError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{folder}: adapter_config.json: {error}") from None
    pairs: dict[str, LowRank] = {}
    layouts: dict[str, Layout] = {}
    for name, found in halves.items():
        try:
            layouts[name], scale = _layout_and_scale(name, found, content.config, options)
        except AdapterError as error:
            faults.append(str(error))
            continue
        each = layouts[name].split(*(found[key] for key in layouts[name].names))
        pairs |= {part: LowRank(a, b, scale) for part, (a, b) in zip(layouts[name].part_names(name), each, strict=True)}
    if not halves:
        faults.append("there is no adapter's tensor in it")
    if faults:
        raise AdapterError(f"{folder} cannot be used:\n  " + "\n  ".join(faults[:10]))
    return LowRankAdapter(pairs, layouts, content.config, content.base_fingerprint, copies, content.base_quant)


def _layout_and_scale(
    name: str, found: Mapping[str, Tensor], config: Mapping[str, Any], options: LoRA
) -> tuple[Layout, float]:
    names = next((names for names in (MATRIX, EMBEDDING) if set(found) == set(names)), None)
    if names is None:
        raise AdapterError(f"{name} has {', '.join(sorted(found))}, which is no pair")
    parameters = _parameters(config, name)
    scales = {options.rank_and_scale(place) for place in parameters or [_module(name)]}
    if len(scales) > 1:
        raise AdapterError(
            f"{name}: its parameters differ in rank or alpha, and a folder does not say whose pair it is"
        )
    ((rank, scale),) = scales
    a, b = (found[key] for key in names)
    layout = layout_of(a, b, names, rank, is_stack=bool(parameters))
    if layout is None:
        raise AdapterError(f"{name}: A is {list(a.shape)}, B {list(b.shape)}, and the rank should be {rank}")
    return layout, scale


def _module(name: str) -> str:
    """The module of the base that a pair on disk belongs to; PEFT nests its wrappers."""
    return re.sub(r"(\.base_layer)+(\.out_proj)?$", "", name)


def _parameters(config: Mapping[str, Any], name: str) -> list[str]:
    """The whole names of the module's parameters that PEFT's `target_parameters` may mean, if any."""
    module, found = _module(name), []
    for parameter in config.get("target_parameters") or ():
        holder, _, key = str(parameter).rpartition(".")
        if not holder or matches(re.escape(holder), module):
            found.append(f"{module}.{key}")
    return found


def module_names(layouts: Mapping[str, Layout], config: Mapping[str, Any]) -> list[str]:
    """What PEFT's `target_modules` must name: the modules that are not named by their parameters."""
    return sorted({_module(name) for name in layouts if not _parameters(config, name)})


def write_low_rank(folder: str | Path, adapter: LowRankAdapter) -> int:
    """Write `adapter` as plain LoRA of one rank, read it back, and return the rank.

    Raises:
        AdapterError: a weight is not finite, or what was written does not read back as it was.
    """
    parts = {name: [adapter.pairs[part] for part in x.part_names(name)] for name, x in adapter.layouts.items()}
    # The groups of a convolution share its rank.
    shared = math.lcm(*(layout.num_groups for layout in adapter.layouts.values()))
    largest = max(pair.rank * adapter.layouts[name].num_groups for name, pairs in parts.items() for pair in pairs)
    rank = -(-largest // shared) * shared
    plain: dict[str, LowRank] = {}
    tensors = dict(adapter.copies)
    for name, layout in adapter.layouts.items():
        padded = [pad(fold(pair), rank // layout.num_groups) for pair in parts[name]]
        plain |= zip(layout.part_names(name), padded, strict=True)
        for key, tensor in zip(layout.names, layout.join([pair[:2] for pair in padded]), strict=True):
            tensors[f"{_PREFIX}{name}.{key}"] = tensor
    scale = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    config = {**adapter.config, **scale, "init_lora_weights": True, "inference_mode": True}
    with whole_folder(Path(folder)) as temporary:
        content = AdapterFolder(config, tensors, adapter.base_fingerprint, base_quant=adapter.base_quant)
        write_folder(temporary, content)
        again = read_low_rank(temporary)
        same = again.pairs.keys() == plain.keys() and again.layouts == adapter.layouts
        if not same or not all(
            torch.equal(ours.a, theirs.a) and torch.equal(ours.b, theirs.b) and theirs.scale == 1.0
            for ours, theirs in ((plain[name], again.pairs[name]) for name in plain)
        ):
            raise AdapterError(f"{folder}: what was written does not read back as it was.")
    return rank
