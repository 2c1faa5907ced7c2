"""How well a classifier names classes: loss, accuracy, F1, a row for each class, and the classes with probabilities.

For a class c, of the rows that it is the truth of (T), those it was predicted for (P), and both (H):

    precision = H / P,  recall = H / T,  F1 = 2 H / (T + P)          0 where nothing is there to divide by

Macro F1 is the plain mean of F1 over the classes that occur, as the truth or as a prediction (scikit-learn's
`f1_score(average="macro")` without `labels`), so that a rare class weighs as much as a common one. What always naming
the most common class of the training rows would reach stands beside it: a head that was never trained says nothing.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lorica.data.packing import Batch
from lorica.errors import DataError
from lorica.models.classifier import row_logits
from lorica.models.loss import LossFunction

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ClassScores:
    """loss: mean of -ln p of the true class, None where no probabilities are there. accuracy, macro_f1: 0 to 1."""

    loss: float | None
    accuracy: float
    macro_f1: float


@dataclass(frozen=True, slots=True)
class ClassRow:
    """One class. num_rows: of which it is the truth. num_predicted: rows that it was named for."""

    label: str
    num_rows: int
    num_predicted: int
    precision: float
    recall: float
    f1: float


def class_logits(model: PreTrainedModel, batches: Iterable[Batch]) -> Tensor:
    """Logits [N, C] of the rows of `batches` in their order, float32 on the CPU, in evaluation mode; it is restored."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            found = [
                row_logits(model, batch.to(model.device).model_inputs(), batch.num_samples).float().cpu()
                for batch in batches
            ]
    finally:
        model.train(training)
    if not found:
        raise DataError("There are no rows to classify.")
    return torch.cat(found)


def measure_classes(model: PreTrainedModel, loss_fn: LossFunction, batches: Iterable[Batch]) -> Mapping[str, float]:
    """`loss`, `accuracy` and `macro_f1` on rows whose classes are the batches' targets."""
    truth: list[Ids] = []

    def noted() -> Iterator[Batch]:
        for batch in batches:
            truth.append(batch.targets.numpy())
            yield batch

    logits = class_logits(model, noted())
    scores = score_classes(logits, np.concatenate(truth))
    assert scores.loss is not None
    return {"loss": scores.loss, "accuracy": scores.accuracy, "macro_f1": scores.macro_f1}


def score_classes(logits: Tensor, truth: Ids) -> ClassScores:
    """Scores of logits [N, C] against true classes [N]."""
    loss = float(F.cross_entropy(logits.double(), torch.from_numpy(truth)))
    return score_predictions(logits.argmax(-1).numpy(), truth, loss)


def score_predictions(predicted: Ids, truth: Ids, loss: float | None = None) -> ClassScores:
    """Scores of predicted classes [N] against true ones [N]."""
    seen = np.union1d(predicted, truth)
    f1 = [_class_figures(predicted, truth, int(index))[2] for index in seen]
    return ClassScores(loss, float((predicted == truth).mean()), float(np.mean(f1)))


def class_rows(predicted: Ids, truth: Ids, labels: Sequence[str]) -> list[ClassRow]:
    """Every class by its id."""
    return [
        ClassRow(
            label,
            int((truth == index).sum()),
            int((predicted == index).sum()),
            *_class_figures(predicted, truth, index),
        )
        for index, label in enumerate(labels)
    ]


def majority(train: Ids, truth: Ids) -> ClassScores:
    """What naming the most common class of the training rows [M] reaches; its loss is that of their shares."""
    counts = np.bincount(train, minlength=int(truth.max()) + 1)
    shares = counts[truth] / len(train)
    loss = float(-np.log(shares).mean()) if shares.all() else math.inf
    return score_predictions(np.full_like(truth, int(counts.argmax())), truth, loss)


def _class_figures(predicted: Ids, truth: Ids, index: int) -> tuple[float, float, float]:
    """Precision, recall and F1 of one class."""
    named, true = predicted == index, truth == index
    hits, num_named, num_true = int((named & true).sum()), int(named.sum()), int(true.sum())
    precision, recall = (hits / n if n else 0.0 for n in (num_named, num_true))
    return precision, recall, 2 * hits / (num_named + num_true) if num_named + num_true else 0.0
