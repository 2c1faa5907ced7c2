"""Where rows come from: a file, a folder of files, or a hub id; every bad row is named, none is mended in silence.

A source that cannot be read at all raises DataError. A row that cannot be used becomes a RowFault with its place;
whether that stops the run is the caller's policy (`refuse_faults`). A local path never touches the network.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from lorica.data import formats, readers
from lorica.data.formats import FORMATS
from lorica.data.rows import Example, Message, RowError, RowFault, list_faults, refuse
from lorica.data.turns import maybe_json
from lorica.errors import DataError

__all__ = [
    "FORMATS",
    "Example",
    "Loaded",
    "Message",
    "RowError",
    "RowFault",
    "load_examples",
    "refuse_faults",
    "stream_examples",
]

# The format is judged by this many good rows; a column belongs to it when at least half of them have it.
ROWS_TO_DETECT = 50

SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")

# How files begin that are not what their name says. The mark of UTF-32 begins with that of UTF-16.
SIGNATURES: Mapping[bytes, str] = {
    b"\xff\xfe\0\0": "UTF-32; UTF-8 is wanted: iconv -f UTF-32 -t UTF-8",
    b"\0\0\xfe\xff": "UTF-32; UTF-8 is wanted: iconv -f UTF-32 -t UTF-8",
    b"\xff\xfe": "UTF-16; UTF-8 is wanted: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; UTF-8 is wanted: iconv -f UTF-16 -t UTF-8",
    b"\x1f\x8b": "compressed; unpack it first: gunzip",
}

Place = tuple[str, Mapping[str, Any] | RowError]


@dataclass(frozen=True)
class Loaded:
    """What a source held. columns: canonical -> the file's. unused: columns that no part of an example comes from.

    num_rows counts good and bad rows, blank lines not.
    """

    examples: list[Example]
    faults: list[RowFault]
    format: str
    columns: dict[str, str]
    unused: tuple[str, ...]
    num_rows: int


def load_examples(
    source: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Loaded:
    """Read `source`: a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, or a hub id.

    format: one of FORMATS, or "auto" to recognise it by the columns. columns: lorica's column -> the file's. split:
    of a hub data set (default train), or the files of a folder that are named after it. limit: read the first rows
    only. Raises DataError for a source that is missing, empty or unreadable, or whose columns fit no format. Bad rows
    are collected.
    """
    path = Path(source)
    rows = _local(path, split) if path.exists() else _hub(str(source), split)
    places = list(islice(rows, limit))
    if not places:
        raise DataError(f"{source}: holds no rows.")
    faults = [row.at(origin) for origin, row in places if isinstance(row, RowError)]
    good = [(origin, row) for origin, row in places if not isinstance(row, RowError)]
    if not good:
        raise DataError(_none_readable(str(source), faults))
    names, turn_keys = _survey([row for _, row in good[:ROWS_TO_DETECT]], columns or {})
    name, found = formats.detect(names, turn_keys, format=format, mapping=columns or {}, source=str(source))
    present = dict.fromkeys(column for _, row in good for column, value in row.items() if value is not None)
    found |= formats.rare_columns(name, found, present)
    examples = []
    for origin, row in good:
        example = _parse(row, origin, name, found)
        if isinstance(example, RowFault):
            faults.append(example)
        else:
            examples.append(example)
    if faults:
        order = {origin: index for index, (origin, _) in enumerate(places)}
        faults.sort(key=lambda fault: order[fault.origin])
    unused = tuple(column for column in present if column not in found.values())
    return Loaded(examples, faults, name, found, unused, len(places))


def stream_examples(
    source: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> Callable[[], Iterator[Example | RowFault]]:
    """As `load_examples`, for more rows than memory holds: a function that reads them anew each time it is called.

    The source is read once here, to know its columns. Raises DataError as `load_examples` does.
    """
    path = Path(source)

    def places() -> Iterator[Place]:
        return islice(_local(path, split) if path.exists() else _hub(str(source), split), limit)

    head: list[Mapping[str, Any]] = []
    faults: list[RowFault] = []
    present: dict[str, None] = {}
    for origin, row in places():
        if isinstance(row, RowError):
            faults.append(row.at(origin))
            continue
        if len(head) < ROWS_TO_DETECT:
            head.append(row)
        present.update(dict.fromkeys(column for column, value in row.items() if value is not None))
    if not head:
        raise DataError(_none_readable(str(source), faults) if faults else f"{source}: holds no rows.")
    names, turn_keys = _survey(head, columns or {})
    name, found = formats.detect(names, turn_keys, format=format, mapping=columns or {}, source=str(source))
    found |= formats.rare_columns(name, found, present)

    def examples() -> Iterator[Example | RowFault]:
        for origin, row in places():
            yield row.at(origin) if isinstance(row, RowError) else _parse(row, origin, name, found)

    return examples


def refuse_faults(loaded: Loaded, policy: str) -> None:
    """Under the policy "error" raise DataError listing the faults, if there are any; under "drop" do nothing."""
    refuse(loaded.faults, loaded.num_rows, policy)


def _parse(row: Mapping[str, Any], origin: str, name: str, found: Mapping[str, str]) -> Example | RowFault:
    canonical = {column: row.get(actual) for column, actual in found.items()}
    try:
        return replace(formats.FORMAT[name].parse(canonical), origin=origin)
    except RowError as error:
        return error.at(origin)


def _none_readable(source: str, faults: list[RowFault]) -> str:
    """Leaving rows out would leave none, so it is said what the whole file may be instead."""
    advice = "UTF-8 is wanted; convert the file: iconv -f ENCODING -t UTF-8, where ENCODING is GB18030 or LATIN1, say."
    if any(fault.rule != "encoding" for fault in faults):
        advice = "A .jsonl file holds one object a line, a .json file one list of objects: [{...}, {...}]."
    return f"{source}: none of its {len(faults)} rows can be read:\n{list_faults(faults)}\n{advice}"


def _survey(rows: list[Mapping[str, Any]], mapping: Mapping[str, str]) -> tuple[list[str], set[str]]:
    """The columns that half of `rows` have, or that are mapped, and the keys of the first turn found in them."""
    counts = Counter(column for row in rows for column, value in row.items() if value is not None)
    names = [column for column, count in counts.items() if 2 * count >= len(rows) or column in mapping.values()]
    for row in rows:
        for column in (*mapping.values(), "messages", "conversations", "conversation", "dialogue"):
            turns = maybe_json(row.get(column))
            if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
                return names, set(turns[0])
    return names, set()


def _local(path: Path, split: str | None) -> Iterator[Place]:
    if path.is_file():
        if split is not None:
            raise DataError(f"{path}: a file has no split {split!r}; data.split is for folders and hub ids.")
        yield from _file(path, path.name)
        return
    if not path.is_dir():
        raise DataError(f"{path}: is neither a file nor a folder; a pipe cannot be read twice, so save its rows first.")
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in readers.READERS and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise DataError(f"{path}: the folder holds no {', '.join(readers.READERS)} file.")
    for file in _of_split(path, files, split):
        yield from _file(file, file.relative_to(path).as_posix())


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """The files named after `split`; without one all files, provided they are not of several splits."""
    words = {file: set(re.split(r"[-_./]", file.relative_to(folder).as_posix())) for file in files}
    if split is not None:
        chosen = [file for file in files if split in words[file]]
        if not chosen:
            raise DataError(f"{folder}: no file is named after the split {split!r}; it holds {_listed(folder, files)}.")
        return chosen
    if len(found := [name for name in SPLITS if any(name in words[file] for file in files)]) > 1:
        raise DataError(
            f"{folder}: holds files of several splits ({', '.join(found)}): {_listed(folder, files)}. "
            f"Say which to read with data.split={found[0]}."
        )
    return files


def _listed(folder: Path, files: list[Path]) -> str:
    names = [file.relative_to(folder).as_posix() for file in files]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _file(path: Path, name: str) -> Iterator[Place]:
    suffix = path.suffix.lower()
    if suffix not in readers.READERS:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; {', '.join(readers.READERS)} are read.")
    try:
        with path.open("rb") as file:
            start = file.read(4)
        for signature, advice in SIGNATURES.items():
            if start.startswith(signature):
                raise DataError(f"{path}: is {advice} {path.name}")
        for place, row in readers.READERS[suffix](path):
            yield f"{name}:{place}", row
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _hub(source: str, split: str | None) -> Iterator[Place]:
    path = Path(source)
    looks_local = path.suffix in readers.READERS or source.startswith(("/", ".", "~"))
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        near = [file.name for file in path.parent.iterdir() if file.exists()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, near, n=1)
        hint = f" Did you mean {path.parent / close[0]}?" if close else ""
        raise DataError(f"{source}: no such file or folder.{hint}")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source}: no such file or folder here. If it is a hub id, reading it needs: pip install 'lorica[hub]'"
        ) from None
    try:
        rows = datasets.load_dataset(source, split=split or "train")
    except Exception as error:  # the hub's client raises its own, the network's and the file system's errors
        raise DataError(f"{source}: no such file here, and the hub's data set cannot be read: {error}") from error
    for index, row in enumerate(rows):
        yield f"{source}:{index}", row
