"""AdamW whose moments live where there is room for them, and take 32 or 8 bits each.

Full fine-tuning needs 8 bytes of moments for each weight. They are touched once a step, one after the other, so what
does not fit beside the weights can live further away. Three tiers are filled in this order, each up to its budget: the
device, host memory (where the device is a GPU), and a file. `pages.py` moves them.

The arithmetic is torch's fused AdamW on a page at a time. It works element by element, and a page begins where a vector
of the processor does, so the result is torch.optim.AdamW's bit for bit, wherever the pages live.

With 8 bits (`moments.py`) a page is decoded, worked on in float32 and coded again.

Plain allocations and explicit copies, no managed memory: QLoRA's paged optimizer (arXiv 2305.14314) leaves it to the
driver what is where, and on a CPU does nothing. What this gives up: a step waits for the slowest tier in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lorica.errors import ConfigError
from lorica.training.moments import ABSMAX, MOMENTS, close, cut, is_coded, num_blocks, opened, saved_arrays
from lorica.training.pages import CudaLane, HostLane, Lane, Page, PageFile, StillLane, pinned_memory
from lorica.training.tensor_file import Layout, PartedTensors

LARGEST_PAGE = 1 << 20
"""Elements of a page: 8 MiB in 32 bits, long enough for a disk or a bus."""

SMALLEST_PAGE = 1 << 12

WORKING_BYTES = {32: 16, 8: 32}
"""On the device beside the pages that live there, for each element of a page: two slots and, with 8 bits, the moments
in float32 and what coding takes."""


@dataclass(frozen=True)
class Tiers:
    """Where the moments may live.

    Attributes:
        device: most bytes on the device, the buffers through which pages travel among them; None: no limit. Where the
            device is the CPU this is main memory.
        host: most bytes in main memory, where the device is a GPU.
        folder: where the file for all the rest is made; None: nowhere, for a rehearsal, which looks at the device.
    """

    device: int | None = None
    host: int = 0
    folder: Path | None = None


class PagedAdamW(torch.optim.AdamW):
    """AdamW over pages. `state` has the steps alone; `tensors`, `load` and `forget` reach the moments.

    The parameters are all on one device, a CPU or a GPU; `groups` are torch's parameter groups.

    Raises:
        ConfigError: the device's budget does not even hold the buffers, or nothing can be written to the folder.
        DoesNotFitError: the disk has not enough room.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        bits: int,
        tiers: Tiers,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        parameters = [p for group in self.param_groups for p in group["params"]]
        elements = _page_elements(bits, tiers.device)
        for parameter in parameters:
            # A page is one run of the parameter's memory, and of the tensor in a checkpoint.
            parameter.data = parameter.data.contiguous()
            self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        self._pages = {p: cut(p, elements, bits) for p in parameters}
        # The small ones stay: what travels is then whole pages of large parameters.
        pages = [page for p in sorted(parameters, key=torch.numel) for page in self._pages[p]]
        room = None if tiers.device is None else tiers.device - elements * WORKING_BYTES[bits]
        self._held, others = _split(pages, room)
        hosted, filed = _split(others, tiers.host if parameters[0].is_cuda else 0)
        self._travelling = [*hosted, *filed]
        for page in self._held:
            page.memory = torch.zeros(page.num_bytes, dtype=torch.uint8, device=page.parameter.device)
        slot_bytes = max((page.num_bytes for page in self._travelling), default=0)
        device = parameters[0].device
        self._lane: Lane
        if tiers.folder is None:
            self._lane = StillLane(device, slot_bytes)
        else:
            self._file = _house(hosted, filed, tiers.folder)
            self._lane = (CudaLane if device.type == "cuda" else HostLane)(device, slot_bytes, self._file)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        assert closure is None
        group_of = {p: group for group in self.param_groups for p in group["params"] if p.grad is not None}
        for group in self.param_groups:
            own = [page for page in self._held if group_of.get(page.parameter) is group]
            self._update(group, [(page, _memory(page)) for page in own if not is_coded(page)])
            for page in filter(is_coded, own):
                self._update(group, [(page, _memory(page))])
        for page, buffer in self._lane.visit([page for page in self._travelling if page.parameter in group_of]):
            self._update(group_of[page.parameter], [(page, buffer)])
        if group_of:
            torch._foreach_add_([self.state[p]["step"] for p in group_of], 1)

    @property
    def num_paged_bytes(self) -> int:
        """Of the moments that do not live on the device."""
        return sum(page.num_bytes for page in self._travelling)

    def tensors(self, parameters: Mapping[str, nn.Parameter]) -> PartedTensors:
        """The state of `parameters`: `<name>.step`, `<name>.exp_avg` and so on, read from the pages when asked for."""
        return _State(self, parameters)

    def load(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave, here or of an AdamW of other bits. What is missing stays as it is."""
        for name, parameter in parameters.items():
            if f"{name}.step" not in tensors:
                continue
            self.state[parameter]["step"].copy_(tensors[f"{name}.step"])
            for page in self._pages[parameter]:
                for moment in MOMENTS:
                    for key, values in saved_arrays(page, moment, tensors, name).items():
                        self._write(page, key, values)

    def forget(self, parameters: Iterable[nn.Parameter]) -> None:
        """Set the state of `parameters` to what it was before the first step."""
        for parameter in parameters:
            self.state[parameter]["step"].zero_()
            for page in self._pages[parameter]:
                for key, (dtype, num_elements, _) in page.fields.items():
                    self._write(page, key, torch.zeros(num_elements, dtype=dtype))

    def held_tensors(self) -> list[Tensor]:
        """All that is on the device between steps."""
        steps = [self.state[p]["step"] for p in self._pages]
        return [*steps, *(_memory(page) for page in self._held), *self._lane.slots]

    def read(self, page: Page, key: str, begin: int, end: int) -> Tensor:
        """Elements of one array of a page, on the CPU."""
        field = page.fields[key]
        if page.memory is not None:
            self._settle()
            return field.of(page.memory)[begin:end].cpu()
        values = torch.empty(end - begin, dtype=field.dtype)
        self._file.read(page.offset + field.begin + begin * field.dtype.itemsize, values)
        return values

    def _write(self, page: Page, key: str, values: Tensor) -> None:
        field = page.fields[key]
        if page.memory is not None:
            self._settle()
            field.of(page.memory).copy_(values)
        else:
            self._file.write(page.offset + field.begin, values.to(field.dtype).contiguous())

    def _settle(self) -> None:
        """Wait for copies on their way to host memory: the last of a step are ordered before what comes after it."""
        if self._lane.device.type == "cuda":
            torch.cuda.current_stream(self._lane.device).synchronize()

    def _update(self, group: dict[str, Any], batch: Sequence[tuple[Page, Tensor]]) -> None:
        """A step of the pages of one group, each with its bytes; all are plain, or there is one."""
        moments = [[opened(page, buffer, moment) for moment in MOMENTS] for page, buffer in batch]
        beta1, beta2 = group["betas"]
        adamw(
            [page.parameter.detach().view(-1)[page.begin : page.end] for page, _ in batch],
            [_gradient(page) for page, _ in batch],
            [pair[0] for pair in moments],
            [pair[1] for pair in moments],
            [],
            # It counts them up, each of them once.
            [self.state[page.parameter]["step"].clone() for page, _ in batch],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for (page, buffer), pair in zip(batch, moments, strict=True):
            for moment, values in zip(MOMENTS, pair, strict=True):
                close(page, buffer, moment, values)


class _State(PartedTensors):
    """The optimizer's state under the names of a checkpoint."""

    def __init__(self, optimizer: PagedAdamW, parameters: Mapping[str, nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._keys = {
            f"{name}.{key}": (parameter, key)
            for name, parameter in parameters.items()
            for key in ("step", *optimizer._pages[parameter][0].fields)
        }

    def layout(self, name: str) -> Layout:
        parameter, key = self._keys[name]
        if key == "step":
            return Layout(torch.Size(), torch.float32)
        if key.endswith(ABSMAX):
            return Layout(torch.Size([num_blocks(parameter.numel())]), torch.float32)
        return Layout(parameter.shape, self._optimizer._pages[parameter][0].fields[key].dtype)

    def part(self, name: str, begin: int, end: int) -> Tensor:
        parameter, key = self._keys[name]
        if key == "step":
            step: Tensor = self._optimizer.state[parameter]["step"]
            return step.reshape(1).cpu()
        out = torch.empty(end - begin, dtype=self.layout(name).dtype)
        at = 0
        for page in self._optimizer._pages[parameter]:
            length = page.fields[key].num_elements
            first, last = max(begin, at), min(end, at + length)
            if first < last:
                out[first - begin : last - begin] = self._optimizer.read(page, key, first - at, last - at)
            at += length
        return out

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def share_on_device(num_bytes: int, bits: int, budget: int | None) -> tuple[int, int]:
    """Of so many bytes of moments: (on the device, with the buffers for the others; elsewhere), to within a page."""
    if budget is None or num_bytes <= budget:
        return num_bytes, 0
    elements = _page_elements(bits, budget)
    held = budget - elements * WORKING_BYTES[bits]
    return held + 2 * 2 * elements * bits // 8, num_bytes - held


def _page_elements(bits: int, budget: int | None) -> int:
    """Elements of a page: the buffers take at most a quarter of a budget that is not very small."""
    elements = LARGEST_PAGE
    if budget is not None:
        while elements > SMALLEST_PAGE and elements * WORKING_BYTES[bits] > budget // 4:
            elements //= 2
        if elements * WORKING_BYTES[bits] > budget:
            raise ConfigError(
                f"train.optimizer_memory leaves {budget:,} bytes for AdamW's state, and the buffers through which it "
                f"is paged take {elements * WORKING_BYTES[bits]:,}. Give at least that much, or null for no limit."
            )
    return elements


def _split(pages: Sequence[Page], room: int | None) -> tuple[list[Page], list[Page]]:
    """The pages for which there is room, in this order, and the others."""
    fitting: list[Page] = []
    others: list[Page] = []
    for page in pages:
        if room is None or page.num_bytes <= room:
            fitting.append(page)
            room = None if room is None else room - page.num_bytes
        else:
            others.append(page)
    return fitting, others


def _house(hosted: Sequence[Page], filed: Sequence[Page], folder: Path) -> PageFile:
    """Give the pages that do not live on the device their places."""
    end = 0
    for page in filed:
        page.offset, end = end, end + page.num_bytes
    file = PageFile(folder, end)
    for page, memory in zip(hosted, pinned_memory([page.num_bytes for page in hosted]), strict=True):
        page.memory = memory
    return file


def _memory(page: Page) -> Tensor:
    assert page.memory is not None
    return page.memory


def _gradient(page: Page) -> Tensor:
    gradient = page.parameter.grad
    assert gradient is not None
    return gradient.reshape(-1)[page.begin : page.end]
