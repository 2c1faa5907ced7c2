"""YAML for configurations: what is written is what is meant, and every key knows its line.

PyYAML's `safe_load` reads `1e-4` as text, `no` as false, `010` as 8 and lets the last of two equal keys win. So only
its parser is used here: its events become dicts, lists and scalars by the rules below, and no constructor exists that a
tag could reach.

    null            null, Null, NULL, ~ and nothing
    true, false     also True, TRUE, False, FALSE; but yes, no, on, off are text
    whole numbers   10, -3; 010 is decimal 10
    numbers         1e-4, 1.5, .5, .inf, .nan
    text            everything else (hexadecimal, octal, dates too), and all that stands in quotes

What it gives up: anchors, aliases, tags, several documents, keys that are no text. Each is a fault that names its line.
Size and depth are bounded. All faults of a file are collected, except that a syntax error ends the reading.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
# A parser event is a scalar or a bracket. 20,000 take half a second and hold thousands of times what a run needs.
MAX_EVENTS = 20_000
MAX_DIGITS = 40

KeyPath = tuple[str | int, ...]

_INTEGER = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_CONSTANTS: dict[str, bool | float | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", "+.inf"), float("inf")),
    "-.inf": float("-inf"),
    ".nan": float("nan"),
}
# Text that needs no quotes when written, unless it looks like another kind of value: no YAML indicator in it.
_PLAIN = re.compile(r"[\w./][\w./+@-]*(?: [\w./+@-]+)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong: the line (1-based; 0 = no line), the key it belongs to ("" = none), and what is wrong."""

    line: int
    key: str
    reason: str


@dataclass
class Document:
    """A file's content: `value` in plain Python types, the 1-based `lines` of every key and item, and all `faults`."""

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)


def read_text(path: Path) -> str | Fault:
    """The text of a YAML file of at most 1 MiB in UTF-8 (a BOM is fine), or the fault that prevents reading it."""
    if not path.is_file():
        return Fault(0, "", "is no file" if path.exists() else "does not exist")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        return Fault(0, "", f"cannot be read: {error.strerror}")
    if len(content) > MAX_BYTES:
        return Fault(0, "", f"is larger than {MAX_BYTES:,} bytes; a configuration is small, so this is another file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return Fault(line, "", f"is not UTF-8: the byte 0x{content[error.start]:02x}; save the file as UTF-8")


def parse(text: str) -> Document:
    """Text to a `Document`. Never raises: whatever is wrong is in `faults`."""
    document = Document()
    try:
        events = _bounded(yaml.parse(text, Loader=yaml.SafeLoader))
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                if document.lines:
                    document.faults.append(Fault(_line(event), "", "a second document begins; a configuration is one"))
                    break
                document.lines[()] = _line(event)
                document.value = _node(next(events), events, (), document)
    except yaml.YAMLError as error:
        document.faults.append(_syntax_fault(error, text))
    except _TooLarge as error:
        document.faults.append(Fault(error.line, "", str(error)))
    return document


def resolve_scalar(text: str) -> str | int | float | bool | None:
    """An unquoted scalar's value by the rules at the file's top. ValueError for a number of absurd length."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _FLOAT.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise ValueError(f"a number of {len(text)} characters (at most {MAX_DIGITS})")
        return int(text) if _INTEGER.fullmatch(text) else float(text)
    return text


def dump_value(value: Any) -> str:
    """A value on one line that `parse` reads back to the same value: text quoted where needed, flow lists and dicts."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_dump_text(str(key))}: {dump_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(dump_value(item) for item in value) + "]"
    if isinstance(value, str):
        return _dump_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _dump_text(text: str) -> str:
    if _PLAIN.fullmatch(text) and not _FLOAT.fullmatch(text) and text not in _CONSTANTS and text.strip("."):
        return text
    # JSON's escapes are YAML's; only characters that a YAML file may not hold raw need them.
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == " " else f"\\U{ord(c):08x}" for c in quoted)


class _TooLarge(Exception):
    def __init__(self, event: Any, what: str) -> None:
        super().__init__(what)
        self.line = _line(event)


def _bounded(events: Iterator[Any]) -> Iterator[Any]:
    for number, event in enumerate(events):
        if number >= MAX_EVENTS:
            raise _TooLarge(event, f"holds more than {MAX_EVENTS:,} values; a configuration is small")
        yield event


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def dotted(path: KeyPath) -> str:
    """A path as messages write it: ("method", "targets", 0) is method.targets[0]."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _node(event: Any, events: Iterator[Any], path: KeyPath, document: Document) -> Any:
    """The value that begins at `event`; consumes its events, notes its lines and faults."""
    if len(path) > MAX_DEPTH:
        raise _TooLarge(event, f"nested deeper than {MAX_DEPTH} levels")

    def fault(reason: str) -> None:
        document.faults.append(Fault(_line(event), dotted(path), reason))

    if isinstance(event, yaml.AliasEvent):
        fault(f"the alias *{event.anchor} is not allowed; write the value out, or in quotes if it is text")
        return None
    if event.anchor is not None:
        fault(f"the anchor &{event.anchor} is not allowed; write the value out, or in quotes if it is text")
    if event.tag is not None:
        fault(f"the tag {_short_tag(event.tag)} is not allowed; write the plain value")
    if isinstance(event, yaml.SequenceStartEvent):
        return _sequence(events, path, document)
    if isinstance(event, yaml.MappingStartEvent):
        return _mapping(events, path, document)
    if event.style is not None:
        return event.value
    try:
        return resolve_scalar(event.value)
    except ValueError as error:
        fault(str(error))
        return None


def _sequence(events: Iterator[Any], path: KeyPath, document: Document) -> list[Any]:
    items: list[Any] = []
    for event in events:
        if isinstance(event, yaml.SequenceEndEvent):
            break
        place = (*path, len(items))
        document.lines[place] = _line(event)
        items.append(_node(event, events, place, document))
    return items


def _mapping(events: Iterator[Any], path: KeyPath, document: Document) -> dict[str, Any]:
    items: dict[str, Any] = {}
    for event in events:
        if isinstance(event, yaml.MappingEndEvent):
            break
        if isinstance(event, yaml.ScalarEvent) and event.anchor is None and event.tag is None:
            place = (*path, str(event.value))
            value_event = next(events)
            if place in document.lines and event.value in items:
                reason = f"given twice, on lines {document.lines[place]} and {_line(event)}; keep one"
                document.faults.append(Fault(_line(event), dotted(place), reason))
                # The second value's keys must not be mistaken for repetitions of the first one's.
                _node(value_event, events, place, Document(faults=document.faults))
                continue
            document.lines[place] = _line(event)
            items[event.value] = _node(value_event, events, place, document)
        else:
            document.faults.append(
                Fault(_line(event), dotted(path), "a key must be text, without anchor, alias or tag")
            )
            # Deeper than the mapping, so that keys which are themselves nested keep to the depth limit.
            aside = Document(faults=[])
            _node(event, events, (*path, ""), aside)
            _node(next(events), events, (*path, ""), aside)
    return items


def _short_tag(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!")


def _syntax_fault(error: yaml.YAMLError, text: str) -> Fault:
    if isinstance(error, yaml.reader.ReaderError):
        position = int(error.position)
        line = text.count("\n", 0, position) + 1
        return Fault(line, "", f"the character U+{ord(text[position]):04X} is not allowed in YAML; remove it")
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return Fault(0, "", f"is no valid YAML: {error}")
    line = int(error.problem_mark.line) + 1
    lines = text.splitlines()
    indent = re.match(r"\s*", lines[line - 1] if line <= len(lines) else "")
    if (indent and "\t" in indent.group()) or "'\\t'" in str(error.problem):
        return Fault(line, "", "a tab stands where YAML wants spaces; indent with spaces")
    context = f" {error.context}," if error.context else ""
    return Fault(line, "", f"is no valid YAML:{context} {error.problem}")
