"""Adapter folders as files: written whole, hashed and read back; read with suspicion.

    adapter_config.json          PEFT's fields
    adapter_model.safetensors    base_model.model.<module>.lora_A.weight and the like
    lorica.json                  fingerprint of the base, hashes of the other two: what PEFT has no place for

JSON is of bounded size, and tensors come from safetensors only. PEFT's own folders have no `lorica.json`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorica.errors import AdapterError
from lorica.files import read_json_object, sha256, whole_folder, write_json
from lorica.models.tasks import CLASSIFICATION

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PROOF = "lorica.json"


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter folder holds, read or to be written without its base.

    Attributes:
        base_fingerprint: None where it is not known, as in PEFT's own folders.
        replaced: the base's parameters that the fingerprint leaves out, because the adapter brings its own.
        labels: a classifier's classes by id.
        base_quant: the only format of the base that the adapter fits, such as `nf4, double_quant`, where it holds what
            quantising took away; None: any.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    base_fingerprint: str | None
    replaced: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    base_quant: str | None = None


class Proof(NamedTuple):
    """What `lorica.json` says of the base, as in `AdapterFolder`."""

    base_fingerprint: str | None = None
    replaced: tuple[str, ...] = ()
    base_quant: str | None = None


def write_folder(folder: str | Path, content: AdapterFolder) -> Path:
    """Write an adapter folder, whole or not at all, and read it back.

    Raises:
        AdapterError: a weight is not finite, `folder` holds something else than an adapter, or what was written does
            not read back as it was.
    """
    folder = Path(folder)
    tensors = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in content.tensors.items()}
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise AdapterError(f"Not saved: {len(broken)} tensors hold NaN or infinity, the first is {broken[0]}.")
    check_adapter_folder(folder)
    with whole_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        write_json(temporary / CONFIG, content.config)
        proof = {
            "format": 1,
            "base_fingerprint": content.base_fingerprint,
            "replaced": content.replaced,
            "sha256": {name: sha256(temporary / name) for name in (WEIGHTS, CONFIG)},
            **({"labels": content.labels} if content.labels else {}),
            **({"base_quant": content.base_quant} if content.base_quant else {}),
        }
        write_json(temporary / PROOF, proof)
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
    config = read_config(folder)
    proof = read_proof(folder)
    with open_weights(folder) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    return AdapterFolder(config, tensors, proof.base_fingerprint, proof.replaced, read_labels(folder), proof.base_quant)


def read_labels(folder: Path) -> tuple[str, ...]:
    """A classifier's classes by id; of PEFT's own folders, which do not name them, as transformers counts them."""
    if (folder / PROOF).is_file():
        return tuple(map(str, _read_notes(folder).get("labels", ())))
    if read_config(folder).get("task_type") != CLASSIFICATION.peft_name:
        return ()
    with open_weights(folder) as file:
        heads = [key for key in file.keys() if re.search(r"\b(classifier|score)\b.*weight$", key)]  # noqa: SIM118
        return tuple(f"LABEL_{index}" for index in range(file.get_slice(heads[-1]).get_shape()[0])) if heads else ()


def read_config(folder: Path) -> dict[str, Any]:
    """PEFT's fields; AdapterError where there is no such file, or one that cannot be read."""
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} is no adapter folder: it has no {CONFIG}.")
    try:
        config = read_json_object(folder / CONFIG)
    except (OSError, ValueError) as error:
        raise AdapterError(str(error)) from None
    return config


def read_proof(folder: Path) -> Proof:
    """What is known of the base of the adapter in `folder`.

    Raises:
        AdapterError: a hash is not that of its file.
    """
    proof = _read_notes(folder)
    for name, digest in dict(proof.get("sha256", {})).items():
        if name in (WEIGHTS, CONFIG) and (folder / name).is_file() and sha256(folder / name) != digest:
            raise AdapterError(f"{folder / name} is damaged: its SHA-256 is not the one in {PROOF}.")
    expected, quant = (None if proof.get(k) is None else str(proof[k]) for k in ("base_fingerprint", "base_quant"))
    return Proof(expected, tuple(map(str, proof.get("replaced", ()))), quant)


def read_base_quant(folder: Path) -> str | None:
    """The only format of the base that the adapter in `folder` fits, as in `AdapterFolder`; no file is hashed."""
    quant = _read_notes(folder).get("base_quant")
    return None if quant is None else str(quant)


def _read_notes(folder: Path) -> dict[str, Any]:
    """`lorica.json`; empty where PEFT wrote the folder."""
    try:
        return read_json_object(folder / PROOF) if (folder / PROOF).is_file() else {}
    except (OSError, ValueError) as error:
        raise AdapterError(str(error)) from None


def open_weights(folder: Path) -> Any:
    """The weights' file, opened; AdapterError where it is missing, pickled or damaged."""
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


def _prove(tensors: Mapping[str, Tensor], folder: Path) -> None:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        same = set(file.keys()) == set(tensors)
        if not same or not all(torch.equal(file.get_tensor(key), tensor) for key, tensor in tensors.items()):
            raise AdapterError(f"{folder}: what was written does not read back as it was. The disk may be failing.")
