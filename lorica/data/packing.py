"""Samples to batches: packed into one row without padding, or padded on the right.

A packed batch is one row [1, T] in which `cu_seqlens` says where samples begin and `position_ids` restart; attention
that reads `cu_seqlens` cannot cross from one sample to the next, so nothing is spent on padding. A padded batch [B,
T] is for models whose attention does not read it. Targets are shifted inside each sample here, once: the loss never
predicts a sample's first token from its neighbour's last.

B: rows, T: tokens in a row, n: samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lorica.data.tokenized import IGNORE, Int64, TokenizedDataset

ROUND_TO = 64
"""What training and evaluation round packed batches up to: 1.6 % of a batch of 4,096 tokens at most."""

_ON_DEVICE = ("input_ids", "position_ids", "attention_mask", "token_type_ids", "decoder_input_ids")


@dataclass(frozen=True)
class Batch:
    """What one forward pass reads.

    input_ids, targets, position_ids: [B, T] int64. `targets[b, t]` is the token to predict at t, -100 where none is.
    Packed: `cu_seqlens` [n + 1] int32 and B = 1. Padded: `attention_mask` [B, T] int64 (1 = real) and B = n.
    Other tasks' batches are padded (`layouts.py`): targets are classes [B], or [B, T'] beside `decoder_input_ids`.
    max_length: tokens of the longest sample. num_tokens: real tokens. num_targets: targets that are not -100.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor | None
    cu_seqlens: Tensor | None
    attention_mask: Tensor | None
    max_length: int
    num_samples: int
    num_tokens: int
    num_targets: int
    token_type_ids: Tensor | None = None
    decoder_input_ids: Tensor | None = None

    def model_inputs(self) -> dict[str, Tensor | int]:
        """Keyword arguments for the model's forward, by transformers' names."""
        inputs: dict[str, Tensor | int] = {
            name: tensor for name in _ON_DEVICE if (tensor := getattr(self, name)) is not None
        }
        if self.cu_seqlens is not None:
            inputs |= {"cu_seq_lens_q": self.cu_seqlens, "cu_seq_lens_k": self.cu_seqlens}
            inputs |= {"max_length_q": self.max_length, "max_length_k": self.max_length}
        return inputs

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with what the model computes on moved to `device`; targets and borders are read on the CPU."""
        moved = {
            name: tensor.to(device, non_blocking=True)
            for name in _ON_DEVICE
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)


def pack(dataset: TokenizedDataset, indices: Sequence[int] | Int64, multiple: int = 1) -> Batch:
    """One row [1, T] that holds the samples at `indices` behind one another, T being their summed length.

    T is rounded up to a multiple of `multiple` by a filler, a sample of its own that nothing is learned from and that
    counts nowhere. Kernels are built and kept by shape: a few shapes cost less than a few tokens.
    """
    input_ids, targets, position_ids, offsets = _flat(dataset, indices)
    num_samples, num_tokens, max_length = len(offsets) - 1, len(input_ids), int(np.diff(offsets).max())
    if filler := -num_tokens % multiple:
        input_ids = np.concatenate([input_ids, np.zeros(filler, np.int64)])
        targets = np.concatenate([targets, np.full(filler, IGNORE, np.int64)])
        # All at position 0: the filler may be longer than the model's context.
        position_ids = np.concatenate([position_ids, np.zeros(filler, np.int64)])
        offsets = np.append(offsets, len(input_ids))
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        targets=torch.from_numpy(targets)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        attention_mask=None,
        max_length=max(max_length, filler),
        num_samples=num_samples,
        num_tokens=num_tokens,
        num_targets=int((targets != IGNORE).sum()),
    )


def pad(dataset: TokenizedDataset, indices: Sequence[int] | Int64, pad_id: int) -> Batch:
    """Rows [n, T] of the samples at `indices`, filled with `pad_id` on the right to the longest, T."""
    flat_ids, flat_targets, flat_positions, offsets = _flat(dataset, indices)
    lengths = np.diff(offsets)
    shape = (len(lengths), int(lengths.max()))
    real = np.arange(shape[1]) < lengths[:, None]
    input_ids, targets = np.full(shape, pad_id, np.int64), np.full(shape, IGNORE, np.int64)
    position_ids = np.zeros(shape, np.int64)
    input_ids[real], targets[real], position_ids[real] = flat_ids, flat_targets, flat_positions
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        targets=torch.from_numpy(targets),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=None,
        attention_mask=torch.from_numpy(real.astype(np.int64)),
        max_length=shape[1],
        num_samples=shape[0],
        num_tokens=len(flat_ids),
        num_targets=int((flat_targets != IGNORE).sum()),
    )


def _flat(dataset: TokenizedDataset, indices: Sequence[int] | Int64) -> tuple[Int64, Int64, Int64, Int64]:
    """(input_ids, shifted targets, position_ids), each [T] int64, and the samples' offsets [n + 1]."""
    indices = np.asarray(indices, np.int64)
    assert len(indices) > 0, "a batch needs at least one sample"
    flat, offsets = dataset.gather(indices)
    lengths = np.diff(offsets)
    assert lengths.min() > 0, "a sample of a batch is never empty"
    targets = np.full(len(flat), IGNORE, np.int64)
    targets[:-1] = dataset.labels[flat[1:]]
    targets[offsets[1:] - 1] = IGNORE
    position_ids = np.arange(len(flat), dtype=np.int64) - np.repeat(offsets[:-1], lengths) + dataset.first_position
    return dataset.input_ids[flat].astype(np.int64), targets, position_ids, offsets
