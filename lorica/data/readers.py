"""Files to raw rows, each with its place: JSON lines, JSON, CSV, Parquet.

A reader yields `(place, row)`: the place is a line number (JSON lines, CSV) or an index, the row a dict or the
RowError that says why it cannot be read. A broken line costs that line alone. A file that cannot be read at all
raises DataError.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorica.data.rows import RowError
from lorica.data.turns import kind
from lorica.errors import DataError

Rows = Iterator[tuple[int, Mapping[str, Any] | RowError]]


def read_jsonl(path: Path) -> Rows:
    """One object a line. A byte order mark, CRLF and blank lines are fine."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if line.strip():
                yield number, _json_row(line.rstrip(b"\r\n"))


def read_json(path: Path) -> Rows:
    """A list of objects; a file of JSON lines under the name .json is read as such."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        value = json.loads(_decoded(data), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and isinstance(_json_row(data.lstrip().split(b"\n", 1)[0]), Mapping):
            yield from read_jsonl(path)
            return
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    except RowError as error:
        raise DataError(f"{path}: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None
    if isinstance(value, _Repeated):
        raise DataError(f"{path}: the key {value.key!r} stands twice in the file's object")
    if not isinstance(value, list):
        raise DataError(
            f"{path}: holds {kind(value)}; a list of objects is wanted, [{{...}}, {{...}}], "
            "or one object a line in a .jsonl file"
        )
    for index, row in enumerate(value):
        yield index, _checked(row)


def read_csv(path: Path) -> Rows:
    """A header line, then rows; .tsv is split at tabs, .csv at what splits its header: comma, semicolon or tab."""
    # The csv module refuses fields above 128 KiB, which documents exceed.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        first = file.readline()
        file.seek(0)
        delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
        # Strict: otherwise a quote that is never closed swallows the rest of the file in silence.
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}:1: a column name stands twice in {', '.join(header)}")
        while True:
            line = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield line, RowError("csv", f"not valid CSV: {error} (a quote that is not closed or not doubled?)")
                continue
            if fields is None:
                return
            if fields:
                yield line, _csv_row(header, fields)


def _csv_row(header: list[str], fields: list[str]) -> Mapping[str, Any] | RowError:
    if len(fields) != len(header):
        return RowError("csv", f"{len(fields)} fields; the header has {len(header)}")
    return dict(zip(header, fields, strict=True))


def read_parquet(path: Path) -> Rows:
    """Rows of a Parquet file, a batch at a time; needs pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{path}: reading Parquet needs pyarrow: pip install 'lorica[hub]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            index = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield index, row
                    index += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as Parquet: {error}") from None


READERS: Mapping[str, Callable[[Path], Rows]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


class _Repeated(dict[str, Any]):
    """An object in which a key stands twice."""

    key = ""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) == len(pairs):
        return value
    names = [name for name, _ in pairs]
    repeated = _Repeated(value)
    repeated.key = next(name for name in names if names.count(name) > 1)
    return repeated


def _json_row(line: bytes) -> Mapping[str, Any] | RowError:
    try:
        return _checked(json.loads(_decoded(line), object_pairs_hook=_object))
    except RowError as error:
        return error
    except json.JSONDecodeError as error:
        return RowError("json", f"not valid JSON at column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return RowError("json", f"not readable as JSON: {error}")


def _decoded(data: bytes) -> str:
    if b"\0" in data:
        raise RowError("encoding", f"holds a NUL byte at column {data.index(0) + 1}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise RowError("encoding", f"not UTF-8: byte 0x{data[error.start]:02x} at column {error.start + 1}") from None


def _checked(row: object) -> Mapping[str, Any] | RowError:
    if isinstance(row, _Repeated):
        return RowError("json", f"the key {row.key!r} stands twice")
    if not isinstance(row, dict):
        return RowError("type", f"the row is {kind(row)}; an object is wanted")
    if not row:
        return RowError("empty", "the row is an empty object")
    return row
