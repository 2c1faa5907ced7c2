"""Turns of a conversation as the world writes them, to Messages: roles, typed contents, tool calls, loss weights.

Whatever a field cannot mean is refused with the turn's number; a field that would change what the model reads is
never dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lorica.data.rows import Message, RowError

ROLES: Mapping[str, str] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant", "chatgpt": "assistant",
    "ai": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip


def kind(value: object) -> str:
    """What a value is, in JSON's words, for an error."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def _shown(value: object) -> str:
    return "null or missing" if value is None else kind(value)


def text_of(value: object, where: str, *, allow_empty: bool = False) -> str:
    """`value` as text that a tokenizer can take, or RowError."""
    if not isinstance(value, str):
        raise RowError("null" if value is None else "type", f"{where} is {_shown(value)}; a text is wanted")
    if not allow_empty and not value.strip():
        raise RowError("empty", f"{where} is empty")
    if "\0" in value:
        raise RowError("encoding", f"{where} holds a NUL character at position {value.index(chr(0)) + 1}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError("encoding", _surrogate(value, error.start, where)) from None
    return value


def _surrogate(value: str, position: int, where: str) -> str:
    if "\udc80" <= value[position] <= "\udcff":
        byte = ord(value[position]) - 0xDC00
        return f"{where} is not UTF-8: byte 0x{byte:02x} at position {position + 1}"
    return f"{where} holds half of a surrogate pair at position {position + 1}"


def maybe_json(value: object) -> object:
    """CSV and Parquet files often keep lists and objects as JSON text: the parsed value where it is one."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            parsed: object = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return parsed
    return value


def single_turn(value: object) -> object:
    """A response given as one turn, or a list of one turn, as that turn's content; anything else as it is."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping) and ("content" in value or "value" in value):
        return value.get("content", value.get("value"))
    return value


def parse_response(value: object) -> list[Message]:
    """A response column beside a conversation: a text, a turn, or a list of turns."""
    if isinstance(value, str):
        return [Message("assistant", text_of(value, "response"))]
    return parse_turns([value] if isinstance(value, Mapping) else value, "response")


def parse_turns(value: object, column: str) -> list[Message]:
    """The turns of a conversation column."""
    value = maybe_json(value)
    if not isinstance(value, list):
        raise RowError("null" if value is None else "type", f"{column} is {_shown(value)}; a list of turns is wanted")
    if not value:
        raise RowError("empty", f"{column} has no turns")
    return [_parse_turn(turn, f"{column}, turn {index + 1}") for index, turn in enumerate(value)]


def _parse_turn(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError("type", f"{where} is {kind(turn)}; an object with role and content is wanted")
    named = turn.get("role", turn.get("from"))
    if not isinstance(named, str) or named.lower() not in ROLES:
        shown = f"unknown role {named!r}" if isinstance(named, str) else f"role is {kind(named)}"
        raise RowError("roles", f"{where}: {shown}; known are {', '.join(sorted(ROLES))}")
    role, where = ROLES[named.lower()], f"{where} ({named})"
    content = turn["content"] if "content" in turn else turn.get("value")
    if named.lower() == "function_call":
        return Message(role, "", _weight(turn, where), _tool_calls(_decoded(content, where), where))
    calls = _tool_calls(turn.get("tool_calls") or turn.get("function_call"), where)
    if calls and role != "assistant":
        raise RowError("roles", f"{where}: only an assistant calls tools")
    may_be_empty = bool(calls) or role in ("tool", "system")
    text = "" if content is None and calls else _content(content, where, may_be_empty=may_be_empty)
    reasoning = turn.get("reasoning_content")
    if reasoning:
        # The tags that reasoning models with an open template use in their content.
        text = f"<think>\n{text_of(reasoning, where + ', reasoning_content')}\n</think>\n\n{text}"
    name, call_id = _optional(turn, "name", where), _optional(turn, "tool_call_id", where)
    return Message(role, text, _weight(turn, where), calls, name, call_id)


def _content(value: object, where: str, *, may_be_empty: bool) -> str:
    if not isinstance(value, list):
        return text_of(value, where, allow_empty=may_be_empty)
    texts = []
    for index, part in enumerate(value):
        place = f"{where}, part {index + 1}"
        if isinstance(part, Mapping) and part.get("type", "text") != "text":
            raise RowError("type", f"{place} is of type {part['type']!r}; only text can be trained on")
        inner = part.get("text", part.get("value")) if isinstance(part, Mapping) else part
        texts.append(text_of(inner, place, allow_empty=True))
    return text_of("".join(texts), where, allow_empty=may_be_empty)


def _weight(turn: Mapping[str, Any], where: str) -> bool | None:
    weight = turn.get("loss_weight")
    weight = turn.get("weight") if weight is None else weight
    if weight is None:
        return None
    if not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise RowError("type", f"{where}: the loss weight is {weight!r}; 0 (not trained) or 1 (trained) is wanted")
    return bool(weight)


def _optional(turn: Mapping[str, Any], key: str, where: str) -> str | None:
    return None if turn.get(key) is None else text_of(turn[key], f"{where}, {key}", allow_empty=True)


def _decoded(value: object, where: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        parsed: object = json.loads(text_of(value, where))
    except (ValueError, RecursionError) as error:
        raise RowError("tools", f"{where} is not valid JSON: {error}") from None
    return parsed


def _tool_calls(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """Calls as {"type": "function", "function": {"name", "arguments"}}; arguments given as JSON text are parsed."""
    if value is None or value == []:
        return ()
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        if not named or not isinstance(call, Mapping) or not isinstance(function, Mapping):
            raise RowError("tools", f"{where}: a tool call is an object with name and arguments")
        text_of(json.dumps(call, ensure_ascii=False), f"{where}, tool call")
        arguments = _decoded(function.get("arguments", {}) or {}, f"{where}, arguments of {function['name']}")
        extra = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        calls.append({**extra, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return tuple(calls)


def parse_tools(value: object) -> tuple[Mapping[str, Any], ...]:
    """The tools column: a list of function schemas, or that list as JSON text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    value = _decoded(value, "tools")
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError("tools", f"tools is {kind(value)}; a list of objects is wanted")
    text_of(json.dumps(value, ensure_ascii=False), "tools")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)
