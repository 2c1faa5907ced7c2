"""What a row becomes, and what is said of a row that cannot become it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorica.errors import DataError

SHOWN_FAULTS = 20


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. role: system, user, assistant or tool.

    train: None = decided by `loss_on`; a row's own loss weight says True or False.
    tool_calls: {"type": "function", "function": {"name": ..., "arguments": ...}}, as chat templates read them.
    """

    role: str
    content: str
    train: bool | None = None
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a conversation in `messages`, or plain `text` (then messages is empty).

    references: every accepted answer, where the row has several. origin: "rows.jsonl:17", the line of JSONL and CSV
    files and the index (from 0) of JSON lists and Parquet files. label: the class of `text`, or of `text` and
    `text_pair` together, where the row is one to classify.
    """

    messages: tuple[Message, ...]
    text: str | None
    tools: tuple[Mapping[str, Any], ...]
    references: tuple[str, ...]
    task: str | None
    origin: str
    text_pair: str | None = None
    label: str | None = None


@dataclass(frozen=True, slots=True)
class RowFault:
    """A row that cannot be used. rule: a short name of what it broke, for counting."""

    origin: str
    reason: str
    rule: str


class RowError(Exception):
    """A row that cannot be used; caught within this package and turned into a RowFault with the row's origin."""

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule
        self.reason = reason

    def at(self, origin: str) -> RowFault:
        """The fault to report for the row at `origin`."""
        return RowFault(origin, self.reason, self.rule)


def list_faults(faults: Sequence[RowFault]) -> str:
    """The first faults, a line each, and how many more there are."""
    lines = [f"  {fault.origin}: {fault.reason}" for fault in faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        lines.append(f"  … and {len(faults) - SHOWN_FAULTS} more")
    return "\n".join(lines)


def refuse(faults: Sequence[RowFault], num_rows: int, policy: str) -> None:
    """Raise DataError that lists `faults` under the policy "error"; under "drop" do nothing."""
    assert policy in ("error", "drop"), policy
    if faults and policy == "error":
        raise DataError(
            f"{len(faults)} of {num_rows} rows cannot be used:\n{list_faults(faults)}\n"
            "Mend these rows, or leave them out with data.on_bad_row=drop."
        )
