"""Activation checkpointing, and where what a checkpointed layer keeps waits for backward.

A checkpointed layer (arXiv 1604.06174) keeps its input alone, [tokens, hidden], and computes the rest again when
backward comes to it. In a deep model on long rows these inputs are most of what a step keeps, and each of them is
needed once, long after it was made and in an order that is known. So they can wait elsewhere: on a GPU in pinned host
memory, on a CPU in a file as `pages.py` makes it. An input leaves while its layer computes, and comes back while the
layer above goes backward. It comes back bit for bit, so gradients are those of plain checkpointing.

torch's own hook for saved tensors does it; all else, the random state with it, is left to `torch.utils.checkpoint`.

What it gives up: an input that a model hands over by keyword, or that is not contiguous, stays where it is. One input
is on its way at a time, so a step waits where a copy takes longer than a layer. On a GPU the order of copies has been
tested on simulated streams only.
"""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lorica.errors import ConfigError
from lorica.training.pages import Contents, PageFile, copy_later

Checkpointing = Literal[False, True, "offload"]
"""`train.activation_checkpointing`."""

INPUTS = Contents(
    "What checkpointed layers keep",
    instead="set train.activation_checkpointing=true",
    smaller="take a smaller train.micro_batch_tokens, or set train.activation_checkpointing=true",
)


def checkpoint_layers(model: PreTrainedModel, how: Checkpointing, folder: Path | None = None) -> Store | None:
    """Let the layers of `model`, while it trains, compute their activations again as `how` says; not if it is False.

    Args:
        folder: where the file is made if `how` is "offload" and the model is on a CPU; None: nothing is moved, for a
            rehearsal, which looks at the device.

    Returns:
        What holds the layers' inputs; None where they stay on the device.

    Raises:
        ConfigError: transformers cannot do it for this architecture.
    """
    if not how:
        return None
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"train.activation_checkpointing: {type(model).__name__} cannot compute its layers again. Leave it "
            "out, and take a smaller train.micro_batch_tokens."
        )
    model.activation_checkpointing_enable({"use_reentrant": False})
    # transformers makes embeddings' outputs require gradients, for the other kind of checkpointing: over a frozen
    # embedding the first layer's input would stay, and get a gradient that nobody reads.
    model.disable_input_require_grads()
    if how != "offload":
        return None
    store: Store
    if folder is None:
        store = StillStore(model.device)
    else:
        store = HostStore(model.device) if model.device.type == "cuda" else FileStore(model.device, folder)
    model._set_gradient_checkpointing(True, partial(_checkpoint, store))
    return store


def _checkpoint(store: Store, function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, to be computed again in backward from inputs of which the first waits in `store`."""
    first = args[0] if args and isinstance(args[0], Tensor) and args[0].is_contiguous() else None
    where = None if first is None else _place(first)

    def pack(tensor: Tensor) -> Tensor | Kept:
        return store.put(tensor) if _place(tensor) == where else tensor

    def unpack(packed: Tensor | Kept) -> Tensor:
        return store.get(packed) if isinstance(packed, Kept) else packed

    del first
    with saved_tensors_hooks(pack, unpack):
        return checkpoint(function, *args, use_reentrant=False)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What two tensors have in common if they are the same one: the hook is given another object."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


class Kept:
    """A tensor that waits in a store, for as long as the graph that saved it has use for it.

    Attributes:
        offset: where it begins among all that wait at the same time, in bytes.
        before: what was put before it, which backward asks for next.
        home: its copy, if it waits in host memory.
    """

    def __init__(self, tensor: Tensor, offset: int, before: Kept | None) -> None:
        self.shape, self.dtype, self.offset = tensor.shape, tensor.dtype, offset
        self._before = None if before is None else weakref.ref(before)
        self.home: Tensor | None = None

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * self.dtype.itemsize

    @property
    def before(self) -> Kept | None:
        return None if self._before is None else self._before()


class _Moving(NamedTuple):
    """A tensor on the device that is being copied from or to; `version` counts what was written to it since."""

    kept: Kept
    tensor: Tensor
    work: Any
    version: int


class Store(ABC):
    """Where tensors wait, last in, first out; one copy is on its way at a time, and its tensor lives on for so long.

    Attributes:
        num_bytes: most that ever waited.
        where: in words.
    """

    where: str

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.num_bytes = 0
        self._waiting: weakref.WeakSet[Kept] = weakref.WeakSet()
        self._newest: weakref.ref[Kept] | None = None
        self._moving: _Moving | None = None

    def put(self, tensor: Tensor) -> Kept:
        """Take in a contiguous tensor."""
        self._settle()
        offset = max((kept.end for kept in self._waiting), default=0)
        kept = Kept(tensor, offset, None if self._newest is None else self._newest())
        self._waiting.add(kept)
        self._newest = weakref.ref(kept)
        self.num_bytes = max(self.num_bytes, kept.end)
        self._moving = _Moving(kept, tensor, self._send(kept, tensor), tensor._version)
        return kept

    def get(self, kept: Kept) -> Tensor:
        """The tensor again; what was put before it starts on its way back."""
        if self._moving is None or self._moving.kept is not kept:
            self._settle()
            self._start_back(kept)
        tensor = self._settle()
        assert tensor is not None
        if kept.before is not None:
            self._start_back(kept.before)
        return tensor

    def _start_back(self, kept: Kept) -> None:
        tensor = torch.empty(kept.shape, dtype=kept.dtype, device=self.device)
        work = self._bring(kept, tensor)
        self._moving = _Moving(kept, tensor, work, tensor._version)

    def _settle(self) -> Tensor | None:
        """Wait for what is on its way; its tensor on the device, whole again or no longer needed there."""
        moving, self._moving = self._moving, None
        if moving is None:
            return None
        self._wait(moving.work)
        assert moving.tensor._version == moving.version, "the input of a checkpointed layer was written to"
        return moving.tensor

    @abstractmethod
    def _send(self, kept: Kept, tensor: Tensor) -> Any:
        """Start to copy `tensor` to where `kept` waits; what `_wait` needs."""

    @abstractmethod
    def _bring(self, kept: Kept, tensor: Tensor) -> Any:
        """Start to copy it back into `tensor`; what `_wait` needs."""

    @abstractmethod
    def _wait(self, work: Any) -> None:
        """Order what the device does from now on behind a copy."""


class StillStore(Store):
    """Nothing is moved: for a rehearsal, which looks at what is on the device."""

    where = "nowhere"

    def _send(self, kept: Kept, tensor: Tensor) -> None:
        pass

    def _bring(self, kept: Kept, tensor: Tensor) -> None:
        pass

    def _wait(self, work: None) -> None:
        pass


class FileStore(Store):
    """A file without a name in `folder`, which grows as the first steps need it; a thread reads and writes it.

    `put` and `get` raise what `PageFile` raises: ConfigError, DoesNotFitError or LoricaError.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        super().__init__(device)
        self.where = f"a file in {folder}"
        self._file = PageFile(folder, 0, INPUTS)
        self._worker = ThreadPoolExecutor(max_workers=1)

    def _send(self, kept: Kept, tensor: Tensor) -> Future[None]:
        self._file.reserve(kept.end)
        return self._worker.submit(self._file.write, kept.offset, tensor)

    def _bring(self, kept: Kept, tensor: Tensor) -> Future[None]:
        return self._worker.submit(self._file.read, kept.offset, tensor)

    def _wait(self, work: Future[None]) -> None:
        work.result()


class HostStore(Store):
    """Pinned host memory, to and from which a stream of its own copies.

    What is on its way is held here until the device's own stream waits for it, so that no memory is used again under a
    copy, and memory is free in the order of the device's own work. torch keeps the pinned memory for the next step,
    and rounds each piece up to a power of two.
    """

    where = "host memory"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def _send(self, kept: Kept, tensor: Tensor) -> Any:
        kept.home = _pinned(tensor)
        return self._copy(kept.home, tensor)

    def _bring(self, kept: Kept, tensor: Tensor) -> Any:
        assert kept.home is not None
        return self._copy(tensor, kept.home)

    def _copy(self, out: Tensor, source: Tensor) -> Any:
        # Behind what makes `source`, or has used the memory of `out` before.
        self._stream.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self._stream):
            copy_later(out, source)
            return self._stream.record_event()

    def _wait(self, work: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(work)


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
