"""A jinja sandbox that always ends.

A chat template comes with a model, often from strangers. jinja's sandbox keeps it away from Python's objects; this
one also bounds what it may spend: every loop round, macro, call, filter and operator passes a hook that checks a CPU
deadline and the size of what was made, and the operations that make much out of little (`"x" * 10**9`, `center`,
`%1000000d`, `**`, nested doubling) are checked before they run. The hooks are put into the syntax tree before it is
compiled. It gives up filters and methods that no chat template needs, and today's date: `strftime_now` is pinned, for
a run must tokenise the same on the day it is resumed.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from types import BuiltinMethodType, GeneratorType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from lorica.errors import DataError

MAX_CHARS = 8_000_000
MAX_SECONDS = 5.0
MAX_INT_BITS = 4096

PINNED_DATE = datetime(2025, 1, 1)

FILTERS = frozenset(
    """
    abs bool capitalize count d default dictsort first float groupby indent int items join last length list
    lower map max min reject rejectattr replace reverse round select selectattr sort string striptags title
    tojson trim unique upper urlencode wordcount
    """.split()  # noqa: SIM905
)

STRING_METHODS = frozenset(
    """
    capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric
    isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition
    rsplit rstrip split splitlines startswith strip swapcase title upper
    """.split()  # noqa: SIM905
)

CONTAINER_METHODS = frozenset(
    """
    copy count get index items keys values
    """.split()  # noqa: SIM905
)

# Fields that are 1,000 or more wide, or as wide as an argument says: "%9999d", "%*d" and "{:9999}", "{:{}}".
WIDE_PERCENT = re.compile(r"%[^%a-zA-Z]*(\d{4,}|\*)")
WIDE_BRACES = re.compile(r"[:!][^}]*(\d{4,}|\{)")


class TemplateLimitError(DataError):
    """A template that went over the sandbox's limits. Not a fault of one row: every row would meet it."""


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox with the hooks that `_Hooks` calls and with limits on operators, calls and filters."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self._finalize
        )
        self.filters = {name: self._filter(self.filters[name]) for name in FILTERS if name in self.filters}
        self.filters |= {
            "tojson": self._filter(_tojson),
            # Nothing is escaped here, and jinja's marked-safe texts would bring methods of their own.
            "safe": self._filter(str),
            "indent": self._filter(_indent),
            "join": self._filter(self._join),
            "replace": self._filter(self._replace),
        }
        self.globals = {
            "range": self.globals["range"],
            "dict": dict_of,
            "namespace": _PublicNamespace,
            "joiner": self.globals["joiner"],
            "cycler": self.globals["cycler"],
            "raise_exception": _raise,
            "strftime_now": _strftime_now,
        }
        self.start()

    def start(self) -> None:
        """Begin a rendering: a fresh deadline, nothing written yet."""
        self.deadline = time.thread_time() + MAX_SECONDS
        self.num_chars = 0

    # Hooks that the rewritten tree calls.

    def lorica_tick(self, num_chars: int = 0) -> str:
        """One round of a loop or one macro call, whose body holds `num_chars` of literal text."""
        self.num_chars += num_chars
        if self.num_chars > MAX_CHARS:
            raise TemplateLimitError(f"more than {MAX_CHARS} characters written")
        if time.thread_time() > self.deadline:
            raise TemplateLimitError(f"more than {MAX_SECONDS:g} s of CPU time")
        return ""

    def lorica_checked(self, value: Any) -> Any:
        """`value`, unless it is too large; a generator is watched while it runs."""
        if isinstance(value, GeneratorType):
            return self._watched(value)
        if not isinstance(value, Namespace):
            _measure(value)
        return value

    def lorica_concat(self, *values: Any) -> str:
        """The operator `~`."""
        self.lorica_tick()
        return str(self.lorica_checked("".join(str(self.lorica_checked(value)) for value in values)))

    @jinja2.pass_context
    def _finalize(self, context: Context, value: Any) -> Any:
        self.lorica_tick(_measure(value))
        return value

    # What jinja calls.

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An intercepted operator, refused when its result would be too large."""
        self.lorica_tick()
        _check_operands(operator, left, right)
        return self.lorica_checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Any call; of the methods of texts and containers only the listed ones."""
        self = __self
        self.lorica_tick()
        owner = __obj.__self__ if isinstance(__obj, (BuiltinMethodType, MethodType)) else None
        if isinstance(owner, (str, int, float, bytes, list, dict, tuple)):
            if __obj.__name__ not in (STRING_METHODS if isinstance(owner, str) else CONTAINER_METHODS):
                raise jinja2.exceptions.SecurityError(f"{type(owner).__name__}.{__obj.__name__} is not for templates")
            if isinstance(owner, str) and __obj.__name__ == "replace":
                return self._replace(owner, *args)
            if isinstance(owner, str) and __obj.__name__ == "join":
                return self._join(args[0], owner)
        return self.lorica_checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`"...".format`, without wide fields."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        if WIDE_BRACES.search(value.__self__):
            raise jinja2.exceptions.SecurityError("a format with wide or computed fields is not for templates")
        return wrapped

    # Filters.

    def _filter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self.lorica_tick()
            for value in args:
                if isinstance(value, (str, list, tuple, dict)):
                    _measure(value)
            return self.lorica_checked(function(*args, **kwargs))

        return limited

    def _watched(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.lorica_tick()
            yield value

    def _join(self, values: Any, d: str = "", attribute: str | None = None) -> str:
        items = [self._part(value, attribute) for value in values]
        if sum(map(len, items)) + len(str(d)) * len(items) > MAX_CHARS:
            raise TemplateLimitError(f"a text of more than {MAX_CHARS} characters")
        return str(d).join(items)

    def _part(self, value: Any, attribute: str | None) -> str:
        self.lorica_tick()
        return str(self.lorica_checked(self.getitem(value, attribute) if attribute else value))

    def _replace(self, value: Any, old: str, new: str, count: int = -1) -> str:
        text = str(self.lorica_checked(value))
        if len(text) + (text.count(old) if old else len(text) + 1) * len(str(new)) > MAX_CHARS:
            raise TemplateLimitError(f"a text of more than {MAX_CHARS} characters")
        return text.replace(old, str(new), -1 if count is None else count)


class Hooks(NodeTransformer):
    """Puts the sandbox's hooks into a template's syntax tree."""

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        num_chars = sum(len(data.data) for part in node.body for data in _within(part, nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("lorica_tick", [nodes.Const(num_chars)])))
        return node

    visit_For = visit_Macro = visit_CallBlock = _body

    def _literal(self, node: Any) -> Any:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or not any(True for _ in node.find_all(nodes.Name)):
            return node
        return _call("lorica_checked", [node])

    visit_List = visit_Tuple = visit_Dict = _literal

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("lorica_concat", node.nodes)


def _within(node: nodes.Node, kind: type[nodes.TemplateData]) -> Iterator[nodes.TemplateData]:
    if isinstance(node, kind):
        yield node
    yield from node.find_all(kind)


def _call(name: str, arguments: list[Any]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, which some templates put around assistant turns: transparent here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _PublicNamespace(Namespace):
    """jinja's namespace without underscored names, which could shadow what jinja itself looks up."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace takes no underscored name: {name!r}")


def _measure(value: Any) -> int:
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
        if size > MAX_CHARS:
            raise TemplateLimitError(f"a value of more than {MAX_CHARS} characters")
    return size


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse an operator whose result would be too large, before it is computed."""
    if operator == "%" and isinstance(left, str):
        _measure(right)
        if WIDE_PERCENT.search(left):
            raise TemplateLimitError("a format with wide fields")
    elif operator == "+":
        if _measure(left) + _measure(right) > MAX_CHARS:
            raise TemplateLimitError(f"a value of more than {MAX_CHARS} characters")
    elif isinstance(left, int) and isinstance(right, int):
        num_bits = left.bit_length() * max(0, right) if operator == "**" else left.bit_length() + right.bit_length()
        if num_bits > MAX_INT_BITS:
            raise TemplateLimitError(f"a number of more than {MAX_INT_BITS} bits")
    elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
        value, times = (right, left) if isinstance(left, int) else (left, right)
        if isinstance(value, (str, list, tuple)) and max(1, _measure(value)) * times > MAX_CHARS:
            raise TemplateLimitError(f"a value of more than {MAX_CHARS} characters")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, as chat templates expect it."""
    if indent is not None and (not isinstance(indent, int) or indent > 8):
        raise TemplateLimitError("tojson with a wide indent")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    space = " " * min(width, 100) if isinstance(width, int) else width[:100]
    lines = str(text).split("\n")
    return "\n".join(space + line if (line or blank) and (index or first) else line for index, line in enumerate(lines))


def dict_of(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """`dict(...)` of templates."""
    return dict(*args, **kwargs)


def _strftime_now(form: str) -> str:
    if WIDE_PERCENT.search(form):
        raise TemplateLimitError("a format with wide fields")
    return PINNED_DATE.strftime(form)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
