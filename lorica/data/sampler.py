"""The order of the samples: a pure function of seed and epoch, so one integer resumes a run.

An optimizer step holds as many whole samples as fit into `batch_tokens` tokens, in the epoch's random order; a sample
is never cut and never repeated within an epoch. For models that need padding, samples of similar length are put
together (a random window is sorted by length) and the padded size counts. Nothing is stored: `Order.batch(step)`
computes the epoch it lies in.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from lorica.data.tokenized import Int64, TokenizedDataset
from lorica.errors import DataError

# Sorting windows of this many batches by length leaves under 5 % padding on chat data, and the batches' order stays
# random.
WINDOW_BATCHES = 64


def epoch_batches(lengths: Int64, *, seed: int, epoch: int, batch_tokens: int, padded: bool = False) -> list[Int64]:
    """Sample indices of each optimizer step of one epoch.

    lengths: [n] tokens of every sample. Every sample appears exactly once. A step holds at most `batch_tokens` tokens
    (padding included when `padded`), except that a longer sample makes a step of its own. The result depends on
    nothing but the arguments.
    """
    assert batch_tokens > 0 and seed >= 0 and epoch >= 0
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths)).astype(np.int64)
    if not padded:
        return _fill(order, lengths, batch_tokens)
    window = max(1, round(WINDOW_BATCHES * batch_tokens / max(1.0, float(lengths.mean())))) if len(lengths) else 1
    batches: list[Int64] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        batches += _fill_padded(part[np.argsort(lengths[part], kind="stable")], lengths, batch_tokens)
    return [batches[index] for index in generator.permutation(len(batches))]


def micro_batches(indices: Int64, lengths: Int64, micro_batch_tokens: int, padded: bool = False) -> list[Int64]:
    """Cut one optimizer step into forward passes of at most `micro_batch_tokens` tokens, padding included if `padded`.

    indices: samples of the step. lengths: [n] tokens of every sample of the data set. Longer samples go alone.
    """
    indices = np.asarray(indices, np.int64)
    if not padded:
        return _fill(indices, lengths, micro_batch_tokens)
    return _fill_padded(indices[np.argsort(lengths[indices], kind="stable")], lengths, micro_batch_tokens)


def _fill(order: Int64, lengths: Int64, max_tokens: int) -> list[Int64]:
    ends = np.cumsum(lengths[order])
    batches, start, used = [], 0, 0
    while start < len(order):
        stop = max(start + 1, int(np.searchsorted(ends, used + max_tokens, side="right")))
        batches.append(order[start:stop])
        start, used = stop, int(ends[stop - 1])
    return batches


def _fill_padded(order: Int64, lengths: Int64, max_tokens: int) -> list[Int64]:
    """As `_fill`, the size being rows x longest row; `order` ascends in length, so the last row is the longest."""
    sizes = lengths[order].tolist()
    batches, start = [], 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or (stop + 1 - start) * sizes[stop] > max_tokens:
            batches.append(order[start:stop])
            start = stop
    return batches


class Order:
    """Every optimizer step of a run.

    lengths: [n] tokens of every sample. epochs may be fractional: 0.5 runs the first half of the first epoch's steps.
    max_steps ends the run earlier, never later. num_steps: optimizer steps of the run, at least 1.
    """

    def __init__(
        self,
        lengths: Int64,
        *,
        seed: int,
        batch_tokens: int,
        epochs: float,
        padded: bool = False,
        max_steps: int | None = None,
    ) -> None:
        assert len(lengths) > 0 and epochs > 0
        self._lengths, self._seed, self._batch_tokens, self._padded = lengths, seed, batch_tokens, padded
        self._cached: tuple[int, list[Int64]] = (-1, [])
        self._first_steps, self._sizes = [0], list[int]()
        while (left := epochs - len(self._sizes)) > 1e-9 and (max_steps is None or self._first_steps[-1] < max_steps):
            size = len(self._batches(len(self._sizes)))
            self._sizes.append(size)
            self._first_steps.append(self._first_steps[-1] + (size if left >= 1 else max(1, round(left * size))))
        self.num_steps = self._first_steps[-1] if max_steps is None else min(self._first_steps[-1], max_steps)

    def batch(self, step: int) -> Int64:
        """Sample indices of the optimizer step `step`, counted from 0 over the whole run."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        epoch = bisect_right(self._first_steps, step) - 1
        return self._batches(epoch)[step - self._first_steps[epoch]]

    def epoch(self, step: int) -> float:
        """Epochs completed before `step`; `epoch(num_steps)` is the run's end."""
        assert 0 <= step <= self.num_steps
        epoch = min(bisect_right(self._first_steps, step) - 1, len(self._sizes) - 1)
        return epoch + (step - self._first_steps[epoch]) / self._sizes[epoch]

    def _batches(self, epoch: int) -> list[Int64]:
        if self._cached[0] != epoch:
            batches = epoch_batches(
                self._lengths, seed=self._seed, epoch=epoch, batch_tokens=self._batch_tokens, padded=self._padded
            )
            self._cached = (epoch, batches)
        return self._cached[1]


def split_eval(dataset: TokenizedDataset, fraction: float, seed: int) -> tuple[Int64, Int64]:
    """Indices (train, evaluation) of a seeded split, both ascending and neither empty.

    About `fraction` of the samples go to the evaluation side. Samples with equal tokens stay on one side, so that an
    evaluation loss is never that of a row trained on. Raises DataError when there are not two different samples.
    """
    assert 0.0 < fraction < 1.0
    groups: dict[bytes, list[int]] = {}
    for index, key in enumerate(dataset.keys()):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        raise DataError(
            f"cannot hold out rows for evaluation: {len(dataset)} row(s), {len(groups)} different; at least 2 are "
            "needed. Add rows, name an evaluation file in data.eval, or turn evaluation off with data.eval=null."
        )
    wanted = max(1, round(fraction * len(dataset)))
    order = list(groups.values())
    held_out: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(order)):
        if len(held_out) + len(order[index]) <= min(wanted, len(dataset) - 1):
            held_out += order[index]
    smallest = min(order, key=lambda group: len(group))
    evaluation = np.array(sorted(held_out or smallest), np.int64)
    return np.setdiff1d(np.arange(len(dataset), dtype=np.int64), evaluation), evaluation
