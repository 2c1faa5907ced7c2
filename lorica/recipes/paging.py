"""Where AdamW's moments will live under `train.optimizer_memory`, and what a step waits for them; and where the inputs
of checkpointed layers wait under `train.activation_checkpointing: offload`.

Each moment that is not on the device travels there and back in every step. What comes from a file is timed with a file
in the run's own folder, or in the nearest one above it that exists, past the kernel's cache; a kernel with memory to
spare keeps the pages, and then a step waits less. What goes over a GPU's bus is timed where there is the GPU.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorica.config import RunConfig
from lorica.errors import DoesNotFitError
from lorica.recipes import console
from lorica.recipes.doctor import available_memory_bytes
from lorica.training.offload import INPUTS
from lorica.training.paged import LARGEST_PAGE
from lorica.training.pages import MOMENTS_STATE, Contents
from lorica.training.tensor_file import read_into, write_from

if TYPE_CHECKING:
    from lorica.training.rehearsal import Rehearsal

_PAGE_BYTES = 8 * LARGEST_PAGE
_NUM_PAGES = 4


@dataclass(frozen=True)
class Waiting:
    """What waits beside the device, in bytes.

    Attributes:
        free_bytes: of the disk on which `folder` is, without what others of the run take of it.
        seconds: that copies take, at most; None where there is no GPU to time its bus.
    """

    host_bytes: int
    file_bytes: int
    folder: str
    free_bytes: int
    seconds: float | None

    @property
    def fits(self) -> bool:
        """Whether the disk has the room."""
        return self.file_bytes <= self.free_bytes


@dataclass(frozen=True)
class Offloading(Waiting):
    """The inputs of checkpointed layers until backward; `seconds` are of a micro batch, while its layers compute."""


@dataclass(frozen=True)
class Paging(Waiting):
    """AdamW's moments, those in the file to within a page; `seconds` are of a step.

    Attributes:
        device_bytes: of those on the device, with the buffers through which the others pass.
    """

    device_bytes: int


def plan_offloading(
    config: RunConfig, device: torch.device, rehearsal: Rehearsal, paging: Paging | None
) -> Offloading | None:
    """Where the layers' inputs go, and how long they travel; None if they stay on the device."""
    num_bytes, folder = rehearsal.offloaded_bytes, existing_folder(config)
    if not num_bytes:
        return None
    free = shutil.disk_usage(folder).free - (0 if paging is None else paging.file_bytes)
    pages = num_bytes / _PAGE_BYTES
    if device.type != "cuda":
        return Offloading(0, num_bytes, str(folder), free, _file_seconds(folder, INPUTS) * pages)
    seconds = _bus_seconds() * pages if torch.cuda.is_available() else None
    return Offloading(num_bytes, 0, str(folder), free, seconds)


def plan_paging(config: RunConfig, device: torch.device, rehearsal: Rehearsal) -> Paging | None:
    """Where the moments go, and how long they travel in a step; None if all of them are on the device."""
    if not rehearsal.paged_bytes:
        return None
    host, file = split_tiers(config, device, rehearsal.paged_bytes)
    folder = existing_folder(config)
    seconds: float | None = _file_seconds(folder, MOMENTS_STATE) * file / _PAGE_BYTES if file else 0.0
    if device.type == "cuda":
        over_bus = _bus_seconds() if torch.cuda.is_available() else None
        pages = rehearsal.paged_bytes / _PAGE_BYTES
        seconds = None if over_bus is None or seconds is None else seconds + over_bus * pages
    on_device = rehearsal.parts.optimizer
    return Paging(host, file, str(folder), shutil.disk_usage(folder).free, seconds, device_bytes=on_device)


def split_tiers(config: RunConfig, device: torch.device, num_bytes: int) -> tuple[int, int]:
    """Of `num_bytes` that are not on the device: (in host memory, in the file)."""
    host = min(num_bytes, host_memory(config.train.optimizer_host_memory)) if device.type == "cuda" else 0
    return host, num_bytes - host


def host_memory(given: int | None) -> int:
    """Most bytes for pages of AdamW's moments in host memory."""
    return (available_memory_bytes() or 0) // 2 if given is None else given


def existing_folder(config: RunConfig) -> Path:
    """The run's folder, or the nearest above it that exists: it is on the same disk."""
    folder = Path(config.train.output).absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def refuse_full_disk(file: Paging | Offloading) -> None:
    """DoesNotFitError if the file finds no room."""
    if not file.fits:
        contents = MOMENTS_STATE if isinstance(file, Paging) else INPUTS
        raise DoesNotFitError(
            f"{contents.what} needs {console.human_bytes(file.file_bytes)} of disk, and {file.folder} has "
            f"{console.human_bytes(max(0, file.free_bytes))}. Free some space, choose a train.output on another disk, "
            f"{contents.smaller}."
        )


def _file_seconds(folder: Path, contents: Contents) -> float:
    """To read a page and to write it, by the disk and not by the kernel's cache; the fastest of a few."""
    page = torch.zeros(_PAGE_BYTES, dtype=torch.uint8)
    best = float("inf")
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            for number in range(_NUM_PAGES):
                begin = time.perf_counter()
                write_from(file.fileno(), page, number * _PAGE_BYTES)
                os.fsync(file.fileno())
                with contextlib.suppress(AttributeError):  # macOS has no such call
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                read_into(file.fileno(), page, number * _PAGE_BYTES, "the page file")
                best = min(best, time.perf_counter() - begin)
    except OSError as error:
        raise DoesNotFitError(
            f"{contents.what} would be paged to {folder}, and a file of {_NUM_PAGES * _PAGE_BYTES >> 20} MiB cannot be "
            f"written there: {error}. Choose another train.output, or {contents.instead}."
        ) from None
    return best


def _bus_seconds() -> float:
    """To bring a page from pinned host memory to the GPU and back; the fastest of a few."""
    host = torch.zeros(_PAGE_BYTES, dtype=torch.uint8, pin_memory=True)
    slot = torch.empty(_PAGE_BYTES, dtype=torch.uint8, device="cuda")
    best = float("inf")
    for _ in range(_NUM_PAGES):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        slot.copy_(host, non_blocking=True)
        host.copy_(slot, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best
