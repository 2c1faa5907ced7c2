"""The arms of a sweep: every combination of the values given, each a whole configuration with a folder of its own.

    train.lr=1e-4,3e-4 method.targets=all-linear,[q_proj,v_proj] train.epochs=2

A comma separates values, unless it stands in brackets or quotes. Each value is what `lorica train` takes after the `=`.
A key with one value is the same for all arms. All arms are checked before any runs, and all faults come at once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorica.config import Resolved, load_config
from lorica.errors import ConfigError
from lorica.strict_yaml import dump_value, parse

MAX_ARMS = 1000
_MAX_GRID = 1_000_000
_MAX_NAME = 200
_BRACKETS = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Arm:
    """One configuration of a sweep.

    Attributes:
        values: of the keys that differ between arms, by dotted key.
        run: the whole configuration; its `train.output` is the arm's folder.
    """

    name: str
    values: dict[str, Any]
    run: Resolved

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        return Path(self.run.config.train.output)


def make_arms(
    path: str | Path, axes: Sequence[str], *, output: Path | None = None, samples: int | None = None, seed: int = 0
) -> list[Arm]:
    """The arms of `axes` over the run.yaml at `path`, in the grid's order.

    Args:
        axes: `section.key=value,value`.
        output: holds the arms' folders; None: run.yaml's `train.output` with `-sweep` behind it.
        samples: take this many of the grid at random; of the same grid and seed, more samples include the fewer.

    Raises:
        ConfigError: lists every fault of axes and configurations.
    """
    alternatives = _parse(axes)
    swept = [key for key, texts in alternatives.items() if len(texts) > 1]
    if not swept:
        raise ConfigError("There is nothing to sweep: give a key several values, as in train.lr=1e-4,3e-4,1e-3.")
    if "train.output" in swept:
        raise ConfigError("train.output: every arm has a folder of its own; --output says where they stand.")
    arms: dict[str, Arm] = {}
    faults: list[str] = []
    for texts in _choose(list(alternatives.values()), samples, seed):
        assignments = [f"{key}={text}" for key, text in zip(alternatives, texts, strict=True)]
        try:
            arm = _make_arm(path, assignments, swept, output)
        except ConfigError as error:
            faults += str(error).splitlines()
            continue
        if arm.name in arms:
            faults.append(f"{arm.name}: the same values are given twice")
        arms[arm.name] = arm
    if faults:
        # A fault of one value, or of run.yaml, is that of many arms.
        raise ConfigError("\n".join(dict.fromkeys(faults)))
    return list(arms.values())


def _make_arm(path: str | Path, assignments: list[str], swept: Sequence[str], output: Path | None) -> Arm:
    run = load_config(path, assignments)
    if run.config.data.eval is None:
        raise ConfigError("data.eval: a sweep compares evaluation losses, and null leaves none; give rows or a share")
    found = {row.key: row.value for row in run.describe()}
    # A key inside a mapping, as method.rank_pattern.q_proj, is no field.
    given = {key: parse(text).value for key, _, text in (assignment.partition("=") for assignment in assignments)}
    values = {key: found.get(key, given[key]) for key in swept}
    name = arm_name(values)
    folder = (output or Path(f"{run.config.train.output}-sweep")) / name
    return Arm(name, values, in_folder(run, folder))


def in_folder(run: Resolved, folder: Path) -> Resolved:
    """The run, standing in `folder`."""
    train = run.config.train.model_copy(update={"output": str(folder)})
    config = run.config.model_copy(update={"train": train})
    return replace(run, config=config, origin={**run.origin, "train.output": "sweep"})


def arm_name(values: Mapping[str, Any]) -> str:
    """`lr=0.0001,rank=8`: a folder's name that tells the values; hashes keep apart what a name cannot spell."""
    short = short_keys(list(values))
    name = ",".join(f"{_plain(short[key])}={_plain(dump_value(value))}" for key, value in values.items())
    return name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}-{_digest(name)}"


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each dotted key's last word, where that names only one of them."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}


def _plain(text: str) -> str:
    plain = re.sub(r"[^\w.+-]+", "-", text, flags=re.ASCII)
    return plain if plain == text else f"{plain.strip('-')[:40]}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def _choose(alternatives: Sequence[Sequence[str]], samples: int | None, seed: int) -> list[tuple[str, ...]]:
    """The combinations to run: all, or `samples` of them."""
    size = math.prod(len(texts) for texts in alternatives)
    wanted = size if samples is None else min(samples, size)
    if wanted > MAX_ARMS or size > _MAX_GRID:
        raise ConfigError(
            f"The grid has {size:,} arms, and {wanted:,} were to run. At most {MAX_ARMS:,} of at most {_MAX_GRID:,} "
            "can: give fewer values, or --samples."
        )
    order = list(range(size))
    if samples is not None:
        random.Random(seed).shuffle(order)
    grid = list(itertools.product(*alternatives))
    return [grid[index] for index in sorted(order[:wanted])]


def _parse(axes: Sequence[str]) -> dict[str, list[str]]:
    """The texts of each key's values."""
    found: dict[str, list[str]] = {}
    faults = []
    for axis in axes:
        key, equals, text = (part.strip() for part in axis.partition("="))
        try:
            if not equals:
                raise ValueError("is no axis; write section.key=value,value, as in train.lr=1e-4,3e-4")
            if key in found:
                raise ValueError("is given twice; write its values behind one key")
            found[key] = split_values(text)
        except ValueError as error:
            faults.append(f"command line: {key}: {error}")
    if faults:
        raise ConfigError("\n".join(faults))
    return found


def split_values(text: str) -> list[str]:
    """`1e-4, [a, b], "c,d"` -> `1e-4`, `[a, b]`, `"c,d"`. ValueError for an empty value, or what is not closed."""
    pieces, awaited, start = [], list[str](), 0
    for position, character in enumerate(text):
        if awaited and character == awaited[-1]:
            awaited.pop()
        elif awaited and awaited[-1] in "'\"":
            continue
        elif character in _BRACKETS:
            awaited.append(_BRACKETS[character])
        elif character in "'\"" and (awaited or not text[start:position].strip()):
            # Elsewhere it is an apostrophe.
            awaited.append(character)
        elif character == "," and not awaited:
            pieces.append(text[start:position].strip())
            start = position + 1
    if awaited:
        raise ValueError(f"{text!r} lacks a closing {awaited[-1]}")
    pieces.append(text[start:].strip())
    if len(pieces) > 1 and "" in pieces:
        raise ValueError(f"{text!r} has an empty value; write null where none is meant")
    return pieces
