"""`lorica init`: a commented run.yaml that fits the rows at hand.

The rows are read, their format is recognised, and their length is measured with the base's own tokenizer where that
needs no network; the values follow from that and each says why. It gives up searching for the best learning rate: the
file is where a first run starts, and `lorica config show` lists every other key.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorica.config import DataConfig, ModelConfig, RunConfig, TrainConfig, load_config, sections
from lorica.errors import ConfigError
from lorica.recipes import console
from lorica.strict_yaml import dump_value

if TYPE_CHECKING:
    from lorica.data.rows import Example

ROW_FILES = (".jsonl", ".json", ".csv", ".parquet")
# Enough to know the format and the longest rows without reading a large file whole.
ROWS_LOOKED_AT = 2000
PLACEHOLDER = "rows.jsonl"

_DEFAULT_MAX_LENGTH = 1024
_DEFAULT_BATCH_TOKENS = 4096
# Small data sets get smaller steps, so that an epoch has about this many.
_STEPS_AN_EPOCH = 20
_SMALLEST_BATCH_TOKENS = 256
_EVALUATION_ROWS = 20
_UNLIMITED = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of the rows, of which at most `ROWS_LOOKED_AT` are read.

    `lengths` are their tokens, empty if they were not measured; `context` is the most the base takes, if it says so.
    `task` is what `model.task` has to be.
    """

    format: str
    num_rows: int
    num_faults: int
    lengths: tuple[int, ...]
    context: int | None
    task: str = "auto"

    @property
    def num_too_long(self) -> int:
        """Rows that the base has no positions for."""
        return sum(self.context is not None and length > self.context for length in self.lengths)


@dataclass(frozen=True, slots=True)
class Initialised:
    """`path` of the file, `data` it points at, what was found there (None without rows), and the next `commands`."""

    path: Path
    data: str
    rows: Rows | None
    commands: list[str]


def init(folder: Path, *, data: str | None = None, base: str = "embedded") -> Initialised:
    """Write `folder`/run.yaml.

    Without `data` the only row file in `folder` is taken; if there is none, a placeholder is written. ConfigError if
    run.yaml exists or several files could be meant; DataError if the rows cannot be read.
    """
    path = folder / "run.yaml"
    if path.exists():
        raise ConfigError(f"{path} exists and is not overwritten; remove it, or name another folder: lorica init DIR")
    found = data or _only_row_file(folder)
    rows = _look(found, base) if found else None
    text = render(found or PLACEHOLDER, base, folder / "runs" / "first", rows)
    folder.mkdir(parents=True, exist_ok=True)
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
    load_config(path)
    commands = [f"lorica {verb} {shlex.quote(str(path))}" for verb in ("data check", "plan", "train")]
    _tell(path, found, rows, commands)
    return Initialised(path, found or PLACEHOLDER, rows, commands)


def _only_row_file(folder: Path) -> str | None:
    files = sorted(file for file in folder.glob("*") if file.suffix in ROW_FILES and file.is_file())
    if len(files) > 1:
        names = ", ".join(str(file) for file in files[:10])
        raise ConfigError(f"{len(files)} files could hold the rows: {names}; say which with --data FILE")
    return str(files[0]) if files else None


def _look(data: str, base: str) -> Rows:
    from lorica.data.sources import load_examples

    loaded = load_examples(data, limit=ROWS_LOOKED_AT)
    task = "classification" if loaded.format == "classification" else "auto"
    lengths: tuple[int, ...] = ()
    context = None
    if base == "embedded" or Path(base).is_dir():
        task, lengths, context = _measure(loaded.examples, base, task)
    return Rows(loaded.format, loaded.num_rows, len(loaded.faults), lengths, context, task)


def _measure(examples: Sequence[Example], base: str, wanted: str) -> tuple[str, tuple[int, ...], int | None]:
    """The task by its name, tokens of the rows as it renders them, and the most that the base takes."""
    from lorica.data.rows import RowError
    from lorica.models.load import context_length, load_tokenizer
    from lorica.models.load import load_config as load_model_config
    from lorica.recipes.tasks import run_task

    run = RunConfig(
        model=ModelConfig.model_validate({"base": base, "task": wanted}),
        data=DataConfig(train="none", max_length=_UNLIMITED),
        train=TrainConfig(batch_tokens=_UNLIMITED),
    )
    config = load_model_config(base)
    task = run_task(run, config)
    renderer = task.renderer(run, load_tokenizer(base), config, sorted({e.label for e in examples if e.label}))
    # `data check` names the rows that cannot be rendered; here they only do not count.
    lengths = [len(sample[0]) for sample in renderer.render_all(examples) if not isinstance(sample, RowError)]
    is_auto = run_task(run.model_copy(update={"model": ModelConfig(base=base)}), config) is task
    return "auto" if is_auto else task.task.name, tuple(lengths), context_length(config)


def render(data: str, base: str, output: Path, rows: Rows | None) -> str:
    """The text of run.yaml: the keys that a first run decides, each with its reason or its meaning."""
    max_length, length_reason = _DEFAULT_MAX_LENGTH, "longest sample, in tokens; longer ones are dropped"
    batch_tokens, batch_reason = _DEFAULT_BATCH_TOKENS, ""
    if rows and rows.lengths:
        # Rows that were not looked at may be longer.
        room = 1.0 if rows.num_rows < ROWS_LOOKED_AT else 1.5
        max_length = max(64, math.ceil(room * max(rows.lengths) / 64) * 64)
        length_reason = f"longest sample, in tokens; yours has {max(rows.lengths)}"
        if rows.context is not None and max_length > rows.context:
            max_length = rows.context
            length_reason += f", the base takes {rows.context}"
        fitting = max(max_length, _SMALLEST_BATCH_TOKENS, sum(rows.lengths) // _STEPS_AN_EPOCH)
        if fitting < _DEFAULT_BATCH_TOKENS:
            batch_tokens, batch_reason = fitting, "tokens per optimizer step; few, because the rows are few"
    batch_tokens = max(batch_tokens, max_length)
    fraction, evaluation_reason = _evaluation(rows)
    few = rows is not None and rows.num_rows < ROWS_LOOKED_AT
    chosen: dict[str, list[tuple[str, object, str]]] = {
        "model": [("base", base, ""), ("task", rows.task if rows else "auto", "")],
        "method": [("name", "lora", ""), ("rank", 16, ""), ("alpha", 32, ""), ("targets", "all-linear", "")],
        "data": [
            ("train", data, "" if rows else "put your rows here"),
            ("eval", fraction, evaluation_reason),
            ("format", rows.format if rows else "auto", ""),
            *([] if rows and rows.format == "classification" else [("loss_on", "response", "")]),
            ("max_length", max_length, length_reason),
        ],
        "train": [
            ("output", str(output), ""),
            ("epochs", 3 if few else 1, "few rows are seen more than once" if few else ""),
            ("lr", 3e-3 if base == "embedded" else 1e-4, "the embedded base is tiny" if base == "embedded" else ""),
            ("batch_tokens", batch_tokens, batch_reason),
            ("eval_every", 50, ""),
            ("save_every", 50, ""),
        ],
    }
    lines = [
        "# Written by `lorica init`. Paths are relative to the directory in which you run lorica.",
        "# Every other key, its default and its meaning: lorica config show run.yaml",
    ]
    for name, entries in chosen.items():
        lines += ["", f"{name}:"]
        for key, value, comment in entries:
            meaning = comment or sections()[name].model_fields[key].description
            lines.append(f"  {f'{key}: {dump_value(value)}':<28}  # {meaning}")
    return "\n".join(lines) + "\n"


def _evaluation(rows: Rows | None) -> tuple[float | None, str]:
    """The fraction to hold out, and why: about 20 rows where 5 % would be fewer, never more than a fifth."""
    if rows is None or rows.num_rows * 0.05 >= _EVALUATION_ROWS:
        return 0.05, "fraction of the rows held out for evaluation, or a path"
    if rows.num_rows < 5:
        return None, "too few rows to hold any out"
    fraction = round(min(0.2, _EVALUATION_ROWS / rows.num_rows), 2)
    return fraction, f"fraction held out for evaluation, or a path: about {round(fraction * rows.num_rows)} rows"


def _tell(path: Path, data: str | None, rows: Rows | None, commands: Sequence[str]) -> None:
    out = console.stdout()
    out.print(f"Wrote {path}.")
    if rows is None:
        out.print(f"No rows were found: put them into {data or PLACEHOLDER}, or change data.train in the file.")
    else:
        more = " or more" if rows.num_rows == ROWS_LOOKED_AT else ""
        length = f", the longest of {max(rows.lengths)} tokens" if rows.lengths else ""
        out.print(f"{data}: {rows.num_rows:,} rows{more} of the format {rows.format}{length}.")
        if rows.num_too_long:
            out.print(f"{rows.num_too_long:,} of them are left out: the base takes {rows.context:,} tokens.")
        if rows.num_faults:
            out.print(f"{rows.num_faults} rows have faults; `lorica data check` names them.")
    out.print("Next:\n" + "\n".join(f"  {command}" for command in commands))
