"""`lorica plan`: what a run will need, before it starts: memory in parts, speed, time, and what would fit.

A step of the run is rehearsed on fake tensors (`training/rehearsal.py`), so a folder that holds nothing but config.json
is enough, and every alternative that is offered was rehearsed as well. Where the data is at hand it is read, and the
rehearsed batch is one of the run's own. `--measure` runs a few real steps in a process of its own and sets the
measured growth of memory beside the predicted one.

What it gives up: the speed is an estimate from a few measured rates, and evaluation by generation is not planned.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lorica.config import RunConfig
from lorica.errors import DoesNotFitError
from lorica.kernels.pool import has_pool
from lorica.recipes import console
from lorica.recipes.doctor import available_memory_bytes
from lorica.recipes.fitting import Alternative, find_alternatives, nothing_fits
from lorica.recipes.measuring import Measured, measure_run
from lorica.recipes.paging import Offloading, Paging, plan_offloading, plan_paging, refuse_full_disk
from lorica.recipes.rehearsing import (
    Setting,
    batch_lengths,
    look_around,
    num_micro_batches,
    rehearse_run,
    run_dtype,
)
from lorica.training.metrics import peak_memory_bytes
from lorica.training.rehearsal import Rehearsal
from lorica.training.speed import measure_speed


@dataclass(frozen=True)
class Part:
    """One part of the predicted memory."""

    name: str
    bytes: int
    what: str


@dataclass(frozen=True)
class PlanReport:
    """What a run will need. Sizes in bytes, times in seconds.

    Attributes:
        parts: what the peak is made of; they add up to `peak_bytes`.
        peak_bytes: growth of the process's memory, from before the base is loaded.
        process_bytes: what the process holds before that: Python, its libraries and the data.
        memory_bytes: what there is for both; None if that is unknown.
        fits: memory and, for what is paged, disk suffice.
        paging: where AdamW's moments live; None where all of them are on the device.
        offloading: where the inputs of checkpointed layers wait; None where they stay on the device.
        tokens_per_second: an estimate; None without the device that the run is for.
        steps: of the whole run; None without the data, as is `seconds`, the estimated duration.
        assumptions: what had to be assumed, a sentence each.
        alternatives: what would fit, the least harmful first; empty where the run fits as it is.
    """

    base: str
    device: str
    dtype: str
    parts: list[Part]
    peak_bytes: int
    process_bytes: int
    memory_bytes: int | None
    fits: bool
    paging: Paging | None
    offloading: Offloading | None
    trainable_parameters: int
    total_parameters: int
    micro_batch_tokens: int
    micro_batches_per_step: int
    tokens_per_second: float | None
    steps: int | None
    seconds: float | None
    assumptions: list[str]
    alternatives: list[Alternative]
    measured: Measured | None


def plan(
    config: RunConfig, *, memory_bytes: int | None = None, measure: bool = False, require_data: bool = False
) -> PlanReport:
    """Predict what the run needs, print it, and say what would fit if it does not.

    Args:
        memory_bytes: what the process may use in all; None takes what this machine has free.
        measure: run real steps as well, in a process of its own.
        require_data: the data must be there and readable (for a dry run), instead of being assumed.

    Raises:
        DoesNotFitError: nothing fits, not even the smallest alternative; or the disk has no room for what is paged.
        DataError: rows that cannot be read, or, under `require_data`, no data.
        ModelError: the base's configuration cannot be read.
        TargetError: `method.targets` matches nothing.
    """
    with _threads(config.train.threads):
        setting, assumptions = look_around(config, require_data)
        process_bytes = _process_bytes()
        rehearsal = rehearse_run(config, setting)
        paging = plan_paging(config, setting.device, rehearsal)
        offloading = plan_offloading(config, setting.device, rehearsal, paging)
        tokens_per_second = _tokens_per_second(config, setting, rehearsal, paging, offloading)
    if setting.device.type != rehearsal.device:
        assumptions.append(
            f"There is no {setting.device.type} device here: memory is counted on the CPU, and no speed is told."
        )
    if rehearsal.device == "cpu" and not has_pool():
        assumptions.append("The pool for tensors cannot be built here: the peak may be half as much again.")
    held, memory_bytes = _memory(setting.device, process_bytes, memory_bytes)
    room = None if memory_bytes is None else memory_bytes - held
    fits = room is None or rehearsal.peak_bytes <= room
    alternatives = [] if room is None or fits else find_alternatives(config, setting, room)
    report = PlanReport(
        base=config.model.base,
        device=str(setting.device),
        dtype=str(run_dtype(config, setting)).removeprefix("torch."),
        parts=_parts(rehearsal),
        peak_bytes=rehearsal.peak_bytes,
        process_bytes=held,
        memory_bytes=memory_bytes,
        fits=fits and (paging is None or paging.fits) and (offloading is None or offloading.fits),
        paging=paging,
        offloading=offloading,
        trainable_parameters=rehearsal.num_trainable,
        total_parameters=rehearsal.num_parameters,
        micro_batch_tokens=rehearsal.num_tokens,
        micro_batches_per_step=num_micro_batches(config),
        tokens_per_second=tokens_per_second,
        steps=setting.steps,
        seconds=None if setting.tokens is None or not tokens_per_second else setting.tokens / tokens_per_second,
        assumptions=assumptions,
        alternatives=alternatives,
        measured=measure_run(config, setting, rehearsal) if measure else None,
    )
    _show(report)
    for file in (paging, offloading):
        if file is not None:
            refuse_full_disk(file)
    if room is not None and not fits and not alternatives:
        raise DoesNotFitError(nothing_fits(config, setting, rehearsal, room))
    return report


def _memory(device: torch.device, process_bytes: int, memory_bytes: int | None) -> tuple[int, int | None]:
    """(what is taken already, what there is in all): of this machine, or of its GPU."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
        return 0, free if memory_bytes is None else memory_bytes
    if memory_bytes is None:
        available = available_memory_bytes()
        return process_bytes, None if available is None else available + process_bytes
    return process_bytes, memory_bytes


def _tokens_per_second(
    config: RunConfig, setting: Setting, rehearsal: Rehearsal, paging: Paging | None, offloading: Offloading | None
) -> float | None:
    if setting.device.type != rehearsal.device:
        return None
    base, lengths = setting.base.get_text_config(), batch_lengths(config, setting)
    speed = measure_speed(
        run_dtype(config, setting),
        rehearsal.device,
        tokens=rehearsal.num_tokens,
        hidden=base.hidden_size,
        heads=base.num_attention_heads,
        length=max(lengths),
    )
    waiting = (paging.seconds or 0.0) / num_micro_batches(config) if paging else 0.0
    # Copies of layers' inputs run while layers compute.
    copying = (offloading.seconds or 0.0) if offloading else 0.0
    return rehearsal.num_tokens / (max(speed.seconds(rehearsal.work), copying) + waiting)


def _parts(rehearsal: Rehearsal) -> list[Part]:
    parts = [
        Part("weights", rehearsal.parts.weights, "the base, frozen"),
        Part("adapter", rehearsal.parts.adapter, "float32, 4 bytes a trained parameter"),
        Part("gradients", rehearsal.parts.gradients, "of the adapter, as far as they exist at the peak"),
        Part("optimizer", rehearsal.parts.optimizer, "AdamW, 8 bytes a trained parameter, less if paged or of 8 bits"),
        Part("activations", rehearsal.parts.activations, "kept by the forward pass for backward"),
        Part("loss and workspace", rehearsal.parts.workspace, "logits of a chunk, gradients on their way, temporaries"),
        Part("overhead", rehearsal.overhead, "kernels and their scratch, holes between small tensors"),
    ]
    more = rehearsal.peak_bytes - sum(part.bytes for part in parts)
    if more:
        parts.append(Part("loading", more, "the checkpoint in its own dtype beside the converted one"))
    return parts


def _process_bytes() -> int:
    """What this process holds now: Python, torch, the data and the rest."""
    with contextlib.suppress(OSError), open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return peak_memory_bytes(torch.device("cpu"))


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _show(report: PlanReport) -> None:
    human = console.human_bytes
    rows: list[Sequence[object]] = [(part.name, human(part.bytes), part.what) for part in report.parts]
    rows.append(("peak", human(report.peak_bytes), "growth of the process from before the base is loaded"))
    if report.process_bytes:
        rows.append(("process", human(report.process_bytes), "Python, its libraries and the data, there before"))
    title = f"{report.base}, {report.dtype} on {report.device}"
    console.table(title, ("memory", "bytes", ""), rows, numeric=("bytes",))
    for line in _summary(report):
        console.stdout().print(line)
    if report.alternatives:
        shown = [(" ".join(a.overrides), human(a.peak_bytes), a.cost) for a in report.alternatives]
        console.table("What would fit", ("overrides", "peak", "cost"), shown, numeric=("peak",))
    for note in report.assumptions:
        console.log(note)


def _summary(report: PlanReport) -> Iterator[str]:
    trained, total = report.trainable_parameters, report.total_parameters
    yield (
        f"{console.human_count(trained)} of {console.human_count(total)} parameters are trained "
        f"({100 * trained / total:.2f} %), {report.micro_batch_tokens:,} tokens at once"
    )
    if report.tokens_per_second is not None:
        rate = report.tokens_per_second
        speed = f"about {console.human_count(rate) if rate >= 10 else f'{rate:.1g}'} tokens/s (estimate)"
        if report.steps is not None and report.seconds is not None:
            speed += f": {report.steps:,} steps in about {console.human_seconds(report.seconds)}"
        yield speed
    if report.paging is not None:
        yield from _paging_lines(report.paging)
    if report.offloading is not None:
        yield from _offloading_lines(report.offloading)
    if report.memory_bytes is not None:
        need = report.peak_bytes + report.process_bytes
        verdict = "fits" if need <= report.memory_bytes else "DOES NOT FIT"
        needed = console.human_bytes(need)
        yield f"{verdict}: {needed} needed, {console.human_bytes(report.memory_bytes)} there"
    if report.measured is not None:
        found = report.measured
        yield (
            f"measured: peak {console.human_bytes(found.peak_bytes)} (predicted / measured = {found.ratio:.2f}), "
            f"{console.human_count(found.tokens_per_second)} tokens/s"
        )


def _paging_lines(paging: Paging) -> Iterator[str]:
    human = console.human_bytes
    places = [
        (paging.device_bytes, "on the device"),
        (paging.host_bytes, "in host memory"),
        (paging.file_bytes, f"in a file in {paging.folder}"),
    ]
    there = ", ".join(f"{human(num_bytes)} {place}" for num_bytes, place in places if num_bytes)
    how_long = "" if paging.seconds is None else f", up to {console.human_seconds(paging.seconds)} a step"
    travelling = human(paging.host_bytes + paging.file_bytes)
    yield f"AdamW's moments: {there}; {travelling} go there and back each step{how_long}"
    yield from _disk_lines(paging)


def _offloading_lines(offloading: Offloading) -> Iterator[str]:
    human, in_file = console.human_bytes, offloading.file_bytes > 0
    where = f"a file in {offloading.folder}" if in_file else "host memory"
    num_bytes = human(offloading.host_bytes + offloading.file_bytes)
    yield f"Inputs of checkpointed layers: {num_bytes} wait for backward in {where}, not counted above"
    yield from _disk_lines(offloading)


def _disk_lines(file: Paging | Offloading) -> Iterator[str]:
    if file.file_bytes:
        verdict, human = "fits" if file.fits else "DOES NOT FIT", console.human_bytes
        yield f"{verdict}: {human(file.file_bytes)} of disk needed, {human(max(0, file.free_bytes))} free"
