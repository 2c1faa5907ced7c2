"""Scores of classes against their definitions counted out, figures worked by hand, and scikit-learn where it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lorica.evaluate.classification import class_rows, majority, score_classes, score_predictions


def drawn(num_classes: int) -> tuple[torch.Tensor, np.ndarray]:
    """Logits [40, C] and true classes [40]; of twenty classes some never occur, and some are never named."""
    generator = torch.Generator().manual_seed(num_classes)
    return torch.randn(40, num_classes, generator=generator), torch.randint(
        0, num_classes, (40,), generator=generator
    ).numpy()


@pytest.mark.parametrize("num_classes", [2, 3, 20])
def test_scores_are_what_counting_gives(num_classes: int) -> None:
    logits, truth = drawn(num_classes)
    named = [max(range(num_classes), key=row.__getitem__) for row in logits.tolist()]
    f1, loss = [], 0.0
    for label in {*named, *truth.tolist()}:
        right = sum(n == t == label for n, t in zip(named, truth, strict=True))
        wrong = sum((n == label) != (t == label) for n, t in zip(named, truth, strict=True))
        f1.append(right / (right + wrong / 2))
    for row, label in zip(logits.tolist(), truth, strict=True):
        loss += math.log(sum(math.exp(x) for x in row)) - row[label]
    found = score_classes(logits, truth)
    assert found.accuracy == sum(n == t for n, t in zip(named, truth, strict=True)) / 40
    assert found.macro_f1 == pytest.approx(sum(f1) / len(f1)) and found.loss == pytest.approx(loss / 40)


@pytest.mark.parametrize("num_classes", [2, 3, 20])
def test_scores_are_those_of_scikit_learn(num_classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    logits, truth = drawn(num_classes)
    found, named = score_classes(logits, truth), logits.argmax(-1).numpy()
    assert found.accuracy == pytest.approx(metrics.accuracy_score(truth, named))
    assert found.macro_f1 == pytest.approx(metrics.f1_score(truth, named, average="macro", zero_division=0))
    probabilities = logits.double().softmax(-1).numpy()
    assert found.loss == pytest.approx(metrics.log_loss(truth, probabilities, labels=range(num_classes)))
    rows = class_rows(named, truth, [str(index) for index in range(num_classes)])
    wanted = metrics.precision_recall_fscore_support(truth, named, labels=range(num_classes), zero_division=0)
    assert np.array([(r.precision, r.recall, r.f1, r.num_rows) for r in rows]) == pytest.approx(np.array(wanted).T)


def test_a_row_for_each_class() -> None:
    rows = class_rows(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]), ["a", "b", "c"])
    assert [(r.label, r.num_rows, r.num_predicted, r.precision) for r in rows] == [
        ("a", 3, 2, 1.0),
        ("b", 1, 2, 0.5),
        ("c", 0, 0, 0.0),
    ]
    assert [r.recall for r in rows] == pytest.approx([2 / 3, 1.0, 0.0])
    assert [r.f1 for r in rows] == pytest.approx([4 / 5, 2 / 3, 0.0])


def test_by_hand() -> None:
    # Class 0: T 3, P 2, H 2; class 1: T 1, P 2, H 1. Nothing is of class 2.
    found = score_predictions(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]))
    assert found.accuracy == 0.75 and found.macro_f1 == pytest.approx((4 / 5 + 2 / 3) / 2) and found.loss is None


def test_the_most_common_class_of_the_training_rows() -> None:
    found = majority(np.array([1, 1, 1, 0]), np.array([1, 0]))
    assert found.accuracy == 0.5 and found.loss == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert majority(np.array([0, 0]), np.array([0, 1])).loss == math.inf
