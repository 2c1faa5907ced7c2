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
import time
from collections.abc import Callable, Iterator
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

from lorica.data import limits
from lorica.data.limits import TemplateLimitError, check_operands, check_size, measure

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


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox with the hooks that `Hooks` calls and with limits on operators, calls and filters."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self._finalize
        )
        self.filters = {name: self._filter(self.filters[name]) for name in FILTERS if name in self.filters}
        self.filters |= {
            "tojson": self._filter(limits.to_json),
            # Nothing is escaped here, and jinja's marked-safe texts would bring methods of their own.
            "safe": self._filter(str),
            "indent": self._filter(limits.indent_lines),
            "format": self._filter(_percent),
            "join": self._filter(self._join),
            "replace": self._filter(self._replace),
        }
        self.globals = {
            "range": self.globals["range"],
            "dict": _dict_of,
            "namespace": _PublicNamespace,
            "joiner": self.globals["joiner"],
            "cycler": self.globals["cycler"],
            "raise_exception": _raise,
            "strftime_now": limits.strftime_now,
        }
        self.start()

    def start(self) -> None:
        """Begin a rendering: a fresh deadline, nothing written yet."""
        self.deadline = time.thread_time() + limits.MAX_SECONDS
        self.num_chars = 0

    # Hooks that the rewritten tree calls.

    def lorica_tick(self, num_chars: int = 0) -> str:
        """One round of a loop or one macro call, whose body holds `num_chars` of literal text."""
        self.num_chars += num_chars
        if self.num_chars > limits.MAX_CHARS:
            raise TemplateLimitError(f"more than {limits.MAX_CHARS} characters written")
        if time.thread_time() > self.deadline:
            raise TemplateLimitError(f"more than {limits.MAX_SECONDS:g} s of CPU time")
        return ""

    def lorica_checked(self, value: Any) -> Any:
        """`value`, unless it is too large; a generator is watched while it runs."""
        if isinstance(value, GeneratorType):
            return self._watched(value)
        if not isinstance(value, Namespace):
            measure(value)
        return value

    def lorica_concat(self, *values: Any) -> str:
        """The operator `~`."""
        self.lorica_tick()
        return str(self.lorica_checked("".join(str(self.lorica_checked(value)) for value in values)))

    @jinja2.pass_context
    def _finalize(self, context: Context, value: Any) -> Any:
        self.lorica_tick(measure(value))
        return value

    # What jinja calls.

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An intercepted operator, refused when its result would be too large."""
        self.lorica_tick()
        if operator == "+" and type(left) is str and type(right) is str and len(left) + len(right) <= limits.MAX_CHARS:
            return left + right
        check_operands(operator, left, right)
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
        inner, form = wrapped, value.__self__

        def limited(*args: Any, **kwargs: Any) -> str:
            limits.check_format(form, limits.WIDE_BRACES, form.count("{"), [args, kwargs])
            return inner(*args, **kwargs)

        return limited

    # Filters.

    def _filter(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def limited(*args: Any, **kwargs: Any) -> Any:
            self.lorica_tick()
            for value in args:
                if isinstance(value, (str, list, tuple, dict)):
                    measure(value)
            return self.lorica_checked(function(*args, **kwargs))

        return limited

    def _watched(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.lorica_tick()
            yield value

    def _join(self, values: Any, d: str = "", attribute: str | None = None) -> str:
        items = [self._part(value, attribute) for value in values]
        check_size(sum(map(len, items)) + len(str(d)) * len(items))
        return str(d).join(items)

    def _part(self, value: Any, attribute: str | None) -> str:
        self.lorica_tick()
        return str(self.lorica_checked(self.getitem(value, attribute) if attribute else value))

    def _replace(self, value: Any, old: str, new: str, count: int = -1) -> str:
        text = str(self.lorica_checked(value))
        check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(str(new)))
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


def _percent(form: Any, *args: Any, **kwargs: Any) -> str:
    check_operands("%", str(form), kwargs or args)
    return str(form) % (kwargs or args)


def _dict_of(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
