"""Named tensors that need not be in memory as a whole: safetensors files read and written part by part.

AdamW's moments of a full fine-tuning are twice its weights. Where they are paged (`paged.py`) a checkpoint must not
bring them all together, neither when it is saved nor when a run goes on from it. The files are read with plain reads,
not mapped: what is mapped counts as the process's memory, and raises SIGBUS when the file is cut short.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorica.errors import CheckpointError

PART = 1 << 18
"""Elements that are in memory at once while a file is written."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Layout(NamedTuple):
    """What a tensor is, without its contents."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class PartedTensors(Mapping[str, Tensor], ABC):
    """Named tensors that can be had in parts; `self[name]` is a new tensor on the CPU with all of it."""

    @abstractmethod
    def layout(self, name: str) -> Layout:
        """Shape and dtype of a tensor; its contents are not touched."""

    @abstractmethod
    def part(self, name: str, begin: int, end: int) -> Tensor:
        """Elements `begin` to `end` of the flattened tensor, 1-D, on the CPU."""

    def __contains__(self, name: object) -> bool:
        # Mapping's own would read the tensor.
        try:
            self.layout(name)  # type: ignore[arg-type]
        except KeyError:
            return False
        return True

    def __getitem__(self, name: str) -> Tensor:
        shape, _ = self.layout(name)
        return self.part(name, 0, math.prod(shape)).view(shape)


def layout_of(tensors: Mapping[str, Tensor], name: str) -> Layout:
    """Shape and dtype of a tensor of any mapping."""
    if isinstance(tensors, PartedTensors):
        return tensors.layout(name)
    return Layout(tensors[name].shape, tensors[name].dtype)


def part_of(tensors: Mapping[str, Tensor], name: str, begin: int, end: int) -> Tensor:
    """Elements `begin` to `end` of a flattened tensor of any mapping."""
    if isinstance(tensors, PartedTensors):
        return tensors.part(name, begin, end)
    return tensors[name].detach().reshape(-1)[begin:end]


class TensorFile(PartedTensors):
    """A safetensors file, open for as long as this object lives, also after the file was renamed or deleted.

    Raises:
        CheckpointError: it is no safetensors file, or shorter than it says.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        try:
            length = int.from_bytes(self._read(8, 0), "little")
            header = json.loads(self._read(min(length, os.fstat(self._descriptor).st_size), 8))
            header.pop("__metadata__", None)
            self._layouts = {n: Layout(torch.Size(e["shape"]), _DTYPES[e["dtype"]]) for n, e in header.items()}
            self._begins = {n: 8 + length + int(e["data_offsets"][0]) for n, e in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is no safetensors file: {error!r}.") from None

    def layout(self, name: str) -> Layout:
        return self._layouts[name]

    def part(self, name: str, begin: int, end: int) -> Tensor:
        dtype = self._layouts[name].dtype
        part = torch.empty(end - begin, dtype=dtype)
        if end > begin:
            read_into(self._descriptor, part, self._begins[name] + begin * dtype.itemsize, str(self._path))
        return part

    def _read(self, length: int, offset: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layouts)

    def __len__(self) -> int:
        return len(self._layouts)


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` as a safetensors file, `PART` elements at a time.

    Raises:
        OSError: the disk is full or refuses.
    """
    layouts = {name: layout_of(tensors, name) for name in tensors}
    # Wide numbers first: none then begins where its size does not divide the place.
    names = sorted(layouts, key=lambda name: (-layouts[name].dtype.itemsize, name))
    header, begin = {}, 0
    for name in names:
        shape, dtype = layouts[name]
        end = begin + layouts[name].num_bytes
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        offset = file.tell()
        for name in names:
            num_elements = math.prod(layouts[name].shape)
            for at in range(0, num_elements, PART):
                part = part_of(tensors, name, at, min(at + PART, num_elements)).cpu()
                write_from(file.fileno(), part, offset)
                offset += part.nbytes


def read_into(descriptor: int, out: Tensor, offset: int, what: str) -> None:
    """Fill `out`, contiguous and on the CPU, with the file's bytes from `offset` on.

    Raises:
        CheckpointError: the file ends before; `what` names it.
    """
    view = _bytes_of(out)
    done = 0
    while done < len(view):
        read = os.preadv(descriptor, [view[done:]], offset + done)
        if read == 0:
            raise CheckpointError(f"{what} is cut short: it ends at byte {offset + done:,}.")
        done += read


def write_from(descriptor: int, tensor: Tensor, offset: int) -> None:
    """Write the bytes of `tensor`, contiguous and on the CPU, to the file at `offset`."""
    view = _bytes_of(tensor)
    done = 0
    while done < len(view):
        done += os.pwritev(descriptor, [view[done:]], offset + done)


def _bytes_of(tensor: Tensor) -> memoryview:
    # numpy has no bfloat16, so the bytes are shown.
    return tensor.reshape(-1).view(torch.uint8).numpy().data
