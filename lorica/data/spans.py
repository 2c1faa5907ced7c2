"""Which characters of a rendered conversation the model has to say.

The conversation is rendered whole, by the base's own template, and never cut up: what is trained is what will be
seen. A turn begins where the rendering of the turns before it, with the generation prompt, ends; where a template
breaks that (it may rewrite history), the turn is rendered once more with a mark in place of its content. It ends
after its end-of-turn token. Where neither way is unambiguous the row is refused: a wrong mask trains the wrong thing
in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lorica.data.limits import MAX_CHARS
from lorica.data.rows import Example, Message, RowError
from lorica.data.template import Template, TemplateRefusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use characters: no template writes them, and they survive trimming.
MARK = "\ue0f0\ue0f1\ue0f2"
OTHER_MARK = "\ue0f3\ue0f4\ue0f5"

# Tokens that end a turn of another kind than the usual one (a tool call, for instance), where the tokenizer has them.
OTHER_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|return|>", "<|call|>", "</s>")

TOOLS_LINE = 'These tools can be called by answering with JSON, {"name": ..., "arguments": {...}}:'


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a template does, found by trying it.

    ends: texts of the tokens that may end a turn. stop: the one that ends a plain answer, None where the template
    writes none. header: what it puts before an answer although it was not asked for a generation prompt.
    folds_system: it refuses or loses system turns.
    """

    template: Template
    ends: tuple[str, ...]
    stop: str | None
    header: str
    folds_system: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """A rendered conversation.

    spans: [start, end) in characters, ascending. needs_end: the tokenizer's end token must follow. cuts: where answers
    begin and end, ascending; no token may reach across.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    needs_end: bool
    cuts: tuple[int, ...] = ()


def learn_dialect(template: Template, tokenizer: PreTrainedTokenizerBase) -> Dialect:
    """Try `template` on marked conversations. What it refuses altogether is left to the rows to find out."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    user, assistant = Message("user", OTHER_MARK), Message("assistant", MARK)
    header, stop = "", None
    try:
        bare, prompt = _render(template, [user]), _render(template, [user], generation_prompt=True)
        whole = _render(template, [user, assistant])
        before, _, after = whole.partition(MARK)
        if bare == prompt and before.startswith(bare) and before[len(bare) :].strip():
            header = before[len(bare) :]
        starts = [token for token in special if after.lstrip().startswith(token)]
        stop = max(starts, key=len, default=None)
    except TemplateRefusal:
        pass
    ends = {token for token in (stop, tokenizer.eos_token) if isinstance(token, str)}
    ends |= special & set(OTHER_ENDS)
    return Dialect(template, tuple(sorted(ends)), stop, header, _folds_system(template, user))


def _folds_system(template: Template, user: Message) -> bool:
    try:
        _render(template, [user])
    except TemplateRefusal:
        return False
    try:
        return MARK not in _render(template, [Message("system", MARK), user])
    except TemplateRefusal:
        return True


def spoken(example: Example, dialect: Dialect) -> tuple[tuple[Message, ...], tuple[Mapping[str, Any], ...]]:
    """The turns and tools in the form that the template can show; nothing is lost.

    Tools that it cannot take go into the system turn as JSON, calls into the assistant's text, a system turn into the
    user's.
    """
    messages, tools = list(example.messages), example.tools
    if tools and not dialect.template.reads_tools:
        listed = "\n".join(
            [TOOLS_LINE, *(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)]
        )
        if messages[0].role == "system":
            messages[0] = replace(messages[0], content=f"{messages[0].content}\n\n{listed}")
        else:
            messages.insert(0, Message("system", listed))
        tools = ()
    if not dialect.template.reads_tool_calls:
        messages = [replace(turn, content=answer_text(turn), tool_calls=()) for turn in messages]
    if dialect.folds_system:
        messages = _folded(messages)
    return tuple(messages), tools


def answer_text(message: Message) -> str:
    """A turn's text with its tool calls as JSON, a line each."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.tool_calls]
    return "\n".join([message.content, *calls] if message.content else calls) if calls else message.content


def _folded(messages: list[Message]) -> list[Message]:
    folded: list[Message] = []
    waiting = ""
    for message in messages:
        if message.role == "system":
            waiting += message.content + "\n\n"
        elif waiting and message.role == "user":
            folded.append(replace(message, content=waiting + message.content))
            waiting = ""
        else:
            folded.append(message)
    return [*folded, Message("user", waiting.strip())] if waiting else folded


def lay_out(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], dialect: Dialect, wanted: Sequence[int]
) -> Layout:
    """Render the turns and find those at the indices `wanted`. Raises RowError."""
    if sum(len(message.content) for message in messages) > MAX_CHARS // 4:
        raise RowError("too_long", f"the conversation has more than {MAX_CHARS // 4} characters")
    conversation = _Conversation(messages, tools, dialect)
    spans, needs_end = [], False
    for index in wanted:
        start = conversation.start(index)
        end, ended = conversation.end(index, start)
        if end <= start:
            raise RowError("template", f"the chat template shows nothing of turn {index + 1} (assistant)")
        needs_end = not ended and index == len(messages) - 1
        spans.append((start, end))
    text = conversation.text[: spans[-1][1]] if needs_end else conversation.text
    return Layout(text, tuple(spans), needs_end, tuple(border for span in spans for border in span))


def prompt_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], dialect: Dialect) -> str:
    """The turns and what the model must see to answer them. Raises RowError."""
    try:
        return _render(dialect.template, messages, tools, generation_prompt=True) + dialect.header
    except TemplateRefusal as refusal:
        raise RowError("template", f"the chat template refuses the conversation: {refusal}") from None


class _Conversation:
    """One conversation, rendered whole as `text`."""

    def __init__(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], dialect: Dialect) -> None:
        self.messages, self.tools, self.dialect = messages, tools, dialect
        try:
            self.text = _render(dialect.template, messages, tools)
        except TemplateRefusal as refusal:
            raise RowError("template", f"the chat template refuses the conversation: {refusal}") from None
        for index, message in enumerate(messages):
            if message.role in ("system", "user") and message.content.strip() not in self.text:
                raise RowError(
                    "template", f"the chat template does not show turn {index + 1} ({message.role}) as it is"
                )

    def start(self, index: int) -> int:
        """Where turn `index` begins: after all that the model is given before it answers."""
        if self.messages[index].role == "assistant":
            before = self._prefix(index, generation_prompt=True)
            if before is not None:
                return before
        return self._marked(index)[0]

    def end(self, index: int, start: int) -> tuple[int, bool]:
        """Where turn `index` ends, its end-of-turn token included, and whether it has one."""
        message, last = self.messages[index], index == len(self.messages) - 1
        if message.content and not message.tool_calls:
            stop = self._after(message.content, start)
            if stop is not None:
                after = self._after_end_token(stop)
                if after is not None:
                    return after, True
                if last and not self.text[stop:].strip():
                    return stop, False
        stop = len(self.text) if last else self._prefix(index + 1, generation_prompt=False)
        if stop is None:
            stop = self._marked(index)[1]
            if message.tool_calls:
                stop = self._before_end_token(index, stop)
            after = self._after_end_token(stop)
            return (stop, False) if after is None else (after, True)
        shown = self.text[start:stop].rstrip()
        return start + len(shown), shown.endswith(self.dialect.ends)

    def _after(self, content: str, start: int) -> int | None:
        """The end of `content` where it stands at `start`, give or take white space around it."""
        if self.text.startswith(content, start):
            return start + len(content)
        while start < len(self.text) and self.text[start].isspace():
            start += 1
        content = content.strip()
        return start + len(content) if self.text.startswith(content, start) else None

    def _after_end_token(self, start: int) -> int | None:
        while start < len(self.text) and self.text[start].isspace():
            start += 1
        found = [token for token in self.dialect.ends if self.text.startswith(token, start)]
        return start + len(max(found, key=len)) if found else None

    def _before_end_token(self, index: int, start: int) -> int:
        """Where the first end token after `start` stands, behind tool calls in a form of the template's own."""
        found = [place for token in self.dialect.ends if (place := self.text.find(token, start)) >= 0]
        if not found:
            raise self._untraceable(index)
        return min(found)

    def _prefix(self, num_turns: int, *, generation_prompt: bool) -> int | None:
        """Length of the first turns' own rendering, if the whole text begins with it."""
        try:
            before = _render(
                self.dialect.template, self.messages[:num_turns], self.tools, generation_prompt=generation_prompt
            )
        except TemplateRefusal:
            return None
        before += self.dialect.header if generation_prompt else ""
        return len(before) if self.text.startswith(before) else None

    def _marked(self, index: int) -> tuple[int, int]:
        """Where the content of turn `index` stands, found by rendering a mark in its place."""
        messages = list(self.messages)
        messages[index] = replace(messages[index], content=MARK)
        try:
            parts = _render(self.dialect.template, messages, self.tools).split(MARK)
        except TemplateRefusal:
            parts = []
        known = len(parts) == 2 and self.text.startswith(parts[0]) and self.text.endswith(parts[1])
        if not known or len(parts[0]) + len(parts[1]) > len(self.text):
            raise self._untraceable(index)
        return len(parts[0]), len(self.text) - len(parts[1])

    def _untraceable(self, index: int) -> RowError:
        where = f"turn {index + 1} ({self.messages[index].role})"
        return RowError("template", f"the chat template rewrites {where}, so its borders cannot be found")


def _render(
    template: Template,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    generation_prompt: bool = False,
) -> str:
    return template.render([_fields(turn) for turn in messages], tools, generation_prompt=generation_prompt)


def _fields(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        fields["tool_calls"] = list(message.tool_calls)
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields
