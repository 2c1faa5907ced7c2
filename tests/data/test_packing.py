"""Packed and padded batches against a per-sample loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from lorica.data.packing import Batch, pack, pad
from lorica.data.tokenized import TokenizedDataset

SAMPLES = [
    ([5, 6, 7, 8], [-100, -100, 7, 8]),
    ([9], [-100]),
    ([1, 2, 3], [-100, 2, -100]),
    ([4, 4], [-100, 4]),
]


@pytest.fixture
def dataset() -> TokenizedDataset:
    return TokenizedDataset.from_samples(SAMPLES)


def shifted(labels: list[int]) -> list[int]:
    """What a causal model predicts at t: the label of t + 1 within the sample."""
    return [*labels[1:], -100]


@pytest.mark.parametrize("indices", [[0], [1], [2, 0], [3, 1, 0, 2], [0, 1, 2, 3]])
def test_pack_is_the_samples_behind_one_another(dataset: TokenizedDataset, indices: list[int]) -> None:
    batch = pack(dataset, indices)
    ids = [token for index in indices for token in SAMPLES[index][0]]
    targets = [label for index in indices for label in shifted(SAMPLES[index][1])]
    positions = [position for index in indices for position in range(len(SAMPLES[index][0]))]
    assert batch.input_ids.tolist() == [ids]
    assert batch.targets.tolist() == [targets]
    assert batch.position_ids.tolist() == [positions]
    lengths = [len(SAMPLES[index][0]) for index in indices]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.tolist() == [0, *np.cumsum(lengths).tolist()]
    assert batch.max_length == max(lengths)
    assert (batch.num_samples, batch.num_tokens) == (len(indices), len(ids))
    assert batch.num_targets == sum(target != -100 for target in targets)


@pytest.mark.parametrize("indices", [[1], [2, 0], [3, 1, 0, 2]])
def test_pad_fills_on_the_right(dataset: TokenizedDataset, indices: list[int]) -> None:
    batch = pad(dataset, indices, pad_id=77)
    width = max(len(SAMPLES[index][0]) for index in indices)
    for row, index in enumerate(indices):
        ids, labels = SAMPLES[index]
        empty = width - len(ids)
        assert batch.input_ids[row].tolist() == ids + [77] * empty
        assert batch.targets[row].tolist() == shifted(labels) + [-100] * empty
        assert batch.position_ids[row, : len(ids)].tolist() == list(range(len(ids)))
        assert batch.attention_mask is not None
        assert batch.attention_mask[row].tolist() == [1] * len(ids) + [0] * empty
    assert batch.num_tokens == sum(len(SAMPLES[index][0]) for index in indices)
    assert batch.num_targets == pack(dataset, indices).num_targets


def test_a_sample_never_predicts_its_neighbours_first_token(dataset: TokenizedDataset) -> None:
    trained = TokenizedDataset.from_samples([(ids, ids) for ids, _ in SAMPLES])
    batch = pack(trained, [0, 2, 3])
    assert batch.cu_seqlens is not None
    assert (batch.targets[0, batch.cu_seqlens[1:].long() - 1] == -100).all()


def test_types_and_names_for_the_model(dataset: TokenizedDataset) -> None:
    packed, padded = pack(dataset, [0, 2]), pad(dataset, [0, 2], 0)
    for batch in (packed, padded):
        assert {batch.input_ids.dtype, batch.targets.dtype, batch.position_ids.dtype} == {torch.int64}
    inputs = packed.model_inputs()
    assert set(inputs) == {
        "input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"
    }  # fmt: skip
    assert packed.cu_seqlens is not None and packed.cu_seqlens.dtype == torch.int32
    assert inputs["max_length_q"] == 4
    assert set(padded.model_inputs()) == {"input_ids", "position_ids", "attention_mask"}


def test_to_moves_what_the_model_computes_on(dataset: TokenizedDataset) -> None:
    for batch in (pack(dataset, [0]), pad(dataset, [0], 0)):
        moved = batch.to("meta")
        assert isinstance(moved, Batch) and moved.num_tokens == 4
        devices = {name: t.device.type for name, t in vars(moved).items() if isinstance(t, torch.Tensor)}
        read_on_the_cpu = {"targets", "cu_seqlens"}
        assert all(device == ("cpu" if name in read_on_the_cpu else "meta") for name, device in devices.items())
        assert len(devices) == 4


@pytest.mark.parametrize("indices", [[0], [0, 2], [3, 1, 0]])
def test_rounding_up_adds_a_sample_that_counts_nowhere(dataset: TokenizedDataset, indices: list[int]) -> None:
    plain, rounded = pack(dataset, indices), pack(dataset, indices, 64)
    num_tokens = plain.num_tokens
    assert rounded.input_ids.shape == (1, 64) and rounded.cu_seqlens is not None and plain.cu_seqlens is not None
    assert rounded.cu_seqlens.tolist() == [*plain.cu_seqlens.tolist(), 64]
    # Counted on, they would leave the context of a model with fewer than 64 positions.
    assert not rounded.position_ids[0, num_tokens:].any()
    assert (rounded.targets[0, num_tokens:] == -100).all()
    for name in ("input_ids", "targets", "position_ids"):
        assert torch.equal(getattr(rounded, name)[:, :num_tokens], getattr(plain, name))
    assert (rounded.num_samples, rounded.num_tokens, rounded.num_targets) == (
        len(indices),
        num_tokens,
        plain.num_targets,
    )
    assert torch.equal(pack(dataset, indices, num_tokens).input_ids, plain.input_ids)


def test_dataset_counts_targets_as_batches_do(dataset: TokenizedDataset) -> None:
    assert dataset.num_trained_tokens == pack(dataset, range(4)).num_targets == 4
    natural = TokenizedDataset.from_samples([([1, 2], [1, 2])])
    assert natural.num_trained_tokens == pack(natural, [0]).num_targets == 1


def test_dataset_views_subset_and_keys(dataset: TokenizedDataset) -> None:
    assert len(dataset) == 4 and dataset.lengths.tolist() == [4, 1, 3, 2]
    assert dataset[2][0].tolist() == [1, 2, 3] and dataset[2][1].tolist() == [-100, 2, -100]
    with pytest.raises(IndexError):
        dataset[4]
    part = dataset.subset([3, 0])
    assert [part[index][0].tolist() for index in range(2)] == [[4, 4], [5, 6, 7, 8]]
    twice = dataset.subset([1, 0, 1])
    keys = twice.keys()
    assert keys[0] == keys[2] != keys[1]


def test_fingerprint_sees_tokens_labels_and_borders(dataset: TokenizedDataset) -> None:
    same = TokenizedDataset.from_samples(SAMPLES)
    assert dataset.fingerprint() == same.fingerprint()
    other_label = TokenizedDataset.from_samples([(SAMPLES[0][0], [-100] * 4), *SAMPLES[1:]])
    other_token = TokenizedDataset.from_samples([([5, 6, 7, 9], SAMPLES[0][1]), *SAMPLES[1:]])
    other_border = TokenizedDataset(dataset.input_ids, dataset.labels, np.array([0, 3, 5, 8, 10], np.int64))
    prints = {data.fingerprint() for data in (dataset, other_label, other_token, other_border)}
    assert len(prints) == 4 and all(len(text) == 64 for text in prints)


@pytest.mark.parametrize("indices", [[0], [2, 0, 1], [0, 1, 2, 3]])
def test_samples_behind_virtual_tokens_keep_their_targets(dataset: TokenizedDataset, indices: list[int]) -> None:
    behind = dataset.behind(range(100, 103)).subset(indices)
    assert behind.lengths.tolist() == [3 + len(SAMPLES[index][0]) for index in indices]
    batch = pack(behind, range(len(indices)))
    assert batch.input_ids[0].tolist() == [t for index in indices for t in [100, 101, 102, *SAMPLES[index][0]]]
    assert batch.targets[0].tolist() == [
        target for index in indices for target in shifted([-100, -100, -100, *SAMPLES[index][1]])
    ]
    assert batch.num_targets == pack(dataset, indices).num_targets
    assert dataset.behind(range(0)).fingerprint() == dataset.fingerprint() != dataset.behind([5]).fingerprint()


@pytest.mark.parametrize("make", [pack, partial(pad, pad_id=0)], ids=["packed", "padded"])
def test_positions_begin_where_the_data_set_says(dataset: TokenizedDataset, make: Callable[..., Batch]) -> None:
    moved = make(dataset.behind([], 7).subset([0, 2]), [0, 1])
    plain = make(dataset, [0, 2])
    real = plain.attention_mask.bool() if plain.attention_mask is not None else torch.ones_like(plain.input_ids) > 0
    assert torch.equal(moved.position_ids[real], plain.position_ids[real] + 7)
    assert torch.equal(moved.input_ids, plain.input_ids) and torch.equal(moved.targets, plain.targets)
