"""What a data set holds, before anything is trained on it: faults, duplicates, overlap, lengths, trained share.

Nothing here changes data or prints; `lorica data check` and `lorica data preview` show what is returned. Duplicates
are exact: rows that are merely alike are not looked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from lorica.data.render import Prepared
from lorica.data.rows import Example, RowFault
from lorica.data.sampler import epoch_batches
from lorica.data.tokenized import IGNORE, Int32

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 10


@dataclass(frozen=True, slots=True)
class Overlap:
    """Rows of the evaluation side that the training side holds too.

    num_exact: prompt and answer are equal. num_prompts: at least the prompt is. num_eval: rows of the evaluation side.
    examples: the first of them as (evaluation origin, training origin), those that are equal before the others.
    """

    num_exact: int
    num_prompts: int
    num_eval: int
    examples: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What `check` found. Lengths are in tokens; percentiles are over samples.

    num_rows = num_samples + the faults. duplicates: the first repeated rows as (origin, origin of its first
    appearance). num_steps: optimizer steps of one epoch at `batch_tokens`. longest: (origin, tokens), the longest
    first. num_rows_by_label: of rows to classify, the most common class first.
    """

    format: str
    columns: dict[str, str]
    unused_columns: tuple[str, ...]
    num_rows: int
    num_samples: int
    faults: tuple[RowFault, ...]
    num_faults_by_rule: dict[str, int]
    num_duplicates: int
    duplicates: tuple[tuple[str, str], ...]
    overlap: Overlap | None
    num_tokens: int
    num_trained_tokens: int
    trained_share: float
    length_percentiles: dict[str, int]
    batch_tokens: int
    num_steps: int
    longest: tuple[tuple[str, int], ...]
    num_rows_by_label: dict[str, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of neighbouring tokens, as text, that are all trained or all not."""

    text: str
    trained: bool
    num_tokens: int


def check(
    train: Prepared, evaluation: Prepared | None = None, *, batch_tokens: int, padded: bool = False
) -> CheckReport:
    """Look at a prepared source, and at its overlap with the evaluation source if one is given."""
    dataset, lengths = train.dataset, train.dataset.lengths
    origins = [example.origin for example in train.examples]
    duplicates = _duplicates(dataset.keys(), origins)
    num_tokens = len(dataset.input_ids)
    percentiles = np.percentile(lengths, [50, 90, 99, 100], method="inverted_cdf")
    longest = np.argsort(-lengths, kind="stable")[:SHOWN].tolist()
    return CheckReport(
        format=train.format,
        columns=train.columns,
        unused_columns=train.unused,
        num_rows=train.num_rows,
        num_samples=len(dataset),
        faults=tuple(train.faults),
        num_faults_by_rule=dict(Counter(fault.rule for fault in train.faults).most_common()),
        num_duplicates=len(duplicates),
        duplicates=tuple(duplicates[:SHOWN]),
        overlap=overlap(train.examples, evaluation.examples) if evaluation is not None else None,
        num_tokens=num_tokens,
        num_trained_tokens=dataset.num_trained_tokens,
        trained_share=dataset.num_trained_tokens / num_tokens,
        length_percentiles={
            name: int(value) for name, value in zip(("p50", "p90", "p99", "max"), percentiles, strict=True)
        },
        batch_tokens=batch_tokens,
        num_steps=len(epoch_batches(lengths, seed=0, epoch=0, batch_tokens=batch_tokens, padded=padded)),
        longest=tuple((origins[index], int(lengths[index])) for index in longest),
        num_rows_by_label=dict(Counter(e.label for e in train.examples if e.label is not None).most_common()),
    )


def overlap(train: Sequence[Example], evaluation: Sequence[Example]) -> Overlap:
    """Rows of `evaluation` whose prompt and answer, or prompt alone, stand in `train` (but for outer white space)."""
    exact: dict[object, str] = {}
    prompts: dict[object, str] = {}
    for example in train:
        prompt, answer = _prompt_and_answer(example)
        exact.setdefault((prompt, answer), example.origin)
        prompts.setdefault(prompt, example.origin)
    equal, alike = [], []
    for example in evaluation:
        prompt, answer = _prompt_and_answer(example)
        if (prompt, answer) in exact:
            equal.append((example.origin, exact[prompt, answer]))
        elif prompt in prompts:
            alike.append((example.origin, prompts[prompt]))
    pairs = equal + alike
    return Overlap(len(equal), len(pairs), len(evaluation), tuple(pairs[:SHOWN]))


def preview(sample: tuple[Int32, Int32], tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """A sample (input_ids, labels) as text, cut where labels begin and end: the mask shown is the one trained on."""
    input_ids, labels = sample
    segments: list[Segment] = []
    start, shown = 0, ""
    for trained, run in groupby((labels != IGNORE).tolist()):
        stop = start + len(list(run))
        # Decoding from the beginning keeps white space that tokenizers drop at the start of a text.
        whole = _decode(tokenizer, input_ids[:stop])
        text = whole[len(shown) :] if whole.startswith(shown) else _decode(tokenizer, input_ids[start:stop])
        segments.append(Segment(text, trained, stop - start))
        start, shown = stop, whole
    return segments


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Int32) -> str:
    text: str = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _duplicates(keys: Sequence[bytes], origins: Sequence[str]) -> list[tuple[str, str]]:
    first: dict[bytes, str] = {}
    repeated = []
    for key, origin in zip(keys, origins, strict=True):
        if key in first:
            repeated.append((origin, first[key]))
        first.setdefault(key, origin)
    return repeated


def _prompt_and_answer(example: Example) -> tuple[object, str]:
    """What precedes the last assistant turn, and that turn; texts, and their class. Plain text is all prompt, so equal
    texts count as both.
    """
    if example.text is not None:
        return (example.text.strip(), (example.text_pair or "").strip()), example.label or ""
    last = max(index for index, message in enumerate(example.messages) if message.role == "assistant")
    prompt = tuple((message.role, message.content.strip()) for message in example.messages[:last])
    answer = example.messages[last]
    calls = [str(call["function"]) for call in answer.tool_calls]
    return prompt, "\n".join([answer.content.strip(), *calls])
