"""Criteria against scikit-learn's and closed forms; overlaps against profiles that are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import erf
from sklearn.mixture import GaussianMixture

from lorica.data import clustering
from lorica.data.clustering import Criterion
from lorica.data.features import counts


def blobs(sizes: list[int], seed: int = 0) -> tuple[clustering.Floats, clustering.Ints]:
    generator = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(sizes)), sizes)
    return np.eye(len(sizes) + 2)[truth] + generator.normal(0, 0.05, (sum(sizes), len(sizes) + 2)), truth


def test_tfidf_is_the_formula_in_float64() -> None:
    table = counts(["red red apple", "red engine", "blue engine engine engine"])
    dense = table.toarray().astype(np.float64)
    idf = np.log((1 + 3) / (1 + (dense > 0).sum(0)))
    expected = np.where(dense > 0, 1 + np.log(np.maximum(dense, 1)), 0) * idf
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    ours = clustering.weigh(table, clustering.idf(table)).toarray()
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)


def test_the_likelihood_is_that_of_a_spherical_mixture() -> None:
    """scikit-learn scores the same mixture, its parameters set by hand."""
    points, truth = blobs([30, 60])
    train, held_out = points[::2], points[1::2]
    labels = truth[::2]
    ours = clustering._log_likelihoods(train, labels, held_out)
    means = np.stack([train[labels == label].mean(0) for label in (0, 1)])
    mixture = GaussianMixture(2, covariance_type="spherical")
    variance = ((train - means[labels]) ** 2).mean()
    mixture.means_, mixture.weights_ = means, np.bincount(labels) / len(labels)
    mixture.precisions_cholesky_ = np.full(2, variance**-0.5)
    np.testing.assert_allclose(ours, mixture.score_samples(held_out), rtol=1e-6)


def test_criteria_name_clear_blobs() -> None:
    points, _ = blobs([40, 80, 120, 60])
    criteria = clustering.judge(points, 8, 0)
    assert [criterion.num for criterion in criteria] == list(range(1, 9))
    assert clustering.choices(criteria) == {"elbow": 4, "silhouette": 4, "held_out": 4}
    centred = points - points.mean(0)
    assert criteria[0].inertia == pytest.approx((centred**2).sum(1).mean())


def test_choices_by_hand() -> None:
    criteria = [
        Criterion(1, 10.0, None, -5.0, 0.1),
        Criterion(2, 4.0, 0.3, -2.0, 0.1),
        Criterion(3, 3.0, 0.5, -1.05, 0.1),
        Criterion(4, 2.5, 0.4, -1.0, 0.1),
    ]
    assert clustering.choices(criteria) == {"elbow": 2, "silhouette": 3, "held_out": 3}


def test_overlap_of_halves_is_one_and_of_strangers_none() -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"word{chr(97 + index)}{chr(97 + index % 7)}" for index in range(20)]
    texts = [" ".join(rng.choice(vocabulary, 6, replace=False)) for _ in range(400)]
    others = ["".join(chr(0x4E00 + index) for index in rng.integers(0, 40, 12)) for _ in range(400)]
    present = counts(texts + others)
    present.data[:] = 1
    labels = np.repeat([0, 1, 2], [200, 200, 400])
    halves, first, second = clustering.overlaps(present, labels, 0)
    num_terms = np.log(np.diff(present.indptr))
    limit = -0.08 + 0.126 * num_terms[:400].mean()
    assert halves * limit == pytest.approx(1, abs=0.02)
    assert abs(first) < 0.03 and abs(second) < 0.03


def test_between_two_groups_is_a_gap_and_within_a_cloud_there_is_none() -> None:
    """A normal distribution cut at its middle: densities at 0 and at the halves' means, sqrt(2 / pi)."""
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(200_000, 1))
    halves = (cloud[:, 0] > 0).astype(np.int64)
    mean, width = np.sqrt(2 / np.pi), 0.25 * np.sqrt(2 / np.pi)
    share = lambda at: erf((at + width) / np.sqrt(2)) - erf((at - width) / np.sqrt(2))  # noqa: E731
    assert clustering.between(cloud, halves) == pytest.approx([share(0) / share(mean)], rel=0.02)
    # Of unequal sizes, all three far apart; the sizes do not count.
    points, truth = blobs([40, 400, 90])
    assert clustering.between(points, truth).tolist() == [0, 0, 0]
    third = np.concatenate([points, (points[:40] + points[40:80]) / 2])
    first, *others = clustering.between(third, np.append(truth, rng.permutation(np.repeat([0, 1], 20))))
    assert first > 0.1 and others == [0, 0]


@pytest.mark.parametrize("overlap, gap, num", [(1.1, True, 2), (1.1, False, 1), (1.2, True, 1), (0.9, False, 2)])
def test_groups_with_a_gap_may_overlap_more(
    monkeypatch: pytest.MonkeyPatch, overlap: float, gap: bool, num: int
) -> None:
    monkeypatch.setattr(clustering, "overlaps", lambda present, labels, seed: np.array([overlap]))
    points, labels = blobs([50, 80])
    if not gap:
        points = np.random.default_rng(0).normal(size=points.shape)
        labels = (points[:, 0] > 0).astype(np.int64)
    joined, left = clustering._joined(counts(["a"] * 130), points, labels, 0)
    assert joined.max() + 1 == num and left <= 1


def test_noise_of_dbscan_is_what_lies_alone() -> None:
    points, truth = blobs([100, 150])
    far = np.full((3, points.shape[1]), 5.0) + np.arange(3)[:, None] * 3
    present = counts(["apple red sweet"] * 100 + ["车 快 响声 很大"] * 150 + ["lonely"] * 3)
    labels = clustering.dbscan(np.concatenate([points, far]), present, 0)
    assert (labels[-3:] == -1).all()
    found = labels[:250]
    assert len(np.unique(found[found >= 0])) == 2 and (found >= 0).mean() > 0.85
    assert all(len(np.unique(found[(truth == kind) & (found >= 0)])) == 1 for kind in (0, 1))
