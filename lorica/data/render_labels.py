"""Rows to classify to token ids and a class.

A text is tokenised as the base saw texts: with its tokenizer's own start and separator tokens, two texts as its pair.
There is no chat template, and nothing is cut but by `max_length`. Where the class stands among the labels is described
in `layouts.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lorica.data.rows import Example, RowError
from lorica.data.tokenized import IGNORE, Int32
from lorica.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Beyond this share of the rows, with at least so many of them, a column of labels is one of answers.
_MOST_CLASSES, _ENOUGH_ROWS = 0.5, 20


class LabelRenderer:
    """Turns examples with a label into token ids and labels.

    labels: the classes by id; without them they are those of the first rows that are rendered, sorted. known: the
    base's own classes, which stand where they include those of the rows. too_long: as in `Renderer`.
    """

    template = None
    """The chat template to save beside a trained model: none."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: Sequence[str] = (),
        known: Sequence[str] = (),
        max_length: int = 1024,
        too_long: str = "drop",
    ) -> None:
        self.tokenizer, self.max_length, self.too_long = tokenizer, max_length, too_long
        self.labels, self._known = tuple(labels), tuple(known)

    def render_all(self, examples: Sequence[Example]) -> Iterator[tuple[Int32, Int32] | RowError]:
        """For each example (input_ids, labels), both [T] int32, or why it cannot be trained on."""
        if not self.labels:
            found = class_names(examples)
            self.labels = self._known if set(found) <= set(self._known) else found
        ids = {label: index for index, label in enumerate(self.labels)}
        for example, (tokens, border) in zip(examples, self.encode(examples), strict=True):
            if example.label not in ids:
                yield RowError("label", f"the label {example.label!r} is none of the training rows'")
            elif len(tokens) > self.max_length:
                yield RowError("too_long", f"{len(tokens)} tokens; data.max_length is {self.max_length}")
            elif len(tokens) == 0:
                yield RowError("empty", "the tokenizer makes nothing of the text")
            else:
                labels = np.full(len(tokens), IGNORE, np.int32)
                labels[border] = ids[example.label]
                yield tokens, labels

    def encode(self, examples: Sequence[Example]) -> Iterator[tuple[Int32, int]]:
        """For each example its token ids [T] int32, and the token that its class stands at."""
        cut = {"truncation": True, "max_length": self.max_length} if self.too_long == "truncate" else {}
        plain = {"return_token_type_ids": True, "return_attention_mask": False, "verbose": False}
        for example in examples:
            one = self.tokenizer(example.text, example.text_pair, **plain, **cut)
            tokens, types = np.array(one["input_ids"], np.int32), np.array(one["token_type_ids"])
            second = np.flatnonzero(types == 1)
            yield tokens, int(second[0]) if len(second) and second[-1] == len(tokens) - 1 else len(tokens) - 1


def class_names(examples: Sequence[Example]) -> tuple[str, ...]:
    """The labels of `examples`, sorted, whole numbers by their value.

    Raises:
        DataError: fewer than two, or so many that they are no classes.
    """
    found = {example.label for example in examples if example.label is not None}
    if len(found) < 2:
        which = f"all have the label {next(iter(found))!r}" if found else "have no label"
        raise DataError(f"The rows {which}; a classifier needs at least two classes.")
    if len(examples) >= _ENOUGH_ROWS and len(found) > _MOST_CLASSES * len(examples):
        raise DataError(
            f"{len(found):,} different labels in {len(examples):,} rows are no classes. If they are answers, say so: "
            "data.format=prompt_response and data.columns={prompt: text, response: label}."
        )
    if all(label.removeprefix("-").isdecimal() for label in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))
