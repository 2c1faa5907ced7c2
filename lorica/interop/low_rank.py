"""LoRA folders as low-rank pairs, read and written without their base: what `arithmetic` works on.

Written is plain LoRA of one rank, alpha = rank, the scale folded into B: whoever reads only part of the scale's fields
(vLLM no patterns, llama.cpp no rsLoRA either) computes the same as PEFT. What it gives up: where ranks differ, the
smaller ones are padded with zeros, which take space and would not train on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorica.errors import AdapterError, LoricaError
from lorica.files import whole_folder
from lorica.interop.arithmetic import LowRank, fold, pad
from lorica.interop.peft import AdapterFolder, read_folder, write_folder
from lorica.methods.lora import LoRA

_PREFIX = "base_model.model."
# The names of a pair behind its module's, for a matrix and for an embedding.
_MATRIX = ("lora_A.weight", "lora_B.weight")
_EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
# What PEFT saves of the base itself beside an adapter on an embedding.
_COPIES = (".base_layer.weight", "lm_head.weight", "embed_tokens.weight")


@dataclass(frozen=True)
class LowRankAdapter:
    """A LoRA adapter without its base.

    pairs: by module. embeddings: which of them wrap an embedding. config: PEFT's fields. base_fingerprint: None where
    it is not known. copies: tensors of the base that stand in the folder, by their names there.
    """

    pairs: Mapping[str, LowRank]
    embeddings: frozenset[str]
    config: Mapping[str, Any]
    base_fingerprint: str | None
    copies: Mapping[str, Tensor]


def read_low_rank(folder: str | Path) -> LowRankAdapter:
    """Read a folder that holds LoRA.

    Raises:
        AdapterError: it is no adapter folder, damaged, of another method, uses what plain LoRA has not, or holds a
            tensor that is no part of a pair; the message lists every fault.
    """
    content = read_folder(folder)
    if not LoRA.is_peft(content.config):
        kind = content.config.get("peft_type")
        raise AdapterError(f"{folder}: peft_type is {kind!r}; this can be computed for LORA only.")
    halves: dict[str, dict[str, Tensor]] = {}
    copies, faults = {}, []
    for key, tensor in content.tensors.items():
        ends = [end for end in (*_MATRIX, *_EMBEDDING) if key.endswith(f".{end}")]
        if key.startswith(_PREFIX) and ends:
            halves.setdefault(key.removeprefix(_PREFIX).removesuffix(f".{ends[0]}"), {})[ends[0]] = tensor
            if tensor.dim() != 2:
                faults.append(f"{key} is {list(tensor.shape)}, and a matrix is expected")
            elif not bool(torch.isfinite(tensor).all()):
                faults.append(f"{key} holds NaN or infinity")
        elif key.endswith(_COPIES):
            copies[key] = tensor
        else:
            faults.append(f"{key} is no tensor of LoRA")
    try:
        options = LoRA.from_peft(content.config, list(halves))
    except (LoricaError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(f"{folder}: adapter_config.json: {error}") from None
    pairs = {}
    for name, found in halves.items():
        if set(found) not in (set(_MATRIX), set(_EMBEDDING)):
            faults.append(f"{name} has {', '.join(sorted(found))}, which is no pair")
            continue
        a, b = (found[key] for key in sorted(found))
        rank, scale = options.rank_and_scale(name)
        if not faults and not a.shape[0] == b.shape[1] == rank:
            faults.append(f"{name}: A is {list(a.shape)}, B {list(b.shape)}, and the rank should be {rank}")
        pairs[name] = LowRank(a, b, scale)
    if not halves:
        faults.append("there is no adapter's tensor in it")
    if faults:
        raise AdapterError(f"{folder} cannot be used:\n  " + "\n  ".join(faults[:10]))
    embeddings = frozenset(name for name in pairs if set(halves[name]) == set(_EMBEDDING))
    return LowRankAdapter(pairs, embeddings, content.config, content.base_fingerprint, copies)


def write_low_rank(folder: str | Path, adapter: LowRankAdapter) -> int:
    """Write `adapter` as plain LoRA of one rank, read it back, and return the rank.

    Raises:
        AdapterError: a weight is not finite, or what was written does not read back as it was.
    """
    rank = max(pair.rank for pair in adapter.pairs.values())
    plain = {name: pad(fold(pair), rank) for name, pair in adapter.pairs.items()}
    tensors = dict(adapter.copies)
    for name, pair in plain.items():
        for key, tensor in zip(_EMBEDDING if name in adapter.embeddings else _MATRIX, pair[:2], strict=True):
            tensors[f"{_PREFIX}{name}.{key}"] = tensor
    scale = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    config = {**adapter.config, **scale, "init_lora_weights": True, "inference_mode": True}
    with whole_folder(Path(folder)) as temporary:
        write_folder(temporary, AdapterFolder(config, tensors, adapter.base_fingerprint))
        again = read_low_rank(temporary)
        same = again.pairs.keys() == plain.keys() and again.embeddings == adapter.embeddings
        if not same or not all(
            torch.equal(ours.a, theirs.a) and torch.equal(ours.b, theirs.b) and theirs.scale == 1.0
            for ours, theirs in ((plain[name], again.pairs[name]) for name in plain)
        ):
            raise AdapterError(f"{folder}: what was written does not read back as it was.")
    return rank
