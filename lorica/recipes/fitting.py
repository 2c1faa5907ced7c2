"""What would fit: the changes to a run that bring its predicted peak under a limit, the least harmful first.

Every offer was rehearsed. A kind of change that harms more is tried only where nothing milder fits.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorica.config import RunConfig
from lorica.methods.full import FullFineTuning
from lorica.quant.loading import is_quantized
from lorica.recipes import console
from lorica.recipes.paging import existing_folder, split_tiers
from lorica.recipes.rehearsing import Setting, micro_batch_tokens, rehearse_run, run_dtype
from lorica.training.rehearsal import Rehearsal

_SHORTEST_LENGTH = 128
_SMALLEST_RANK = 4
# What moving things elsewhere is worth its trouble for, and enough for pages of 1M elements.
_PAGED_BYTES = 64 << 20

# What each change costs is what orders them; the text stands beside the override.
_SAME_RESULT = "same result, about the same speed"
_SLOWER = "same result, about a third slower"
_OFFLOADED = "same result, slower where the disk, or the bus of a GPU, is slower than the layers compute"
_PAGED = "same result, slower by the time to move AdamW's moments"
_COARSER = "coarser arithmetic"
_COARSER_BASE = "the frozen weights in 4 bits"
_FEWER_ROWS = "longer samples are dropped or cut"
_WEAKER = "a smaller adapter"


@dataclass(frozen=True)
class Alternative:
    """Changes with which the run would fit, as overrides to paste, and the predicted peak with them."""

    overrides: list[str]
    peak_bytes: int
    cost: str


def find_alternatives(config: RunConfig, setting: Setting, room: int) -> list[Alternative]:
    """What fits into `room` bytes, the least harmful first; nothing if the smallest variant of the run does not."""
    if rehearse_run(_changed(config, _smallest(config, setting)), setting).peak_bytes > room:
        return []
    found = _largest_micro_batch(config, {}, setting, room, _SAME_RESULT)
    changes: dict[str, Any] = {}
    if not config.train.activation_checkpointing:
        changes["train.activation_checkpointing"] = True
        found += _largest_micro_batch(config, changes, setting, room, _SLOWER)
    for key, value, cost in _harmful(config, setting):
        if found:
            break
        changes[key] = value
        found = _largest_micro_batch(config, changes, setting, room, cost)
    return found


def nothing_fits(config: RunConfig, setting: Setting, rehearsal: Rehearsal, room: int) -> str:
    """The message for a run of which not even the smallest variant fits into `room` bytes."""
    smallest = _smallest(config, setting)
    least = rehearse_run(_changed(config, smallest), setting)
    return (
        f"The run needs {console.human_bytes(rehearsal.peak_bytes)} and {console.human_bytes(max(0, room))} are free "
        "for it. "
        f"The least that was found is {console.human_bytes(least.peak_bytes)}, of which "
        f"{console.human_bytes(least.parts.weights)} are the base's weights, with {' '.join(_overrides(smallest))}. "
        "Take a smaller base or more memory."
    )


def _smallest(config: RunConfig, setting: Setting) -> dict[str, Any]:
    changes: dict[str, Any] = {"train.activation_checkpointing": True}
    changes |= {key: value for key, value, _ in _harmful(config, setting)}
    return _micro_batches(config, changes)[-1]


def _largest_micro_batch(
    config: RunConfig, changes: Mapping[str, Any], setting: Setting, room: int, cost: str
) -> list[Alternative]:
    """The changes with the largest micro batch with which they fit, if there is one."""
    variants = _micro_batches(config, changes)
    if not variants or rehearse_run(_changed(config, variants[-1]), setting).peak_bytes > room:
        return []
    for variant in variants:
        peak = rehearse_run(_changed(config, variant), setting).peak_bytes
        if peak <= room:
            return [Alternative(_overrides(variant), peak, cost)]
    return []


def _micro_batches(config: RunConfig, changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The changes alone, then with smaller and smaller micro batches: powers of two that hold the longest sample."""
    changed = _changed(config, changes)
    tokens = 1 << (micro_batch_tokens(changed) - 1).bit_length() - 1
    variants = [dict(changes)] if changes else []
    while tokens >= changed.data.max_length:
        variants.append({**changes, "train.micro_batch_tokens": tokens})
        tokens //= 2
    return variants


def _harmful(config: RunConfig, setting: Setting) -> Iterator[tuple[str, Any, str]]:
    """Changes that cost much time or alter the result, the mildest first, each on top of those before it."""
    if config.train.activation_checkpointing != "offload" and _can_offload(config, setting):
        yield "train.activation_checkpointing", "offload", _OFFLOADED
    if config.train.optimizer_memory is None and _can_page(config, setting):
        yield "train.optimizer_memory", _PAGED_BYTES, _PAGED
    if run_dtype(config, setting) == torch.float32:
        yield "model.dtype", "bfloat16", _COARSER
    if config.model.quant is None and not is_quantized(setting.base) and not isinstance(config.method, FullFineTuning):
        yield "model.quant", "nf4", _COARSER_BASE
    length = config.data.max_length // 2
    while length >= _SHORTEST_LENGTH:
        yield "data.max_length", length, _FEWER_ROWS
        length //= 2
    rank = getattr(config.method, "rank", 0) // 2
    while rank >= _SMALLEST_RANK:
        yield "method.rank", rank, _WEAKER
        rank //= 2


def _can_offload(config: RunConfig, setting: Setting) -> bool:
    """Whether what checkpointed layers keep is worth moving, and the disk has the room."""
    num_bytes = rehearse_run(_changed(config, {"train.activation_checkpointing": "offload"}), setting).offloaded_bytes
    free = shutil.disk_usage(existing_folder(config)).free
    return num_bytes > _PAGED_BYTES and (setting.device.type == "cuda" or num_bytes <= free)


def _can_page(config: RunConfig, setting: Setting) -> bool:
    """Whether paging is worth it, and the disk has the room."""
    num_bytes = rehearse_run(config, setting).parts.optimizer
    _, filed = split_tiers(config, setting.device, num_bytes)
    return num_bytes > 2 * _PAGED_BYTES and filed <= shutil.disk_usage(existing_folder(config)).free


def _overrides(changes: Mapping[str, Any]) -> list[str]:
    return [f"{key}={str(value).lower()}" for key, value in changes.items()]


def _changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    for key, value in changes.items():
        section, _, field = key.partition(".")
        before = getattr(config, section)
        plain = section == "method"
        changed = replace(before, **{field: value}) if plain else before.model_copy(update={field: value})
        config = config.model_copy(update={section: changed})
    return config
