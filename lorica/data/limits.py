"""What a chat template may make: sizes checked before an operation runs, not after.

A value counts as often as it would be written, so that a list which holds the same list twice, sixty levels deep, is
found out without being written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from jinja2.utils import Namespace

from lorica.errors import DataError

MAX_CHARS = 8_000_000
MAX_SECONDS = 5.0
MAX_INT_BITS = 4096

PINNED_DATE = datetime(2025, 1, 1)

# Fields that are 1,000 or more wide, or as wide as an argument says: "%9999d", "%*d" and "{:9999}", "{:{}}".
WIDE_PERCENT = re.compile(r"%[^%a-zA-Z]*(\d{4,}|\*)")
WIDE_BRACES = re.compile(r"[:!][^}]*(\d{4,}|\{)")


class TemplateLimitError(DataError):
    """A template that went over the sandbox's limits. Not a fault of one row: every row would meet it."""


def check_size(num_chars: int) -> None:
    """TemplateLimitError for a value of more characters and items than are allowed."""
    if num_chars > MAX_CHARS:
        raise TemplateLimitError(f"a value of more than {MAX_CHARS} characters")


def measure(value: Any) -> int:
    """Characters and items within `value`, each as often as it would be written; TemplateLimitError above the limit."""
    size, pending = 0, [value]
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, Mapping):
            size += 1 + len(item)
            pending += [*item, *item.values()]
        elif isinstance(item, (list, tuple)):
            size += 1 + len(item)
            pending += item
        elif isinstance(item, Namespace):
            raise TemplateLimitError("a namespace used as a value")
        check_size(size)
    return size


def check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse +, *, ** or % where the result would be too large."""
    if operator == "%" and isinstance(left, str):
        check_format(left, WIDE_PERCENT, left.count("%"), right)
    elif operator == "+":
        check_size(measure(left) + measure(right))
    elif isinstance(left, int) and isinstance(right, int):
        num_bits = left.bit_length() * max(0, right) if operator == "**" else left.bit_length() + right.bit_length()
        if num_bits > MAX_INT_BITS:
            raise TemplateLimitError(f"a number of more than {MAX_INT_BITS} bits")
    elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
        value, times = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(value, (str, list, tuple)):
            check_size(max(1, measure(value)) * times)


def check_format(form: str, wide: re.Pattern[str], num_fields: int, arguments: Any) -> None:
    """Refuse a format whose fields are wide, or so many that the arguments would fill too much."""
    if wide.search(form):
        raise TemplateLimitError("a format with wide fields")
    check_size(len(form) + num_fields * (measure(arguments) + 1000))


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, as chat templates expect it."""
    if indent is not None:
        if not isinstance(indent, int):
            raise TemplateLimitError("tojson with an indent that is no number")
        check_size(measure(value) * max(1, indent) * _depth(value))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return 1 + max(map(_depth, inner), default=0)


def indent_lines(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """jinja's `indent`."""
    lines = str(text).split("\n")
    check_size(len(lines) * (width if isinstance(width, int) else len(width)))
    space = " " * width if isinstance(width, int) else width
    return "\n".join(space + line if (line or blank) and (index or first) else line for index, line in enumerate(lines))


def strftime_now(form: str) -> str:
    """The pinned date, formatted."""
    check_format(form, WIDE_PERCENT, form.count("%"), "")
    return PINNED_DATE.strftime(form)
