"""Folders that are either whole or not there, and small JSON files that are read with care."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 16 << 20


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Fill a temporary folder; on success flush it to disk and give it the name `target`, replacing what was there.

    On an exception the temporary folder is removed and `target` is what it was before. A kill between the two renames
    of a replacement leaves what was there before as `.<name>.old`; the next use puts it back first. A link is followed.
    """
    target = target.resolve()
    temporary, replaced = (target.with_name(f".{target.name}.{suffix}") for suffix in ("tmp", "old"))
    _put_back(replaced, target)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            flush(file)
        flush(temporary)
        if target.exists():
            os.rename(target, replaced)
        os.rename(temporary, target)
        flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(replaced, target)


def _put_back(replaced: Path, target: Path) -> None:
    if replaced.exists() and not target.exists():
        os.rename(replaced, target)
    shutil.rmtree(replaced, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until the file or folder at `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(file: Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        ValueError: it is larger than `MAX_JSON_BYTES`, no JSON, or no object; the message names the file.
        OSError: it cannot be read.
    """
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{file} has {file.stat().st_size:,} bytes; at most {MAX_JSON_BYTES:,} are read.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(content).__name__}.")
    return content


def write_json(file: Path, content: object) -> None:
    """Write `content` as indented JSON; see `write_text`."""
    write_text(file, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write `text` in UTF-8. Killed at any moment, `file` holds all of it or what it held before."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
