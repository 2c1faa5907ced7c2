"""Conversations to a source and a target, for models that read one text and write another.

The source is all that precedes the last assistant turn, in the base's chat template where its tokenizer has one, else
the turns' texts joined by line breaks (a system turn first); the target is that turn. Both get what the tokenizer puts
around a text, and the target ends with the end token, so that the model learns to stop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lorica.data.rows import Example, Message, RowError
from lorica.data.spans import answer_text, learn_dialect, prompt_text, spoken
from lorica.data.template import choose_template
from lorica.data.tokenized import IGNORE, Int32
from lorica.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PairRenderer:
    """Turns examples into source and target ids behind one another; only the target's are labelled.

    max_length: most tokens of source and target together. too_long: longer rows are refused ("drop", "error"), or
    their source is cut at its end ("truncate").
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 1024,
        template: str = "auto",
        too_long: str = "drop",
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end token, so a model could not learn to stop. Set eos_token in the base's "
                "tokenizer_config.json."
            )
        self.tokenizer, self.max_length, self.too_long = tokenizer, max_length, too_long
        wanted = template != "auto" or tokenizer.chat_template is not None
        self._dialect = learn_dialect(choose_template(tokenizer, template), tokenizer) if wanted else None

    @property
    def template(self) -> str | None:
        """The chat template's source, to be saved beside a trained model."""
        return None if self._dialect is None else self._dialect.template.source

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return (self.tokenizer.eos_token_id,)

    def render_all(self, examples: Sequence[Example]) -> Iterator[tuple[Int32, Int32] | RowError]:
        """For each example (input_ids, labels), both [T] int32, or why it cannot be trained on."""
        for example in examples:
            try:
                yield self._render(example)
            except RowError as error:
                yield error

    def prompt_ids(self, example: Example) -> list[int]:
        """The source of an example. Raises RowError for a row that has none."""
        return self._source(example.messages[: _last_answer(example)], example)

    def chat_prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """A conversation so far as a source. Raises RowError when the template refuses it."""
        return self._source(messages, Example(tuple(messages), None, (), (), None, ""))

    def reference(self, example: Example) -> str:
        """The last assistant turn's text with its tool calls as JSON."""
        return answer_text(example.messages[_last_answer(example)])

    def _render(self, example: Example) -> tuple[Int32, Int32]:
        source = self.prompt_ids(example)
        target: list[int] = list(self.tokenizer(text_target=self.reference(example), verbose=False)["input_ids"])
        if target[-1:] != [self.tokenizer.eos_token_id]:
            target.append(self.tokenizer.eos_token_id)
        num_tokens = len(source) + len(target)
        room = self.max_length - len(target)
        if num_tokens > self.max_length:
            if self.too_long != "truncate":
                raise RowError("too_long", f"{num_tokens} tokens; data.max_length is {self.max_length}")
            if room < 1:
                raise RowError("too_long", f"no source is left of {num_tokens} tokens cut to {self.max_length}")
            # The last token ends the source.
            source = source[: room - 1] + source[-1:]
        labels = [IGNORE] * len(source) + target
        return np.array(source + target, np.int32), np.array(labels, np.int32)

    def _source(self, messages: Sequence[Message], example: Example) -> list[int]:
        if self._dialect is not None:
            turns, tools = spoken(Example(tuple(messages), None, example.tools, (), None, ""), self._dialect)
            text = prompt_text(turns, tools, self._dialect)
        elif example.tools:
            raise RowError("tools", "tools need a chat template, and the base's tokenizer has none")
        else:
            text = "\n".join(answer_text(message) for message in messages)
        # A template writes its own special tokens.
        ids: list[int] = list(
            self.tokenizer(text, add_special_tokens=self._dialect is None, verbose=False)["input_ids"]
        )
        if not ids:
            raise RowError("empty", "the tokenizer makes nothing of the prompt")
        return ids


def _last_answer(example: Example) -> int:
    answers = [index for index, message in enumerate(example.messages) if message.role == "assistant"]
    if not answers:
        raise RowError("text", "plain text has no answer to write; rows of prompt and response are wanted")
    if answers[-1] == 0:
        raise RowError("empty", "nothing precedes the answer")
    return answers[-1]
