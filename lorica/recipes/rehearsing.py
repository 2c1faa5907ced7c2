"""From a configuration to rehearsals of its training step, with the run's own data where that is at hand.

What `plan` shows and what `fitting.py` tries are the same function, `rehearse_run`, under different configurations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig

from lorica.config import RunConfig
from lorica.data.sampler import Order, micro_batches
from lorica.data.tokenized import Int64
from lorica.errors import ModelError
from lorica.models.load import pick_device, pick_dtype
from lorica.models.tasks import CLASSIFICATION, Task, own_labels, set_labels
from lorica.recipes.intrinsic import ASSUMED_HEADS, find_intrinsic, with_heads
from lorica.recipes.preparing import base_config, prepare, why_padded
from lorica.recipes.tasks import run_task
from lorica.training.deep import rehearse_deep, skeleton
from lorica.training.rehearsal import Rehearsal

ASSUMED_LENGTH = 512
"""Tokens of a sample where the data is not at hand."""

ASSUMED_LABELS = ("0", "1")
"""The classes of a classifier, then."""


@dataclass(frozen=True)
class Setting:
    """What all rehearsals of one plan share.

    Attributes:
        base: the base's configuration, with a classifier's classes in it.
        task: what it is trained to do.
        padded: batches are padded, because the base cannot pack or the run does not want to.
        trained_fraction: share of the tokens that are targets.
        lengths: tokens of every sample; like the following, None where the data is not at hand.
        first_batches: sample indices of the run's first optimizer steps.
        steps: optimizer steps of the run.
        tokens: tokens that the run goes through.
        num_components: of the rows, for a method that takes its number of heads from them.
    """

    base: PretrainedConfig
    task: Task
    device: torch.device
    padded: bool
    trained_fraction: float
    lengths: Int64 | None
    first_batches: list[Int64] | None
    steps: int | None
    tokens: float | None
    num_components: int = ASSUMED_HEADS


def look_around(config: RunConfig, require_data: bool) -> tuple[Setting, list[str]]:
    """The base's configuration, and the data as far as it is at hand; what was assumed instead."""
    base = base_config(config.model)
    device = pick_device(config.model.device)
    padding = why_padded(config, base)
    assumptions = [] if padding is None else [padding]
    task = run_task(config, base).task
    if task is CLASSIFICATION:
        set_labels(base, own_labels(base) or ASSUMED_LABELS)
    # Before the rows are read, which may take long.
    check_targets(config, base, task)
    setting = Setting(base, task, device, padding is not None, 1.0, None, None, None, None)
    if not require_data and not Path(config.data.train).exists():
        return setting, [*assumptions, *_assumed(config, f"{config.data.train} is not on this machine")]
    try:
        data = prepare(config).for_method(config.method, base)
    except ModelError as error:
        if require_data:
            raise
        return setting, [*assumptions, *_assumed(config, f"the data cannot be read without a tokenizer ({error})")]
    dataset, train, intrinsic = data.train, config.train, find_intrinsic(config, data)
    if task is CLASSIFICATION:
        set_labels(base, data.labels)
    order = Order(
        dataset.lengths,
        seed=train.seed,
        batch_tokens=train.batch_tokens,
        epochs=train.epochs,
        padded=setting.padded,
        max_steps=train.max_steps,
    )
    setting = replace(
        setting,
        trained_fraction=dataset.num_trained_tokens / max(1, int(dataset.lengths.sum())),
        lengths=dataset.lengths,
        first_batches=[order.batch(step) for step in range(min(order.num_steps, 8))],
        steps=order.num_steps,
        tokens=float(dataset.lengths.sum()) * order.epoch(order.num_steps),
        num_components=ASSUMED_HEADS if intrinsic is None else intrinsic.components.num,
    )
    return setting, assumptions


def check_targets(config: RunConfig, base: PretrainedConfig, task: Task) -> None:
    """TargetError if the method finds nothing in the base to wrap; no weights are read."""
    method = with_heads(config.method, ASSUMED_HEADS)
    skeleton(base, method, task=task, quant=config.model.quant, double_quant=config.model.double_quant)


def _assumed(config: RunConfig, reason: str) -> list[str]:
    length = min(config.data.max_length, ASSUMED_LENGTH)
    unknown = config.train.restart_every is not None and config.train.max_steps is None
    restarts = " Without its steps no restart is counted, and each adds its rank." if unknown else ""
    sentences = [f"Samples of {length} tokens, all of them trained, are assumed: {reason}.{restarts}"]
    if with_heads(config.method, 1) != with_heads(config.method, 2):
        sentences.append(f"num_heads: auto is the number of components of the rows: {ASSUMED_HEADS} are assumed.")
    return sentences


def rehearse_run(config: RunConfig, setting: Setting) -> Rehearsal:
    """A step of the run as `config` says, on the data of `setting`."""
    return rehearse_deep(
        setting.base,
        with_heads(config.method, setting.num_components),
        task=setting.task,
        dtype=run_dtype(config, setting),
        device=setting.device,
        lengths=batch_lengths(config, setting),
        trained_fraction=setting.trained_fraction,
        padded=setting.padded,
        num_micro_batches=num_micro_batches(config),
        activation_checkpointing=config.train.activation_checkpointing,
        quant=config.model.quant,
        double_quant=config.model.double_quant,
        num_restarts=num_restarts(config, setting),
        optimizer_bits=config.train.optimizer_bits,
        optimizer_memory=config.train.optimizer_memory,
    )


def num_restarts(config: RunConfig, setting: Setting) -> int:
    """How often the run's adapters start anew, as far as its steps are known: its last part needs the most."""
    every, steps = config.train.restart_every, setting.steps or config.train.max_steps
    return 0 if every is None or steps is None else (steps - 1) // every


def run_dtype(config: RunConfig, setting: Setting) -> torch.dtype:
    """The dtype of the run's base."""
    return pick_dtype(config.model.dtype, setting.base, setting.device)


def micro_batch_tokens(config: RunConfig) -> int:
    """Most tokens of one forward pass."""
    return config.train.micro_batch_tokens or config.train.batch_tokens


def num_micro_batches(config: RunConfig) -> int:
    """Forward passes of one optimizer step."""
    return -(-config.train.batch_tokens // micro_batch_tokens(config))


def batch_lengths(config: RunConfig, setting: Setting) -> list[int]:
    """Tokens of the samples in the largest micro batch of the first steps, or in one as it is assumed."""
    budget, virtual = micro_batch_tokens(config), config.method.num_virtual_ids
    longest = config.data.max_length + virtual
    if setting.lengths is None or setting.first_batches is None:
        length = min(longest, ASSUMED_LENGTH + virtual)
        rest = budget % length
        return [length] * (budget // length) + ([rest] if rest > 1 else [])
    lengths = np.minimum(setting.lengths, longest)
    parts = [p for batch in setting.first_batches for p in micro_batches(batch, lengths, budget, setting.padded)]
    sizes = [len(p) * lengths[p].max() if setting.padded else lengths[p].sum() for p in parts]
    return [int(n) for n in lengths[parts[int(np.argmax(sizes))]]]
