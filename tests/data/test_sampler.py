"""The order of samples: complete, bounded, seeded, resumable by one integer."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from lorica.data.sampler import Order, epoch_batches, micro_batches, split_eval
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import DataError

LENGTHS = np.random.default_rng(0).integers(1, 60, 500).astype(np.int64)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch_tokens", [1, 100, 4096, 10**9])
def test_every_sample_once_and_no_batch_too_large(padded: bool, batch_tokens: int) -> None:
    batches = epoch_batches(LENGTHS, seed=3, epoch=1, batch_tokens=batch_tokens, padded=padded)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(LENGTHS)))
    for batch in batches:
        size = len(batch) * LENGTHS[batch].max() if padded else LENGTHS[batch].sum()
        assert size <= batch_tokens or len(batch) == 1


def test_packed_batches_are_filled_greedily() -> None:
    batches = epoch_batches(LENGTHS, seed=0, epoch=0, batch_tokens=200)
    for batch, following in pairwise(batches):
        assert LENGTHS[batch].sum() + LENGTHS[following[0]] > 200


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_batches(LENGTHS, seed=seed, epoch=epoch, batch_tokens=300)).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_bucketing_wastes_little_padding() -> None:
    lengths = np.random.default_rng(1).integers(1, 500, 5000).astype(np.int64)
    batches = epoch_batches(lengths, seed=0, epoch=0, batch_tokens=4096, padded=True)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    assert padded / lengths.sum() < 1.1
    means = [float(lengths[batch].mean()) for batch in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2, "long and short batches are mixed"


@pytest.mark.parametrize("padded", [False, True])
def test_micro_batches_partition_the_step(padded: bool) -> None:
    step = epoch_batches(LENGTHS, seed=0, epoch=0, batch_tokens=1000, padded=padded)[0]
    parts = micro_batches(step, LENGTHS, 150, padded)
    assert sorted(np.concatenate(parts).tolist()) == sorted(step.tolist())
    assert len(parts) > 1
    for part in parts:
        size = len(part) * LENGTHS[part].max() if padded else LENGTHS[part].sum()
        assert size <= 150 or len(part) == 1


def test_whole_epochs_follow_one_another() -> None:
    order = Order(LENGTHS, seed=5, batch_tokens=400, epochs=3)
    expected = [
        batch.tolist() for epoch in range(3) for batch in epoch_batches(LENGTHS, seed=5, epoch=epoch, batch_tokens=400)
    ]
    assert [order.batch(step).tolist() for step in range(order.num_steps)] == expected


def test_any_step_can_be_asked_first() -> None:
    whole = Order(LENGTHS, seed=5, batch_tokens=400, epochs=2.5)
    for step in (whole.num_steps - 1, 0, whole.num_steps // 2):
        fresh = Order(LENGTHS, seed=5, batch_tokens=400, epochs=2.5)
        assert fresh.batch(step).tolist() == whole.batch(step).tolist()


def test_fractional_epochs_and_max_steps() -> None:
    one = Order(LENGTHS, seed=0, batch_tokens=400, epochs=1)
    half = Order(LENGTHS, seed=0, batch_tokens=400, epochs=0.5)
    assert half.num_steps == round(one.num_steps / 2)
    assert Order(LENGTHS, seed=0, batch_tokens=400, epochs=1e-6).num_steps == 1
    assert Order(LENGTHS, seed=0, batch_tokens=400, epochs=100, max_steps=7).num_steps == 7
    assert Order(LENGTHS, seed=0, batch_tokens=400, epochs=0.5, max_steps=10**6).num_steps == half.num_steps
    with pytest.raises(IndexError):
        one.batch(one.num_steps)


def test_epoch_counts_completed_epochs() -> None:
    order = Order(LENGTHS, seed=0, batch_tokens=400, epochs=2)
    first = len(epoch_batches(LENGTHS, seed=0, epoch=0, batch_tokens=400))
    assert order.epoch(0) == 0.0 and order.epoch(first) == 1.0 and order.epoch(order.num_steps) == 2.0
    values = [order.epoch(step) for step in range(order.num_steps + 1)]
    assert values == sorted(values)


def numbered(counts: list[int]) -> TokenizedDataset:
    """`counts[i]` equal samples of the tokens (i, 0)."""
    return TokenizedDataset.from_samples([([i, 0], [-100, 0]) for i, count in enumerate(counts) for _ in range(count)])


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_split_is_a_partition_of_the_wanted_size(fraction: float) -> None:
    train, evaluation = split_eval(numbered([1] * 200), fraction, seed=1)
    assert sorted([*train.tolist(), *evaluation.tolist()]) == list(range(200))
    assert len(evaluation) == max(1, round(200 * fraction))
    assert train.tolist() == sorted(train.tolist()) and evaluation.tolist() == sorted(evaluation.tolist())


def test_equal_rows_stay_on_one_side() -> None:
    dataset = numbered([7, 1, 3, 40, 2, 2, 5])
    keys = dataset.keys()
    for seed in range(20):
        train, evaluation = split_eval(dataset, 0.2, seed)
        assert len(train) and len(evaluation)
        assert not {keys[i] for i in train} & {keys[i] for i in evaluation}


def test_split_is_seeded() -> None:
    dataset = numbered([1] * 100)
    assert split_eval(dataset, 0.1, 4)[1].tolist() == split_eval(dataset, 0.1, 4)[1].tolist()
    assert split_eval(dataset, 0.1, 4)[1].tolist() != split_eval(dataset, 0.1, 5)[1].tolist()


def test_split_of_two_and_of_what_cannot_be_split() -> None:
    train, evaluation = split_eval(numbered([1, 1]), 0.05, 0)
    assert len(train) == len(evaluation) == 1
    train, evaluation = split_eval(numbered([9, 9]), 0.05, 0)
    assert len(train) == len(evaluation) == 9
    for counts in ([1], [5]):
        with pytest.raises(DataError, match=r"data\.eval"):
            split_eval(numbered(counts), 0.05, 0)
