"""Tokenised rows, flat: two int32 arrays and the offsets of the samples in them.

Flat arrays make packing one gather, keep a million rows out of Python's object heap and give a fingerprint in one
pass. They give up cheap appending: a data set is built once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

IGNORE = -100
"""The label of a token that is not trained, as in torch's cross entropy."""


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One sample: `labels[t]` is `input_ids[t]` where the token is trained and -100 elsewhere (not shifted)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TokenizedDataset:
    """Samples behind one another.

    input_ids [tokens] int32, labels [tokens] int32 (not shifted, -100 = not trained), offsets [n + 1] int64: sample i
    is `input_ids[offsets[i]:offsets[i + 1]]`. first_position: that of each sample's first token.
    """

    input_ids: Int32
    labels: Int32
    offsets: Int64
    first_position: int = 0

    @classmethod
    def from_samples(cls, samples: Sequence[tuple[Sequence[int] | Int32, Sequence[int] | Int32]]) -> TokenizedDataset:
        """Concatenate (input_ids, labels) pairs in their order."""
        lengths = [len(input_ids) for input_ids, _ in samples]
        assert lengths == [len(labels) for _, labels in samples]
        nothing = np.zeros(0, np.int32)
        return cls(
            np.concatenate([nothing, *(np.asarray(input_ids, np.int32) for input_ids, _ in samples)]),
            np.concatenate([nothing, *(np.asarray(labels, np.int32) for _, labels in samples)]),
            np.cumsum([0, *lengths], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[Int32, Int32]:
        """Sample `index` as (input_ids, labels), both views of the flat arrays."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.input_ids[part], self.labels[part]

    @property
    def lengths(self) -> Int64:
        """Tokens of each sample, [n] int64."""
        return np.diff(self.offsets)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens that are a target; the first token of a sample is never one, since nothing precedes it."""
        trained = self.labels != IGNORE
        starts = self.offsets[:-1][self.lengths > 0]
        return int(trained.sum() - trained[starts].sum())

    def subset(self, indices: Sequence[int] | Int64) -> TokenizedDataset:
        """A new data set of the samples at `indices`, in that order."""
        indices = np.asarray(indices, np.int64)
        flat, offsets = self.gather(indices)
        return TokenizedDataset(self.input_ids[flat], self.labels[flat], offsets, self.first_position)

    def behind(self, ids: Sequence[int], first_position: int = 0) -> TokenizedDataset:
        """A new data set of the same samples, each behind `ids`, which are not trained."""
        if not ids:
            return replace(self, first_position=first_position)
        starts = np.repeat(self.offsets[:-1], len(ids))
        return TokenizedDataset(
            np.insert(self.input_ids, starts, np.tile(np.array(ids, np.int32), len(self))),
            np.insert(self.labels, starts, IGNORE),
            self.offsets + len(ids) * np.arange(len(self.offsets)),
            first_position,
        )

    def gather(self, indices: Int64) -> tuple[Int64, Int64]:
        """Positions in the flat arrays of the samples at `indices`, and the samples' offsets among these positions."""
        lengths = self.lengths[indices]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        shifts = np.repeat(self.offsets[:-1][indices] - offsets[:-1], lengths)
        return np.arange(offsets[-1], dtype=np.int64) + shifts, offsets

    def keys(self) -> list[bytes]:
        """One digest of its tokens for each sample: equal tokens, equal key."""
        return [hashlib.blake2b(self[index][0].tobytes(), digest_size=16).digest() for index in range(len(self))]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of tokens, labels and sample borders: what a resumed run compares."""
        digest = hashlib.sha256()
        for array, kind in ((self.offsets, "<i8"), (self.input_ids, "<i4"), (self.labels, "<i4")):
            digest.update(np.ascontiguousarray(array, dtype=kind).data)
        return digest.hexdigest()
