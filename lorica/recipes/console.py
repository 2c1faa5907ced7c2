"""How the verbs print: data on stdout, everything else on stderr, no colour or bars off a terminal.

rich decides by the stream whether to colour, and NO_COLOR forbids it. It is given the streams anew at each call, so
that a redirected `sys.stdout` is honoured: under `--json` the command line points it at stderr, and stdout carries the
one document. What it gives up: rich's markup and highlighting, which would read `[q_proj]` in a text as a style.
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

# Off a terminal a table is as wide as its content: no line of a log is folded to a width that nobody chose.
_PLAIN_WIDTH = 400


def stdout() -> Console:
    """The console for data."""
    return _console(stderr=False)


def stderr() -> Console:
    """The console for logs, progress and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PLAIN_WIDTH
    return Console(
        file=stream,
        width=width,
        # rich would still print bold and dim under NO_COLOR.
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=width is not None,
    )


def log(text: str) -> None:
    """One plain line on stderr."""
    print(text, file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, numeric: Sequence[str] = ()) -> None:
    """Print a table on stdout; columns named in `numeric` are right-aligned, None is a dash, all names "" no header."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_header=any(columns),
    )
    for column in columns:
        right = column in numeric
        grid.add_column(column, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        grid.add_row(*(Text("-" if cell is None else printable(str(cell))) for cell in row))
    stdout().print(grid, soft_wrap=False)


def printable(text: str) -> str:
    """The text with control characters replaced, but newlines and tabs: a row of data must not steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", text)


def print_json(value: object, *, indent: int | None = 2) -> None:
    """Print one JSON document on stdout, on one line where `indent` is None; `value` is what `jsonable` takes.

    Where stdout's encoding is not UTF-8, other characters than ASCII are escaped: the bytes are UTF-8 everywhere.
    """
    ascii_only = codecs.lookup(sys.stdout.encoding or "ascii").name != "utf-8"
    print(json.dumps(jsonable(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False), flush=True)


def jsonable(value: object) -> Any:
    """Dataclasses, mappings, sequences, paths and scalars as JSON has them; NaN and infinities become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a result holds a {type(value).__name__}, which JSON cannot")


def human_bytes(num_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1023.5 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" or abs(size) >= 100 else f"{size:.1f} {unit}"


def human_seconds(seconds: float) -> str:
    """0.0123 -> "12 ms", 75 -> "1 min 15 s", 7260 -> "2 h 01 min"."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def human_joules(joules: float) -> str:
    """12345 -> "12.3 kJ"; 3.6 MJ are a kilowatt-hour."""
    for factor, unit in ((1e9, "GJ"), (1e6, "MJ"), (1e3, "kJ")):
        if joules >= 0.9995 * factor:
            return f"{joules / factor:.3g} {unit}"
    return f"{joules:.3g} J"


def human_count(count: float) -> str:
    """1234567 -> "1.23 M"; below ten thousand the number itself."""
    if abs(count) < 10_000:
        return f"{count:,.0f}"
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= factor:
            size = count / factor
            return f"{size:.2f} {unit}" if abs(size) < 9.995 else f"{size:.1f} {unit}"
    raise AssertionError(count)


def parse_bytes(text: str) -> int:
    """Bytes of "8GiB", "8 GB", "512M" or "1000000"; all prefixes are powers of 1024. ConfigError for anything else."""
    from lorica.config import num_bytes

    try:
        return num_bytes(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None
