"""Figures of routers against scikit-learn, scipy and formulas written out; and that the watch counts the right rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.spatial.distance import cdist
from scipy.stats import entropy
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score, normalized_mutual_info_score
from torch import Tensor

import lorica
from lorica.data.layouts import PACKED, padded
from lorica.data.packing import Batch, pack
from lorica.data.sampler import micro_batches
from lorica.data.tokenized import TokenizedDataset
from lorica.evaluate.likelihood import likelihood
from lorica.methods.gates import (
    NO_TOKEN,
    UNKNOWN,
    GateSummary,
    alikeness,
    chance_information,
    gate_sums,
    head_cosines,
    mutual_information,
    normalized_mutual_information,
    row_labels,
    summarize_gates,
    watching,
)
from lorica.methods.hydra import HydraLoRA
from lorica.models.loss import make_loss

NUM_HEADS, NUM_COMPONENTS = 4, 3


def drawn(rows: int = 500, sharpness: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gates that lean towards the row's component, and the components."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_COMPONENTS, (rows,), generator=generator)
    logits = torch.randn(rows, NUM_HEADS, generator=generator)
    logits[torch.arange(rows), labels] += sharpness
    return logits.softmax(1), labels


def summary(gates: Tensor, labels: Tensor, num_samples: int | None = None) -> GateSummary:
    return summarize_gates(gate_sums(gates, labels, NUM_COMPONENTS), len(gates) if num_samples is None else num_samples)


def test_the_figures_are_those_of_scikit_learn_and_scipy() -> None:
    gates, labels = drawn()
    found = summary(gates, labels)
    g, c = gates.double().numpy(), labels.numpy()
    heads = g.argmax(1)
    assert found.num_rows == 500
    np.testing.assert_allclose(found.mean_gates, g.mean(0))
    np.testing.assert_allclose(found.top_shares, np.bincount(heads, minlength=NUM_HEADS) / 500)
    assert found.entropy == pytest.approx(entropy(g, axis=1).mean())
    assert found.row_entropy == pytest.approx(entropy(g, axis=1, base=NUM_HEADS).mean())
    assert found.load_entropy == pytest.approx(entropy(g.mean(0), base=NUM_HEADS))
    assert found.nmi == pytest.approx(normalized_mutual_info_score(c, heads))
    joint = np.stack([g[c == k].sum(0) for k in range(NUM_COMPONENTS)], 1) / 500
    soft = (joint * np.log(joint / np.outer(joint.sum(1), joint.sum(0)))).sum()
    assert found.soft_nmi == pytest.approx(soft / ((entropy(joint.sum(0)) + entropy(joint.sum(1))) / 2))
    np.testing.assert_allclose(found.by_component, [g[c == k].mean(0) for k in range(NUM_COMPONENTS)])
    assert 0 < found.soft_nmi < found.nmi < 1


def test_batches_add_up() -> None:
    gates, labels = drawn()
    parts = [gate_sums(g, c, NUM_COMPONENTS) for g, c in zip(gates.split(70), labels.split(70), strict=True)]
    torch.testing.assert_close(sum(parts), gate_sums(gates, labels, NUM_COMPONENTS))


def test_unknown_counts_but_not_for_agreement_and_padding_not_at_all() -> None:
    gates, labels = drawn(600)
    labels[400:500], labels[500:] = UNKNOWN, NO_TOKEN
    found, tokens, known = (summary(gates[:n], labels[:n], 400) for n in (600, 500, 400))
    assert found == tokens and found.num_rows == 500
    assert (found.nmi, found.soft_nmi, found.adjusted_nmi) == (known.nmi, known.soft_nmi, known.adjusted_nmi)
    assert found.by_component == known.by_component and found.mean_gates != known.mean_gates


def test_one_component_or_none_gives_no_agreement() -> None:
    gates, labels = drawn()
    for value in (UNKNOWN, 1):
        found = summary(gates, torch.full_like(labels, value))
        assert (found.nmi, found.soft_nmi, found.adjusted_nmi) == (None, None, None)
        assert found.by_component[0] is None and found.num_rows == 500


def test_collapse_sharing_and_sorting_are_told_apart() -> None:
    """By hand: H(uniform over 4) = log 4, which is 1 of 1."""
    labels = torch.arange(300) % 3
    even = summary(torch.full((300, 4), 0.25), labels)
    assert (even.row_entropy, even.load_entropy, even.nmi, even.soft_nmi) == pytest.approx((1, 1, 0, 0))
    assert even.entropy == pytest.approx(math.log(4)) and even.top_shares == pytest.approx([0.25] * 4)
    collapsed = summary(torch.eye(4)[torch.zeros(300, dtype=torch.int64)], labels)
    assert (collapsed.row_entropy, collapsed.load_entropy, collapsed.nmi, collapsed.soft_nmi) == (0, 0, 0, 0)
    assert collapsed.top_shares == (1, 0, 0, 0)
    sorted_out = summary(torch.eye(4)[labels], labels)
    assert (sorted_out.row_entropy, sorted_out.nmi, sorted_out.soft_nmi) == pytest.approx((0, 1, 1))
    assert sorted_out.load_entropy == pytest.approx(math.log(3) / math.log(4))
    only = summary(torch.ones(300, 1), labels)
    assert (only.mean_gates, only.row_entropy, only.load_entropy, only.nmi) == ((1,), 0, 0, 0)


@pytest.mark.parametrize("shape", [(2, 2), (4, 5), (3, 1), (1, 1)])
def test_mutual_information_is_that_of_scikit_learn(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    heads, labels = (random.integers(n, size=200) for n in shape)
    table = torch.zeros(shape, dtype=torch.float64)
    for pair in zip(heads, labels, strict=True):
        table[pair] += 1
    assert mutual_information(table) == pytest.approx(mutual_info_score(heads, labels), abs=1e-12)
    if shape != (1, 1):
        expected = normalized_mutual_info_score(heads, labels)
        assert normalized_mutual_information(table) == pytest.approx(expected, abs=1e-12)


def test_noise_agrees_by_chance_and_the_adjustment_takes_that_off() -> None:
    """Independent draws: raw NMI is biased upwards, the adjusted one is not, nor far from the exact adjustment."""
    random = np.random.default_rng(2)
    raw, adjusted, exact = [], [], []
    for _ in range(100):
        heads, labels = random.integers(4, size=100), random.integers(3, size=100)
        table = torch.from_numpy(np.histogram2d(heads, labels, bins=(4, 3))[0])
        raw.append(normalized_mutual_information(table))
        adjusted.append(normalized_mutual_information(table, chance_information(table, 100)))
        exact.append(adjusted_mutual_info_score(labels, heads))
    assert np.mean(raw) > 0.02 and abs(np.mean(adjusted)) < 0.004
    assert np.abs(np.subtract(adjusted, exact)).max() < 0.01


def test_chance_by_hand() -> None:
    table = torch.tensor([[5, 1, 0], [2, 2, 0], [0, 0, 0], [1, 4, 0]], dtype=torch.float64)
    # Three heads and two components are there: 2 * 1 / (2 * 50).
    assert chance_information(table, 50) == pytest.approx(0.02)
    assert normalized_mutual_information(table, chance_information(table, 1)) is None
    assert normalized_mutual_information(table, chance_information(table, 0)) is None


# Which rows are whose.

LENGTHS, COMPONENTS = [5, 3, 9, 4, 7, 6], [0, 2, UNKNOWN, 1, 0, 2]


def make_dataset() -> TokenizedDataset:
    random = np.random.default_rng(0)
    samples = [random.integers(1, 30, size=n).tolist() for n in LENGTHS]
    return TokenizedDataset.from_samples([(ids, ids) for ids in samples])


def test_rows_of_packed_and_padded_batches_have_their_samples_labels() -> None:
    dataset, labels = make_dataset(), torch.tensor([0, 2, 1])
    packed = PACKED.make(dataset, np.array([0, 1, 3]))
    assert row_labels(labels, packed).tolist() == [0] * 5 + [2] * 3 + [1] * 4 + [NO_TOKEN] * 52
    full = pack(dataset, [0, 1, 3])
    assert row_labels(labels, full).tolist() == [0] * 5 + [2] * 3 + [1] * 4
    wide = padded(0).make(dataset, np.array([0, 1, 3]))
    none = NO_TOKEN
    assert row_labels(labels, wide).tolist() == [0] * 5 + [2] * 3 + [none] * 2 + [1] * 4 + [none]


@pytest.fixture
def hydra(tiny_llama: Any) -> Any:
    torch.manual_seed(0)
    model = lorica.adapt(tiny_llama(), HydraLoRA(rank=2, num_heads=NUM_HEADS))
    for layer in lorica.adapters(model).values():
        torch.nn.init.normal_(layer.router)
    return model.eval()


def batches_of(dataset: TokenizedDataset, layout: Any) -> tuple[list[Batch], list[Tensor]]:
    parts = micro_batches(np.arange(len(dataset)), dataset.lengths, 18, layout.padded)
    components = torch.tensor(COMPONENTS)
    return [layout.make(dataset, part) for part in parts], [components[part] for part in parts]


@pytest.mark.parametrize("layout", [PACKED, padded(0)], ids=["packed", "padded"])
def test_an_evaluation_is_watched_row_by_row(hydra: Any, layout: Any) -> None:
    """Against the gates of each sample by itself, which no other row and no padding is near."""
    dataset = make_dataset()
    batches, components = batches_of(dataset, layout)
    assert len(batches) > 1
    loss_fn = make_loss(hydra)
    unwatched = likelihood(hydra, loss_fn, batches)
    with watching(hydra, NUM_COMPONENTS) as watch:
        assert likelihood(hydra, loss_fn, watch.over(batches, components)) == unwatched
        # Behind the last batch nothing is counted.
        hydra(input_ids=torch.tensor([[1, 2, 3]]))
        found = watch.summaries()
    layers = lorica.adapters(hydra)
    assert found.keys() == layers.keys() and all(layer.watch is None for layer in layers.values())

    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.watch = seen[name].append
    for index in range(len(dataset)):
        with torch.no_grad():
            hydra(input_ids=torch.from_numpy(dataset[index][0].astype(np.int64))[None])
    labels = torch.tensor(COMPONENTS).repeat_interleave(torch.tensor(LENGTHS))
    for name, parts in seen.items():
        gates = torch.cat(parts)
        expected = summary(gates, labels, sum(c >= 0 for c in COMPONENTS))
        assert found[name].num_rows == sum(LENGTHS)
        for field in ("mean_gates", "top_shares", "entropy", "load_entropy", "nmi", "soft_nmi"):
            assert getattr(found[name], field) == pytest.approx(getattr(expected, field), abs=1e-5), (name, field)
        np.testing.assert_allclose(found[name].by_component, expected.by_component, atol=1e-5)


def test_a_layer_whose_gates_are_no_numbers_is_left_out(hydra: Any) -> None:
    """Of a run that diverges: its loss says so, and the evaluation does not break."""
    broken = next(iter(lorica.adapters(hydra)))
    torch.nn.init.constant_(lorica.adapters(hydra)[broken].router, torch.nan)
    with watching(hydra, NUM_COMPONENTS) as watch:
        likelihood(hydra, make_loss(hydra), watch.over(*batches_of(make_dataset(), PACKED)))
        assert broken not in watch.summaries()


def test_a_watch_ends_with_its_block_and_sees_only_what_it_is_told_of(hydra: Any) -> None:
    dataset = make_dataset()
    batches, components = batches_of(dataset, PACKED)
    with pytest.raises(RuntimeError, match="stop"), watching(hydra, NUM_COMPONENTS) as watch:
        hydra(input_ids=torch.tensor([[1, 2, 3]]))
        assert watch.summaries() == {}
        for _ in watch.over(batches, components):
            # Fewer rows than the batch has: no rows of its.
            hydra(input_ids=torch.tensor([[1, 2, 3]]))
        assert watch.summaries() == {}
        raise RuntimeError("stop")
    assert all(layer.watch is None for layer in lorica.adapters(hydra).values())


def test_uniform_gates_have_nothing_to_see(tiny_llama: Any) -> None:
    model = lorica.adapt(tiny_llama(), HydraLoRA(rank=2, num_heads=3, gate="uniform"))
    batches, components = batches_of(make_dataset(), PACKED)
    with watching(model, NUM_COMPONENTS) as watch:
        likelihood(model, make_loss(model), watch.over(batches, components))
        assert watch.summaries() == {}


# How alike.


def test_cosines_of_heads() -> None:
    heads = torch.randn(3, 10, 2)
    heads[2] = -2 * heads[0]
    found = head_cosines(torch.cat([heads, torch.zeros(1, 10, 2)]))
    flat = heads.double().flatten(1).numpy()
    np.testing.assert_allclose(found[:3, :3], 1 - cdist(flat, flat, "cosine"), atol=1e-12)
    assert found[0, 2] == pytest.approx(-1) and found[3].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(4, 30), (30, 4)], ids=["A", "B"])
def test_subspaces_against_scipys_angles(shape: tuple[int, int]) -> None:
    """The cosines of the principal angles are the singular values of U^T V."""
    torch.manual_seed(0)
    one, other = torch.randn(shape), torch.randn(shape)
    found = alikeness(one, other)
    x, y = (m.double().numpy() if shape[0] > shape[1] else m.double().numpy().T for m in (one, other))
    assert found.subspace == pytest.approx((np.cos(subspace_angles(x, y)) ** 2).mean())
    assert found.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    assert found.chance == pytest.approx(4 / 30)


def test_the_same_space_in_another_basis_is_alike_although_its_cosine_is_not_one() -> None:
    torch.manual_seed(0)
    b = torch.randn(30, 4)
    turned = alikeness(b, b @ torch.linalg.qr(torch.randn(4, 4))[0])
    assert turned.subspace == pytest.approx(1) and abs(turned.cosine) < 0.9
    same = alikeness(b, 3 * b)
    assert (same.cosine, same.subspace) == pytest.approx((1, 1))
    other_rank = alikeness(b, b[:, :2])
    assert other_rank.subspace == pytest.approx(1) and math.isnan(other_rank.cosine)


def test_chance_is_what_random_spaces_have() -> None:
    torch.manual_seed(0)
    found = [alikeness(torch.randn(40, 4), torch.randn(40, 8)) for _ in range(200)]
    assert np.mean([pair.subspace for pair in found]) == pytest.approx(found[0].chance, rel=0.03)


def test_a_matrix_at_zero_is_like_none() -> None:
    found = alikeness(torch.zeros(30, 4), torch.randn(30, 4))
    assert (found.cosine, found.subspace) == (0, 0)
