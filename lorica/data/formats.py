"""One row of a known format to an Example, and which format a file is in.

A format is recognised by its columns; names that mean the same in other projects' files are accepted (`ALIASES`). A
row is taken whole or refused with a rule and a reason, never mended in silence. Preference pairs are refused by name:
lorica trains on answers, not on comparisons, but `data.columns` can point at the chosen side.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorica.data import turns
from lorica.data.rows import Example, Message, RowError
from lorica.errors import DataError

FORMATS = ("alpaca", "sharegpt", "messages", "prompt_response", "text", "classification")
# What a row counts as only where its columns fit no conversation, the first of them that fits.
_PLAIN = ("classification", "text")

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """required: each entry is a canonical column, or several of which one is enough. optional: read where present.

    on_request: read only where `data.columns` maps it. wants: the columns in words, shown to the user.
    """

    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...]
    wants: str
    parse: Callable[[Row], Example]
    on_request: tuple[str, ...] = ()


# Canonical column -> names that other projects give it, tried only where the canonical name is missing.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("question", "query", "input", "problem"),
    "response": ("answer", "output", "completion", "solution", "target"),
    "input": ("context",),
    "output": ("response",),
    "messages": ("conversation", "conversations", "dialogue"),
    "conversations": ("conversation", "messages"),
    "text": ("content", "sentence", "sentence1", "premise"),
    "text_pair": ("sentence2", "hypothesis"),
}
# Columns that are looked for under other names although a row may lack them.
_SOUGHT = ("input", "text_pair")


def detect(
    columns: Sequence[str], turn_keys: Collection[str], *, format: str, mapping: Mapping[str, str], source: str
) -> tuple[str, dict[str, str]]:
    """The format's name and its canonical column -> the file's column.

    columns: those of the file's first good rows. turn_keys: keys of the first conversation's first turn, empty
    without one. Raises DataError: unknown format, a mapping that does not fit, no format or several, preference
    pairs.
    """
    _check_mapping(mapping, columns, format, source)
    free = [column for column in columns if column not in mapping.values()]
    if {"chosen", "rejected"} <= set(columns) and "chosen" not in mapping.values():
        raise DataError(
            f"{source}: these are preference pairs (columns {_names(columns)}); lorica trains on answers, not on "
            "comparisons. To train on the chosen side map it: data.columns={response: chosen} "
            "(or {messages: chosen} where it is a whole conversation)."
        )
    fitting: dict[str, dict[str, str]] = {}
    doubts: list[DataError] = []
    for name in FORMATS if format == "auto" else (format,):
        try:
            found = _match(FORMAT[name], free, mapping, source)
        except DataError as doubt:
            doubts.append(doubt)
            continue
        if found is not None and (format != "auto" or _plausible(name, turn_keys, mapping)):
            fitting[name] = found
    if "alpaca" in fitting and fitting.get("prompt_response", {}).get("prompt") != "prompt":
        fitting.pop("prompt_response", None)
    chosen = [name for name in fitting if name not in _PLAIN] or [name for name in _PLAIN if name in fitting][:1]
    if len(chosen) == 1:
        return chosen[0], fitting[chosen[0]]
    if chosen:
        raise DataError(
            f"{source}: columns {_names(columns)} fit several formats: {', '.join(chosen)}. Say which with "
            f"data.format, for example data.format={chosen[0]}."
        )
    raise doubts[0] if doubts else DataError(_unrecognised(columns, format, source))


def rare_columns(name: str, found: Mapping[str, str], present: Collection[str]) -> dict[str, str]:
    """Canonical columns of the format `name` that too few rows have to be recognised by, but that must be read."""
    taken = set(found.values())
    rare = _canonical(FORMAT[name]) - set(found) - set(FORMAT[name].on_request)
    return {column: column for column in sorted(rare) if column in present and column not in taken}


def _plausible(name: str, turn_keys: Collection[str], mapping: Mapping[str, str]) -> bool:
    """The keys of the turns tell sharegpt from messages, unless a mapping has said it."""
    if name == "sharegpt":
        return "from" in turn_keys or "conversations" in mapping
    return name != "messages" or "from" not in turn_keys or "messages" in mapping


def _match(format: Format, free: Sequence[str], mapping: Mapping[str, str], source: str) -> dict[str, str] | None:
    canonical = _canonical(format)
    if not set(mapping) <= canonical:
        return None
    found = dict(mapping)
    for name in sorted(canonical - set(mapping)):
        if name in free and name not in format.on_request:
            found[name] = name
    for choice in format.required:
        if not set(choice) & set(found):
            column = _alias(choice[0], [column for column in free if column not in found.values()], source)
            if column is None:
                return None
            found[choice[0]] = column
    for name in _SOUGHT:
        if name in format.optional and name not in found:
            column = _alias(name, [column for column in free if column not in found.values()], source)
            found |= {name: column} if column else {}
    return found


def _canonical(format: Format) -> set[str]:
    return {name for choice in format.required for name in choice} | set(format.optional) | set(format.on_request)


def _alias(name: str, free: Sequence[str], source: str) -> str | None:
    candidates = [column for column in free if column in ALIASES.get(name, ())]
    if len(candidates) > 1:
        raise DataError(
            f"{source}: the {name} could be any of {_names(candidates)}. Say which with data.columns, "
            f"for example data.columns={{{name}: {candidates[0]}}}."
        )
    return candidates[0] if candidates else None


def _check_mapping(mapping: Mapping[str, str], columns: Sequence[str], format: str, source: str) -> None:
    if format not in (*FORMAT, "auto"):
        raise DataError(f"data.format is {format!r}{_meant(format, FORMATS)}; known are auto, {', '.join(FORMATS)}.")
    known = [FORMAT[format]] if format != "auto" else [FORMAT[name] for name in FORMATS]
    canonical = set[str]().union(*(_canonical(item) for item in known))
    problems = [
        f"  {name}: no such column of lorica's{_meant(name, canonical)}; known are {', '.join(sorted(canonical))}"
        for name in mapping
        if name not in canonical
    ]
    problems += [
        f"  {name}: {column}: the file has no column {column!r}{_meant(column, columns)}; it has {_names(columns)}"
        for name, column in mapping.items()
        if column not in columns
    ]
    if problems:
        raise DataError(f"{source}: data.columns (lorica's column: the file's) does not fit:\n" + "\n".join(problems))


def _unrecognised(columns: Sequence[str], format: str, source: str) -> str:
    names = FORMATS if format == "auto" else (format,)
    wants = "\n".join(f"  {name}: {FORMAT[name].wants}" for name in names)
    ours = [choice[0] for choice in FORMAT["prompt_response" if format == "auto" else format].required]
    theirs = (columns[0], columns[-1]) if len(columns) >= len(ours) else ("question", "answer")
    example = ", ".join(f"{name}: {column}" for name, column in zip(ours, theirs, strict=False))
    return (
        f"{source}: no format fits the columns {_names(columns)}. Wanted:\n{wants}\n"
        "Say which column is which with data.columns (lorica's column: the file's), for example "
        f"data.columns={{{example}}}."
    )


def _names(columns: Collection[str]) -> str:
    return ", ".join(columns) or "(none)"


def _meant(name: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


# Parsers read rows under canonical names; an absent column and null are the same.


def _alpaca(row: Row) -> Example:
    parts = [turns.text_of(row.get("instruction"), "instruction", allow_empty=True)]
    if row.get("input") is not None:
        parts.append(turns.text_of(row["input"], "input", allow_empty=True))
    messages = _system(row)
    for index, pair in enumerate(_history(row.get("history"))):
        messages.append(Message("user", turns.text_of(pair[0], f"history {index + 1}, user")))
        messages.append(Message("assistant", turns.text_of(pair[1], f"history {index + 1}, assistant")))
    question = "\n".join(part for part in parts if part.strip())
    messages.append(Message("user", turns.text_of(question, "instruction")))
    messages.append(Message("assistant", turns.text_of(row.get("output"), "output")))
    return _conversation(row, messages)


def _history(value: object) -> Sequence[Sequence[object]]:
    if value is None or value == "":
        return ()
    value = turns.maybe_json(value)
    if not isinstance(value, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in value):
        raise RowError("type", "history is not a list of [user, assistant] pairs")
    return value


def _prompt_response(row: Row) -> Example:
    references = _references(row.get("references"))
    response = row.get("response")
    if response is None and references:
        response = references[0]
    prompt = turns.text_of(row.get("prompt"), "prompt")
    answer = turns.text_of(turns.single_turn(response), "response")
    return _conversation(row, [*_system(row), Message("user", prompt), Message("assistant", answer)], references)


def _references(value: object) -> tuple[str, ...]:
    value = turns.maybe_json(value)
    if value is None or value == "" or value == []:
        return ()
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise RowError("type", f"references is {turns.kind(value)}; a text or a list of texts is wanted")
    return tuple(turns.text_of(item, f"reference {index + 1}") for index, item in enumerate(value))


def _turns(row: Row, column: str) -> Example:
    messages = turns.parse_turns(row.get(column), column)
    if row.get("response") is not None:
        messages += turns.parse_response(row["response"])
    if messages and messages[0].role != "system":
        messages = _system(row) + messages
    elif row.get("system"):
        raise RowError("roles", "the row has a system column and a system turn")
    return _conversation(row, messages)


def _text(row: Row) -> Example:
    return Example((), turns.text_of(row.get("text"), "text"), (), (), _task(row), "")


def _classification(row: Row) -> Example:
    return _to_classify(row, _label(row.get("label")))


def _to_classify(row: Row, label: str | None) -> Example:
    pair = row.get("text_pair")
    return Example(
        messages=(),
        text=turns.text_of(row.get("text"), "text"),
        tools=(),
        references=(),
        task=_task(row),
        origin="",
        text_pair=None if pair is None else turns.text_of(pair, "text_pair"),
        label=label,
    )


def _label(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str) or value is None:
        return turns.text_of(value, "label").strip()
    raise RowError("type", f"label is {turns.kind(value)}; a text or a whole number is wanted, one class a row")


def _system(row: Row) -> list[Message]:
    return [Message("system", turns.text_of(row["system"], "system"))] if row.get("system") else []


def _task(row: Row) -> str | None:
    task = row.get("task")
    return None if task is None or task == "" else str(task)


def _conversation(row: Row, messages: list[Message], references: tuple[str, ...] = ()) -> Example:
    if not any(message.role == "assistant" for message in messages):
        raise RowError("roles", "no assistant turn, so there is nothing to train on")
    return Example(tuple(messages), None, turns.parse_tools(row.get("tools")), references, _task(row), "")


FORMAT: Mapping[str, Format] = {
    "alpaca": Format(
        required=(("instruction",), ("output",)),
        optional=("input", "system", "history", "task"),
        wants="instruction, output (and input, system, history)",
        parse=_alpaca,
    ),
    "sharegpt": Format(
        required=(("conversations",),),
        optional=("tools", "system", "task"),
        wants="conversations: a list of {from, value} (and tools, system)",
        parse=lambda row: _turns(row, "conversations"),
        on_request=("response",),
    ),
    "messages": Format(
        required=(("messages",),),
        optional=("tools", "system", "task"),
        wants="messages: a list of {role, content} (and tools)",
        parse=lambda row: _turns(row, "messages"),
        on_request=("response",),
    ),
    "prompt_response": Format(
        required=(("prompt",), ("response", "references")),
        optional=("system", "task", "references"),
        wants="prompt and response, or question and answer, input and output, query and response (and system)",
        parse=_prompt_response,
    ),
    "text": Format(required=(("text",),), optional=("task",), wants="text, or content", parse=_text),
    "classification": Format(
        required=(("text",), ("label",)),
        optional=("text_pair", "task"),
        wants="text and label (and text_pair, or sentence2)",
        parse=_classification,
    ),
    # Not one to train on: what `lorica generate` names the classes of.
    "to_classify": Format(
        required=(("text",),),
        optional=("text_pair", "label"),
        wants="text (and text_pair, or sentence2)",
        parse=lambda row: _to_classify(row, None if row.get("label") is None else _label(row["label"])),
    ),
}
