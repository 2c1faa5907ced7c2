"""Examples to tokens and labels.

A conversation is rendered whole by the chat template and cut where answers begin and end; the pieces are tokenised.
So a prompt has the same tokens in training as in generation, where nothing follows it: "\\n\\n" before a word may be
two tokens, at the end of a prompt it is one. Tokenizers that cannot take a text in pieces tokenise it whole, and
their offsets tell which tokens are trained. Exactly one start token where the tokenizer adds one, and the end token
is always learned, also when it doubles as the padding token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from lorica.data.rows import Example, Message, RowError, RowFault, list_faults, refuse
from lorica.data.sources import load_examples
from lorica.data.spans import Layout, answer_text, lay_out, learn_dialect, prompt_text, spoken
from lorica.data.template import choose_template
from lorica.data.tokenized import IGNORE, Int32, TokenizedDataset, TokenizedExample
from lorica.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prepared", "Renderer", "RowError", "TokenizedDataset", "TokenizedExample", "build_dataset", "load_dataset"]

# Rows tokenised in one call: enough to hide the call's overhead, few enough to keep memory flat.
CHUNK = 512

PLAIN_TOKENS = {
    "add_special_tokens": False,
    "return_attention_mask": False,
    "return_token_type_ids": False,
    "verbose": False,
}

Mask = npt.NDArray[np.bool_]
Sample = tuple[Int32, Int32]


class RowRenderer(Protocol):
    """What turns rows into samples: conversations below, classes in `render_labels`, pairs in `render_pairs`."""

    too_long: str

    def render_all(self, examples: Sequence[Example]) -> Iterator[Sample | RowError]:
        """For each example (input_ids, labels), both [T] int32, or why it cannot be trained on."""


class Renderer:
    """Turns examples into token ids and labels for one tokenizer.

    loss_on: "response" (the last assistant turn), "assistant" (all of them) or "all" (every token); plain text is
    trained whole. A turn's own loss weight overrides the first two. too_long: rows of more than `max_length` tokens
    are refused ("drop", "error") or keep their beginning ("truncate").
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        loss_on: str = "response",
        max_length: int = 1024,
        template: str = "auto",
        too_long: str = "drop",
    ) -> None:
        assert loss_on in ("response", "assistant", "all") and too_long in ("drop", "truncate", "error")
        self.tokenizer, self.loss_on, self.max_length, self.too_long = tokenizer, loss_on, max_length, too_long
        self.dialect = learn_dialect(choose_template(tokenizer, template), tokenizer)
        probe: list[int] = tokenizer("a").input_ids
        self._bos: int | None = tokenizer.bos_token_id
        self._adds_bos = self._bos is not None and probe[:1] == [self._bos]
        # Tokenizers that begin every text with a blank of their own (SentencePiece) cannot take a text in pieces.
        self._cuts = not tokenizer.is_fast or _context_free(tokenizer)

    @property
    def template(self) -> str:
        """The chat template's source, to be saved beside a trained model."""
        return self.dialect.template.source

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the tokenizer's end token and the template's end of turn."""
        ids = {self.tokenizer.eos_token_id}
        if self.dialect.stop is not None:
            ids.add(self.tokenizer.convert_tokens_to_ids(self.dialect.stop))
        return tuple(sorted(token for token in ids if token is not None))

    def render(self, example: Example) -> TokenizedExample:
        """Tokens and labels of one example. Raises RowError for a row that cannot be trained on."""
        (sample,) = self.render_all([example])
        if isinstance(sample, RowError):
            raise sample
        return TokenizedExample(sample[0].tolist(), sample[1].tolist())

    def render_all(self, examples: Sequence[Example]) -> Iterator[Sample | RowError]:
        """For each example (input_ids, labels), both [T] int32, or why it cannot be trained on."""
        for start in range(0, len(examples), CHUNK):
            layouts = [self._lay_out(example) for example in examples[start : start + CHUNK]]
            encoded = self._encode([layout for layout in layouts if isinstance(layout, Layout)])
            for layout in layouts:
                yield layout if isinstance(layout, RowError) else self._finish(*next(encoded), layout.needs_end)

    def prompt_ids(self, example: Example) -> list[int]:
        """All that precedes the last assistant turn, generation prompt included. Raises RowError for plain text."""
        messages, tools = spoken(example, self.dialect)
        turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
        if not turns:
            raise RowError("text", "plain text has no prompt to answer")
        layout = lay_out(messages, tools, self.dialect, turns if self.loss_on == "assistant" else turns[-1:])
        return self._ids(layout.text[: layout.spans[-1][0]], layout.cuts)

    def chat_prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation so far and the generation prompt. Raises RowError when the template refuses it."""
        turns, tools = spoken(Example(tuple(messages), None, (), (), None, ""), self.dialect)
        text = prompt_text(turns, tools, self.dialect)
        answers = [index for index, turn in enumerate(turns) if turn.role == "assistant"]
        if self.loss_on != "assistant" or not answers:
            return self._ids(text)
        history = lay_out(turns, tools, self.dialect, answers)
        return self._ids(text, history.cuts if text.startswith(history.text) else ())

    def reference(self, example: Example) -> str:
        """The last assistant turn's text with its tool calls as JSON; plain text itself."""
        answers = [message for message in example.messages if message.role == "assistant"]
        return answer_text(answers[-1]) if answers else example.text or ""

    def _lay_out(self, example: Example) -> Layout | RowError:
        if example.text is not None:
            return Layout(example.text, ((0, len(example.text)),), self.tokenizer.eos_token_id is not None)
        try:
            messages, tools = spoken(example, self.dialect)
            layout = lay_out(messages, tools, self.dialect, self._wanted(messages))
        except RowError as error:
            return error
        if self.loss_on != "all":
            return layout
        return replace(layout, spans=((0, len(layout.text)),))

    def _wanted(self, messages: Sequence[Message]) -> list[int]:
        assistant = [index for index, message in enumerate(messages) if message.role == "assistant"]
        chosen = assistant if self.loss_on == "assistant" else assistant[-1:]
        if self.loss_on != "all":
            chosen = [
                index
                for index, message in enumerate(messages)
                if (index in chosen if message.train is None else message.train)
            ]
        if not chosen:
            raise RowError("untrained", "no turn is trained: every loss weight is 0")
        return chosen

    def _encode(self, layouts: Sequence[Layout]) -> Iterator[tuple[Int32, Mask]]:
        """Token ids and which of them are trained, for each layout."""
        if not layouts:
            return
        if self._cuts:
            borders = [_borders(layout.text, layout.cuts) for layout in layouts]
            texts = [
                layout.text[i:j] for layout, places in zip(layouts, borders, strict=True) for i, j in pairwise(places)
            ]
            pieces = iter(self.tokenizer(texts, **PLAIN_TOKENS).input_ids if texts else [])
            for layout, places in zip(layouts, borders, strict=True):
                yield _joined([(start, next(pieces)) for start, _ in pairwise(places)], layout)
            return
        batch = self.tokenizer([layout.text for layout in layouts], return_offsets_mapping=True, **PLAIN_TOKENS)
        for layout, ids, pairs in zip(layouts, batch["input_ids"], batch["offset_mapping"], strict=True):
            offsets = np.array(pairs, np.int64).reshape(-1, 2)
            trained = np.zeros(len(ids), bool)
            for start, end in layout.spans:
                trained |= (offsets[:, 0] < end) & (offsets[:, 1] > start)
            yield np.array(ids, np.int32), trained

    def _finish(self, ids: Int32, trained: Mask, needs_end: bool) -> Sample | RowError:
        """Start and end tokens, the length limit, and labels."""
        if needs_end:
            if self.tokenizer.eos_token_id is None:
                raise ConfigError(
                    "the tokenizer has no end token and the chat template writes none, so a model could not learn to "
                    "stop. Set eos_token in the base's tokenizer_config.json, or choose another data.template."
                )
            ids, trained = np.append(ids, np.int32(self.tokenizer.eos_token_id)), np.append(trained, True)
        first = self._surplus_bos(ids)
        ids, trained = ids[first:], trained[first:]
        if self._adds_bos and self._bos is not None and ids[:1].tolist() != [self._bos]:
            ids, trained = np.insert(ids, 0, self._bos), np.insert(trained, 0, False)
        num_tokens = len(ids)
        if num_tokens > self.max_length:
            if self.too_long != "truncate":
                return RowError("too_long", f"{num_tokens} tokens; data.max_length is {self.max_length}")
            ids, trained = ids[: self.max_length], trained[: self.max_length]
        # Nothing precedes the first token, so it is never a target.
        trained[:1] = False
        if not trained.any():
            if num_tokens > self.max_length:
                return RowError("too_long", f"no answer is left of {num_tokens} tokens cut to {self.max_length}")
            return RowError("untrained", "no token to train on")
        return ids, np.where(trained, ids, np.int32(IGNORE))

    def _surplus_bos(self, ids: Int32) -> int:
        """How many start tokens there are too many: a template may write one and a row another."""
        count = 0
        while self._bos is not None and count + 1 < len(ids) and ids[count] == ids[count + 1] == self._bos:
            count += 1
        return count

    def _ids(self, text: str, cuts: Sequence[int] = ()) -> list[int]:
        pieces = [text[start:end] for start, end in pairwise(_borders(text, cuts if self._cuts else ()))]
        ids = [token for piece in pieces for token in self.tokenizer(piece, **PLAIN_TOKENS).input_ids]
        ids = ids[self._surplus_bos(np.array(ids, np.int32)) :]
        return [self._bos, *ids] if self._adds_bos and self._bos is not None and ids[:1] != [self._bos] else ids


def _context_free(tokenizer: PreTrainedTokenizerBase) -> bool:
    first, second, whole = (tokenizer(text, **PLAIN_TOKENS).input_ids for text in ("a\n", "b", "a\nb"))
    return bool(first + second == whole)


def _borders(text: str, cuts: Sequence[int]) -> list[int]:
    """Where the pieces of `text` begin and end."""
    return sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})


def _joined(pieces: Sequence[tuple[int, Sequence[int]]], layout: Layout) -> tuple[Int32, Mask]:
    """Ids of pieces (their start in the text, their ids) behind one another, and which of them lie in a span."""
    sizes = [len(ids) for _, ids in pieces]
    inside = [any(left <= start < right for left, right in layout.spans) for start, _ in pieces]
    ids = np.array([token for _, ids in pieces for token in ids], np.int32)
    return ids, np.repeat(np.array(inside, bool), sizes)


@dataclass(frozen=True)
class Prepared:
    """A source, ready to train on. examples[i] became sample i. faults: rows left out. num_rows: rows of the source."""

    dataset: TokenizedDataset
    examples: list[Example]
    faults: list[RowFault]
    format: str
    columns: dict[str, str]
    unused: tuple[str, ...]
    num_rows: int


def build_dataset(examples: Sequence[Example], renderer: RowRenderer) -> tuple[TokenizedDataset, list[RowFault]]:
    """Tokenise `examples`; rows that cannot be trained on are left out and named.

    Raises DataError when no row is left, and for rows that are too long under too_long="error".
    """
    dataset, _, faults = _build(examples, renderer)
    return dataset, faults


def load_dataset(
    source: str | Path,
    renderer: RowRenderer,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    split: str | None = None,
    on_bad_row: str = "error",
    check_format: Callable[[str], None] | None = None,
) -> Prepared:
    """Read and tokenise `source`.

    on_bad_row: "error" raises DataError listing every row that cannot be used (rows dropped for their length are no
    error), "drop" leaves them out. check_format: refuses, with a DataError, a format that the renderer is not for.
    Raises DataError too when nothing is left.
    """
    loaded = load_examples(source, format=format, columns=columns, split=split)
    if check_format is not None:
        check_format(loaded.format)
    if not loaded.examples:
        refuse(loaded.faults, loaded.num_rows, "error")
    dataset, kept, faults = _build(loaded.examples, renderer, loaded.faults, on_bad_row)
    return Prepared(dataset, kept, faults, loaded.format, loaded.columns, loaded.unused, loaded.num_rows)


def _build(
    examples: Sequence[Example], renderer: RowRenderer, earlier: Sequence[RowFault] = (), policy: str = "drop"
) -> tuple[TokenizedDataset, list[Example], list[RowFault]]:
    samples: list[Sample] = []
    kept: list[Example] = []
    faults = list(earlier)
    for example, sample in zip(examples, renderer.render_all(examples), strict=True):
        if isinstance(sample, RowError):
            faults.append(sample.at(example.origin))
        else:
            samples.append(sample)
            kept.append(example)
    num_rows = len(examples) + len(earlier)
    refuse([fault for fault in faults if fault.rule != "too_long"], num_rows, policy)
    too_long = [fault for fault in faults if fault.rule == "too_long"]
    if too_long and renderer.too_long == "error":
        raise DataError(
            f"{len(too_long)} of {num_rows} rows are too long:\n{list_faults(too_long)}\n"
            "Raise data.max_length, or set data.too_long to drop or truncate."
        )
    if not samples:
        rules = ", ".join(f"{count} {rule}" for rule, count in Counter(fault.rule for fault in faults).items())
        raise DataError(f"no row is left to train on: of {num_rows} rows {rules or 'none'}:\n{list_faults(faults)}")
    return TokenizedDataset.from_samples(samples), kept, faults
