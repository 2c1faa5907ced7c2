"""How samples become the batches of a run, by what the run is trained to do.

    packed    one row without padding, next-token targets; `padded` for models that cannot   causal
    classes   one row without padding, a class a sample; or padded rows, likewise            classification
    pairs     sources and targets, each padded on the right by itself                        seq2seq

A data set is the same flat arrays for all of them, so order, budget, fingerprint and resuming know nothing of tasks.
What a label means is agreed here and with the renderers:

    classes   one token of a sample is labelled, with its class: the first of the second text where the model is told
              which text a token belongs to (token type 1 from there on), else the last of all
    pairs     source tokens, not labelled, then target tokens, labelled with themselves

What it gives up: packing for encoder-decoders; samples of similar length share a batch instead. Pairs are budgeted by
their whole length, and a batch in which the longest source and the longest target are not of one sample is larger than
that, at most twice.

n: samples, T: tokens of the longest (source), T': of the longest target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from lorica.data.packing import ROUND_TO, Batch, pack, pad
from lorica.data.sampler import micro_batches
from lorica.data.tokenized import IGNORE, Int32, Int64, TokenizedDataset


@dataclass(frozen=True)
class Layout:
    """make: (data set, sample indices) to a batch. padded: padding counts as tokens, so lengths are sorted."""

    make: Callable[..., Batch]
    padded: bool

    def batches(self, dataset: TokenizedDataset, indices: Int64, max_tokens: int) -> list[Batch]:
        """The samples at `indices` in batches of at most `max_tokens` tokens; a longer sample goes alone."""
        return [self.make(dataset, part) for part in self.parts(dataset, indices, max_tokens)]

    def parts(self, dataset: TokenizedDataset, indices: Int64, max_tokens: int) -> list[Int64]:
        """The samples of each of these batches."""
        return micro_batches(indices, dataset.lengths, max_tokens, self.padded)

    def without_filler(self) -> Layout:
        """The same with nothing in a packed row but its samples."""
        return self if self.padded else replace(self, make=partial(self.make, multiple=1))


PACKED = Layout(partial(pack, multiple=ROUND_TO), padded=False)


def padded(pad_id: int) -> Layout:
    """Rows filled with `pad_id` on the right."""
    return Layout(partial(pad, pad_id=pad_id), padded=True)


def classes(pad_id: int, token_types: bool, start: int = 0, packing: bool = False) -> Layout:
    """A class a sample; with `token_types` the model is told where a second text begins. start: its first position."""
    if packing:
        return Layout(
            partial(packed_class_batch, token_types=token_types, start=start, multiple=ROUND_TO), padded=False
        )
    return Layout(partial(class_batch, pad_id=pad_id, token_types=token_types, start=start), padded=True)


def pairs(pad_id: int, start_id: int) -> Layout:
    """Sources, and targets that the decoder reads shifted by one behind `start_id`."""
    return Layout(partial(pair_batch, pad_id=pad_id, start_id=start_id), padded=True)


def class_batch(
    dataset: TokenizedDataset, indices: Sequence[int] | Int64, pad_id: int, token_types: bool, start: int = 0
) -> Batch:
    """Rows [n, T] and their classes [n]. Positions are the model's own business, unless a prefix moves them."""
    samples = _labelled(dataset, indices)
    input_ids, mask = _filled([sample.ids for sample in samples], pad_id)
    types, _ = _filled([sample.types for sample in samples], 0)
    positions = np.tile(np.arange(input_ids.shape[1]) + start + dataset.first_position, (len(samples), 1))
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.tensor([sample.label for sample in samples]),
        position_ids=torch.from_numpy(positions) if dataset.first_position else None,
        cu_seqlens=None,
        attention_mask=torch.from_numpy(mask),
        max_length=input_ids.shape[1],
        num_samples=len(samples),
        num_tokens=int(mask.sum()),
        num_targets=len(samples),
        token_type_ids=torch.from_numpy(types) if token_types else None,
    )


def packed_class_batch(
    dataset: TokenizedDataset, indices: Sequence[int] | Int64, token_types: bool, start: int = 0, multiple: int = 1
) -> Batch:
    """One row [1, T] of the samples, filled up to a `multiple` as `pack` does it, and their classes [n]."""
    row = pack(dataset, indices, multiple)
    samples = _labelled(dataset, indices)
    assert row.position_ids is not None
    types = np.concatenate([*(sample.types for sample in samples), np.zeros(row.input_ids.shape[1] - row.num_tokens)])
    return replace(
        row,
        targets=torch.tensor([sample.label for sample in samples]),
        position_ids=row.position_ids + start,
        num_targets=len(samples),
        token_type_ids=torch.from_numpy(types.astype(np.int64))[None] if token_types else None,
    )


@dataclass(frozen=True)
class _Labelled:
    """A sample, its class, and 0 or 1 for each token: which of its texts it belongs to."""

    ids: Int32
    label: int
    types: Int64


def _labelled(dataset: TokenizedDataset, indices: Sequence[int] | Int64) -> list[_Labelled]:
    found = []
    for ids, labels in (dataset[int(index)] for index in indices):
        at = int(np.flatnonzero(labels != IGNORE)[0])
        second = np.arange(len(ids)) >= (at if at < len(ids) - 1 else len(ids))
        found.append(_Labelled(ids, int(labels[at]), second.astype(np.int64)))
    return found


def pair_batch(dataset: TokenizedDataset, indices: Sequence[int] | Int64, pad_id: int, start_id: int) -> Batch:
    """Sources [n, T]; what the decoder reads and what it should say, both [n, T']."""
    samples = [dataset[int(index)] for index in indices]
    borders = [source_length(labels) for _, labels in samples]
    answers = [ids[border:] for (ids, _), border in zip(samples, borders, strict=True)]
    input_ids, mask = _filled([ids[:border] for (ids, _), border in zip(samples, borders, strict=True)], pad_id)
    targets, _ = _filled(answers, IGNORE)
    read, _ = _filled([np.concatenate([[start_id], answer[:-1]]) for answer in answers], pad_id)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        position_ids=None,
        cu_seqlens=None,
        attention_mask=torch.from_numpy(mask),
        max_length=max(input_ids.shape[1], targets.shape[1]),
        num_samples=len(samples),
        num_tokens=sum(len(ids) for ids, _ in samples),
        num_targets=sum(len(answer) for answer in answers),
        decoder_input_ids=torch.from_numpy(read),
    )


def source_length(labels: Sequence[int] | np.typing.NDArray[np.int32]) -> int:
    """Tokens of a pair's source."""
    return int((np.asarray(labels) == IGNORE).sum())


def _filled(rows: Sequence[np.typing.NDArray[np.integer]], filler: int) -> tuple[Int64, Int64]:
    """Rows [n, T] filled on the right, and 1 where a token is real."""
    lengths = np.array([len(row) for row in rows])
    real = np.arange(lengths.max()) < lengths[:, None]
    filled = np.full(real.shape, filler, np.int64)
    filled[real] = np.concatenate(rows)
    return filled, real.astype(np.int64)
