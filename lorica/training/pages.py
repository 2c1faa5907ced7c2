"""Pages of optimizer state: where each one lives, and the lane on which it travels to the device and back.

A page is the state of up to a million elements of one parameter, as one run of bytes. It lives on the device, in host
memory or in a file. What lives elsewhere passes through two slots on the device: while the arithmetic works in one, a
thread brings the page before it home from the other and fetches the next. On CUDA the copies run on a stream of their
own, ordered with the arithmetic by events; what comes from the file takes one more hop, through pinned memory.
That order is tested on simulated streams which put everything off; on a GPU it has not run yet.

The file is read and written with plain calls, not mapped: what is mapped counts as the process's memory for as long as
the kernel likes. It has no name, so that it is gone when the process is, however that ends. What it gives up: the
kernel keeps what it can of the file in its cache, which it takes back when memory is short, and a file system that
lives in memory (tmpfs) saves nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.errors import ConfigError, DoesNotFitError, LoricaError
from lorica.training.tensor_file import read_into, write_from

_ALIGNMENT = 64
# torch rounds each piece of pinned memory up to a power of two, so pages share pieces of one.
_PINNED_BYTES = 64 << 20


class Field(NamedTuple):
    """One array of a page: its elements begin at byte `begin` of the page."""

    dtype: torch.dtype
    num_elements: int
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.num_elements * self.dtype.itemsize

    def of(self, buffer: Tensor) -> Tensor:
        """The array in the bytes of a page, 1-D, without a copy."""
        return buffer[self.begin : self.end].view(self.dtype)


def make_fields(arrays: dict[str, tuple[torch.dtype, int]]) -> dict[str, Field]:
    """Arrays, {name: (dtype, number of elements)}, one after the other, each where any dtype may begin."""
    fields: dict[str, Field] = {}
    begin = 0
    for name, (dtype, num_elements) in arrays.items():
        fields[name] = Field(dtype, num_elements, begin)
        begin = _aligned(fields[name].end)
    return fields


@dataclass(eq=False)
class Page:
    """The state of elements `begin` to `end` of a parameter.

    Attributes:
        memory: uint8 [num_bytes], on the device (the page is then worked on in place) or in host memory; None where
            the page lives in the file, from byte `offset` on.
    """

    parameter: nn.Parameter
    begin: int
    end: int
    fields: dict[str, Field]
    memory: Tensor | None = None
    offset: int = 0

    @property
    def num_bytes(self) -> int:
        """With what it takes to begin the next page where any dtype may begin."""
        return _aligned(max(field.end for field in self.fields.values()))


class Contents(NamedTuple):
    """What a file holds, in the words of its errors; what to do `instead`, or to make it `smaller`, if it cannot."""

    what: str
    instead: str
    smaller: str


MOMENTS_STATE = Contents(
    "AdamW's state",
    instead="leave train.optimizer_memory out",
    smaller="give more train.optimizer_memory, or set train.optimizer_bits=8",
)


class PageFile:
    """A file without a name in `folder`, with `num_bytes` set aside from the start; they are zero. None is made for 0.

    Raises:
        ConfigError: nothing can be written to the folder.
        DoesNotFitError: the disk has not that much room.
    """

    def __init__(self, folder: Path, num_bytes: int, contents: Contents = MOMENTS_STATE) -> None:
        self._folder, self._contents = folder, contents
        self._file: Any = None
        self._num_bytes = 0
        self.reserve(num_bytes)

    def reserve(self, num_bytes: int) -> None:
        """Set so many bytes aside in all; what is there stays. Raises what the constructor raises."""
        if num_bytes <= self._num_bytes:
            return
        if self._file is None:
            self._file = self._made()
        try:
            # Asked first: some file systems take all that is left before they notice that it is not enough.
            free = shutil.disk_usage(self._folder).free
            if num_bytes - self._num_bytes > free:
                raise OSError(errno.ENOSPC, f"{free:,} bytes are free")
            if sys.platform == "linux":
                os.posix_fallocate(self._file.fileno(), 0, num_bytes)
            else:
                self._file.truncate(num_bytes)
        except OSError as error:
            raise DoesNotFitError(
                f"{self._contents.what} needs {num_bytes:,} bytes of disk, and {self._folder} has not that much room: "
                f"{error}. Free some space, choose a train.output on another disk, {self._contents.smaller}."
            ) from None
        self._num_bytes = num_bytes

    def _made(self) -> Any:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Closed, and with that given back to the disk, when this object is dropped.
            return tempfile.TemporaryFile(dir=self._folder, buffering=0)
        except OSError as error:
            raise ConfigError(
                f"{self._contents.what} cannot be paged to {self._folder}: {error}. Choose a train.output that can be "
                f"written to, or {self._contents.instead}."
            ) from None

    @property
    def is_empty(self) -> bool:
        """Whether there is no file."""
        return self._file is None

    def read(self, offset: int, out: Tensor) -> None:
        """Fill `out`, contiguous and on the CPU, from byte `offset` on."""
        with self._explained():
            read_into(self._file.fileno(), out, offset, f"the page file in {self._folder}")

    def write(self, offset: int, tensor: Tensor) -> None:
        """Write the bytes of `tensor`, contiguous and on the CPU, from byte `offset` on."""
        with self._explained():
            write_from(self._file.fileno(), tensor, offset)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LoricaError(
                f"{self._contents.what} cannot be paged: the disk of {self._folder} refuses it: {error}. Resume from "
                "the last checkpoint."
            ) from error


class Lane(ABC):
    """Two slots on the device, of `slot_bytes` each, through which pages pass."""

    def __init__(self, device: torch.device, slot_bytes: int) -> None:
        self.device = device
        self.slots = [torch.empty(slot_bytes, dtype=torch.uint8, device=device) for _ in range(2)]

    @abstractmethod
    def visit(self, pages: Sequence[Page]) -> Iterator[tuple[Page, Tensor]]:
        """Each page with its bytes in a slot, uint8 [num_bytes]; what is changed there is brought home."""


class StillLane(Lane):
    """Nothing is moved: for a rehearsal, which looks at what is on the device. Two pages stand for all."""

    def visit(self, pages: Sequence[Page]) -> Iterator[tuple[Page, Tensor]]:
        for page, slot in zip(pages, self.slots, strict=False):
            yield page, slot[: page.num_bytes]


class MovingLane(Lane, ABC):
    """The order of work and copies, the same for every device."""

    def visit(self, pages: Sequence[Page]) -> Iterator[tuple[Page, Tensor]]:
        # One thread: what it is told first is done first, so a slot is never filled before it was emptied.
        with ThreadPoolExecutor(max_workers=1) as worker:
            exchanges: deque[Future[Any]] = deque()
            for slot, page in enumerate(pages[:2]):
                exchanges.append(worker.submit(self._exchange, slot, None, self._end_work(), page))
            for number, page in enumerate(pages):
                self._begin_work(exchanges.popleft().result())
                slot = number % 2
                yield page, self.slots[slot][: page.num_bytes]
                coming = pages[number + 2] if number + 2 < len(pages) else None
                exchanges.append(worker.submit(self._exchange, slot, page, self._end_work(), coming))
            for exchange in exchanges:
                self._begin_work(exchange.result())

    @abstractmethod
    def _exchange(self, slot: int, leaving: Page | None, worked: Any, coming: Page | None) -> Any:
        """In the thread: bring `leaving` home once the work in the slot is done, then fetch `coming`."""

    @abstractmethod
    def _begin_work(self, exchanged: Any) -> None:
        """Order the work to come behind an exchange, by what `_exchange` gave."""

    @abstractmethod
    def _end_work(self) -> Any:
        """What `_exchange` waits for before it touches the slot."""


class HostLane(MovingLane):
    """The device is the CPU, so all that travels comes from the file and straight into the slot."""

    def __init__(self, device: torch.device, slot_bytes: int, file: PageFile) -> None:
        super().__init__(device, slot_bytes)
        self._file = file

    def _exchange(self, slot: int, leaving: Page | None, worked: Any, coming: Page | None) -> Any:
        if leaving is not None:
            self._file.write(leaving.offset, self.slots[slot][: leaving.num_bytes])
        if coming is not None:
            self._file.read(coming.offset, self.slots[slot][: coming.num_bytes])

    def _begin_work(self, exchanged: Any) -> None:
        pass

    def _end_work(self) -> Any:
        pass


class CudaLane(MovingLane):
    """Copies on a stream of their own. The thread waits only for what it must hand to the file itself."""

    def __init__(self, device: torch.device, slot_bytes: int, file: PageFile) -> None:
        super().__init__(device, slot_bytes)
        self._file = file
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned = pinned_memory([slot_bytes] * (0 if file.is_empty else 2))

    def _exchange(self, slot: int, leaving: Page | None, worked: Any, coming: Page | None) -> Any:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(worked)
            if leaving is not None:
                home = self._on_host(slot, leaving)
                copy_later(home, self.slots[slot][: leaving.num_bytes])
                if leaving.memory is None:
                    self._stream.synchronize()
                    self._file.write(leaving.offset, home)
            if coming is not None:
                home = self._on_host(slot, coming)
                if coming.memory is None:
                    # Nothing reads the pinned buffer any more: its last page left it in the lines above.
                    self._file.read(coming.offset, home)
                copy_later(self.slots[slot][: coming.num_bytes], home)
            return self._stream.record_event()

    def _on_host(self, slot: int, page: Page) -> Tensor:
        return self._pinned[slot][: page.num_bytes] if page.memory is None else page.memory

    def _begin_work(self, exchanged: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(exchanged)

    def _end_work(self) -> Any:
        return torch.cuda.current_stream(self.device).record_event()


def pinned_memory(sizes: Sequence[int]) -> list[Tensor]:
    """A zero uint8 tensor of each of `sizes` bytes, in host memory from which CUDA copies without waiting."""
    pieces: list[Tensor] = []
    free = torch.empty(0, dtype=torch.uint8)
    left = sum(sizes)
    for size in sizes:
        if size > len(free):
            free = torch.zeros(max(size, min(left, _PINNED_BYTES)), dtype=torch.uint8, pin_memory=True)
        pieces.append(free[:size])
        free, left = free[size:], left - size
    return pieces


def copy_later(out: Tensor, source: Tensor) -> None:
    """Copy on the current stream; nobody waits for it if the tensor on the host is pinned."""
    out.copy_(source, non_blocking=True)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
