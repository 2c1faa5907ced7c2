"""Checkpoints that are either whole or not there: written aside, hashed, flushed, renamed.

    checkpoints/step-00000050/
        trainable.safetensors  optimizer.safetensors  rng.safetensors    named tensors, no pickle
        state.json                                                       counters and the run's identity
        manifest.json                                                    size and SHA-256 of each, and its own

A folder under its final name is complete, because the rename comes last and everything in it was flushed before; so a
kill at any moment leaves the previous checkpoint as it was. Hashes catch what the disk does later. What it gives up:
saving in the background while training goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from lorica.errors import CheckpointError
from lorica.files import flush, sha256
from lorica.methods.attach import adapters, trained_state
from lorica.training.tensor_file import PartedTensors, TensorFile, layout_of, write_tensor_file

MANIFEST = "manifest.json"
STATE = "state.json"
REQUIRED = ("trainable", "optimizer", "rng")


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint, read and verified.

    Attributes:
        step: optimizer steps done.
        state: what was given to `save_checkpoint`, through JSON.
        tensors: file stem (`trainable`, `optimizer`, `rng`) to its named tensors, read anew each time they are asked
            for: an optimizer's state need not fit into memory.
    """

    path: Path
    step: int
    state: dict[str, Any]
    tensors: dict[str, PartedTensors]


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps stands in `folder`."""
    return folder / f"step-{step:08d}"


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write one checkpoint, replacing one of the same step. Returns its folder.

    Args:
        tensors: file stem to named tensors of any device; `REQUIRED` are the stems that reading asks for.
        state: anything JSON holds.

    Raises:
        CheckpointError: the disk is full or refuses; what was saved before is intact and nothing half is left.
    """
    target = checkpoint_path(folder, step)
    temporary = _aside(target, "tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clean_leftovers(folder)
        temporary.mkdir()
        _write_files(temporary, tensors, state)
        _publish(temporary, target)
    except (OSError, SafetensorError) as error:
        num_bytes = sum(layout_of(named, name).num_bytes for named in tensors.values() for name in named)
        raise CheckpointError(
            f"Could not save {target}: {error}. It needs {num_bytes:,} bytes, {_free_bytes(folder)} are free there. "
            "Earlier checkpoints are intact: free some space, then resume."
        ) from error
    finally:
        if folder.is_dir():
            clean_leftovers(folder)
    return target


def read_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint folder.

    Raises:
        CheckpointError: names each file that is missing or does not have the size and hash it was saved with.
    """
    verify(path)
    # Open from now on: the checkpoint may be pruned before all of it is read.
    tensors: dict[str, PartedTensors] = {file.stem: TensorFile(file) for file in sorted(path.glob("*.safetensors"))}
    return Checkpoint(path, _step(path), json.loads((path / STATE).read_text(encoding="utf-8")), tensors)


def verify(path: Path) -> None:
    """Compare every file with the manifest; see `read_checkpoint` for what it raises."""
    files = _read_manifest(path)
    faults = []
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif file.stat().st_size != expected["bytes"]:
            faults.append(f"{name} has {file.stat().st_size:,} bytes, {expected['bytes']:,} were saved")
        elif sha256(file) != expected["sha256"]:
            faults.append(f"{name} is damaged: its SHA-256 is not the one that was saved")
    if faults:
        raise CheckpointError(f"Checkpoint {path} cannot be used: {'; '.join(faults)}. Resume from another one.")


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first. Leftovers of a killed save are not among them. Reads no file."""
    return sorted((p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)), key=_step)


def latest_valid(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where none was ever saved. The caller holds the run's lock.

    Args:
        warn: is told about each newer one that is damaged or half-written and passed over.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged. Starting anew is for the user to decide.
    """
    for name in clean_leftovers(folder):
        warn(f"Saving {name} in {folder} was interrupted; an earlier checkpoint is used.")
    paths = find_checkpoints(folder)
    for path in reversed(paths):
        try:
            return read_checkpoint(path)
        except CheckpointError as error:
            warn(str(error))
    if paths:
        raise CheckpointError(f"None of the {len(paths)} checkpoints in {folder} can be used. Start anew elsewhere.")
    return None


def prune(folder: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the one of step `best`.

    Nothing is deleted unless one of those that stay verifies.
    """
    paths = find_checkpoints(folder)
    staying = paths[-max(1, keep) :]
    staying += [path for path in paths if path not in staying and _step(path) == best]
    doomed = [path for path in paths if path not in staying]
    if doomed and any(_is_valid(path) for path in sorted(staying, key=_step, reverse=True)):
        for path in doomed:
            _remove(path)


def discard_after(folder: Path, step: int) -> None:
    """Delete the checkpoints beyond `step`: a run resumed there writes its own future."""
    for path in find_checkpoints(folder):
        if _step(path) > step:
            _remove(path)


def clean_leftovers(folder: Path) -> list[str]:
    """Undo what a killed save or deletion left: put a checkpoint back whose successor never came, delete what is half.

    Returns the names of the checkpoints that are not there because of it. The caller holds the run's lock.
    """
    for replaced in folder.glob(".step-*.old"):
        target = folder / replaced.name.removeprefix(".").removesuffix(".old")
        if target.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, target)
    for doomed in folder.glob(".step-*.del"):
        shutil.rmtree(doomed)
    half = sorted(folder.glob(".step-*.tmp"))
    for temporary in half:
        shutil.rmtree(temporary)
    names = [path.name.removeprefix(".").removesuffix(".tmp") for path in half]
    return [name for name in names if not (folder / name).exists()]


def restore_parameters(parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy saved values into the parameters and buffers of the same names, in place.

    Raises:
        CheckpointError: lists names on one side only and other shapes or dtypes; nothing is changed then.
    """
    faults = [f"{name} is missing in the checkpoint" for name in parameters if name not in tensors]
    faults += [f"{name} is not in the model" for name in tensors if name not in parameters]
    for name in parameters.keys() & tensors.keys():
        ours, saved = parameters[name], tensors[name]
        if ours.shape != saved.shape or ours.dtype != saved.dtype:
            faults.append(f"{name} is {saved.dtype} {list(saved.shape)}, the model has {ours.dtype} {list(ours.shape)}")
    if faults:
        raise CheckpointError("The checkpoint does not fit this model:\n  " + "\n  ".join(faults))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def restore_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `trained_state` gave, whatever shape buffers had grown to since or before.

    Raises:
        CheckpointError: as `restore_parameters`.
    """
    tensors = dict(tensors)
    for name, adapter in adapters(model).items():
        prefix = f"{name}."
        adapter.make_room({key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)})
    restore_parameters(trained_state(model), tensors)


def _write_files(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    for stem, named in tensors.items():
        file = folder / f"{stem}.safetensors"
        if isinstance(named, PartedTensors):
            write_tensor_file(file, named)
        else:
            save_file({name: t.detach().contiguous() for name, t in named.items()}, file)
    (folder / STATE).write_text(json.dumps(state, allow_nan=False, indent=1), encoding="utf-8")
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in sorted(folder.iterdir())}
    manifest = {"files": files, "sha256": _digest(files)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for file in sorted(folder.iterdir()):
        flush(file)
    flush(folder)


def _publish(temporary: Path, target: Path) -> None:
    replaced = _aside(target, "old")
    if target.exists():
        # A folder cannot be renamed onto a full one; `clean_leftovers` puts it back when we die between the two.
        os.rename(target, replaced)
    os.rename(temporary, target)
    flush(target.parent)


def _remove(path: Path) -> None:
    # Renamed first: a half-deleted checkpoint must never carry the name of a whole one.
    doomed = _aside(path, "del")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, dict[str, Any]] = manifest["files"]
        intact = manifest["sha256"] == _digest(files)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no checkpoint: it has no {MANIFEST}. Name a folder step-...") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"Checkpoint {path} cannot be used: {MANIFEST} is damaged ({error}).") from None
    if not intact:
        raise CheckpointError(f"Checkpoint {path} cannot be used: {MANIFEST} is damaged: its own SHA-256 is another.")
    missing = [name for name in (*(f"{stem}.safetensors" for stem in REQUIRED), STATE) if name not in files]
    if missing:
        raise CheckpointError(f"Checkpoint {path} cannot be used: it was saved without {', '.join(missing)}.")
    return files


def _is_valid(path: Path) -> bool:
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def _digest(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _free_bytes(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free:,}"


def _aside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{suffix}")


def _step(path: Path) -> int:
    match = re.fullmatch(r"step-(\d+)", path.name)
    if match is None:
        raise CheckpointError(f"{path} is no checkpoint: its folder should be called step-00000050 or the like.")
    return int(match.group(1))
