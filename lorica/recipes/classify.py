"""Classes instead of answers: what `lorica eval` and `lorica generate` do for a classifier.

`eval` measures every row, and sets beside it what always naming the most common class of the training rows would
reach: the base has no head for these classes, so there is no base to compare with. `generate` names the class of each
text and how probable it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorica.config import RunConfig
from lorica.data.layouts import Layout
from lorica.data.render_labels import LabelRenderer
from lorica.data.rows import Example, RowFault, refuse
from lorica.data.sampler import micro_batches
from lorica.data.sources import load_examples
from lorica.data.tokenized import IGNORE, TokenizedDataset
from lorica.errors import DataError
from lorica.evaluate.classification import (
    ClassRow,
    ClassScores,
    class_logits,
    class_rows,
    majority,
    score_classes,
)
from lorica.files import write_json
from lorica.interop.peft import load_adapter
from lorica.methods.attach import in_front
from lorica.recipes import console
from lorica.recipes.opening import Source

SHOWN_CLASSES = 20
SHOWN_SAMPLES = 5
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Prediction:
    """One text and its class. probability: of `predicted`. label: the true class, where it is known."""

    origin: str
    text: str
    text_pair: str | None
    label: str | None
    predicted: str
    probability: float


@dataclass(frozen=True, slots=True)
class ClassificationReport:
    """What an evaluation found. majority: of always naming the most common class. samples: every row."""

    run: str
    data: str
    num_rows: int
    majority: ClassScores
    adapter: ClassScores
    classes: list[ClassRow]
    samples: list[Prediction]


def evaluate_classes(
    folder: Path,
    model: PreTrainedModel,
    name: str,
    dataset: TokenizedDataset,
    examples: Sequence[Example],
    train: npt.NDArray[np.int64],
    labels: Sequence[str],
    layout: Layout,
    config: RunConfig,
) -> ClassificationReport:
    """Measure an adapted classifier on every row, print tables and a few rows, and write evaluation.json.

    train: the classes of the training rows.
    """
    console.log(f"{len(dataset):,} rows of {name}")
    truth = np.array([labels.index(str(example.label)) for example in examples])
    logits = _logits(model, dataset, layout, config)
    report = ClassificationReport(
        run=str(folder),
        data=name,
        num_rows=len(dataset),
        majority=majority(train, truth),
        adapter=score_classes(logits, truth),
        classes=class_rows(logits.argmax(-1).numpy(), truth, labels),
        samples=_predictions(examples, logits, labels),
    )
    write_json(folder / "evaluation.json", console.jsonable(report))
    show(report)
    return report


def show(report: ClassificationReport) -> None:
    """Print the report's tables: scores, the classes if they are few, and a few rows, wrong ones first."""
    columns = ["model", "loss", "accuracy", "macro F1"]
    rows = [("most common class", report.majority), ("adapter", report.adapter)]
    cells = [[name, f"{s.loss:.3f}", f"{s.accuracy:.1%}", f"{s.macro_f1:.1%}"] for name, s in rows]
    console.table(f"{report.run} on {report.data}: {report.num_rows:,} rows", columns, cells, numeric=columns[1:])
    shown = sorted(report.classes, key=lambda row: row.f1)[:SHOWN_CLASSES]
    few = len(report.classes) <= SHOWN_CLASSES
    title = "Classes" if few else f"The {SHOWN_CLASSES} classes with the lowest F1, of {len(report.classes)}"
    columns = ["class", "rows", "named", "precision", "recall", "F1"]
    cells = [
        [
            row.label,
            f"{row.num_rows:,}",
            f"{row.num_predicted:,}",
            *(f"{v:.1%}" for v in (row.precision, row.recall, row.f1)),
        ]
        for row in (report.classes if few else shown)
    ]
    console.table(title, columns, cells, numeric=columns[1:])
    wrong = [sample for sample in report.samples if sample.predicted != sample.label]
    right = [sample for sample in report.samples if sample.predicted == sample.label]
    samples = (wrong[:SHOWN_SAMPLES] + right)[:SHOWN_SAMPLES]
    columns = ["text", "class", "predicted", "probability"]
    cells = [[_shown(s), s.label or "-", s.predicted, f"{s.probability:.1%}"] for s in samples]
    console.table("Rows, wrong ones first" if wrong else "Rows", columns, cells, numeric=["probability"])


def _shown(sample: Prediction) -> str:
    line = " ".join(f"{sample.text} | {sample.text_pair}".split() if sample.text_pair else sample.text.split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"


def read_texts(file: str | Path, columns: Mapping[str, str]) -> list[Example]:
    """The texts of a file: a .txt file's lines, or rows of `text` and perhaps `text_pair`; labels are not needed.

    Raises:
        DataError: rows that cannot be read; all of them are listed.
    """
    path = Path(file)
    if path.suffix != ".txt":
        known = {name: column for name, column in columns.items() if name != "label"}
        loaded = load_examples(path, format="to_classify", columns=known)
        refuse(loaded.faults, loaded.num_rows, "error")
        return loaded.examples
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    return [text_example(line, f"{path.name}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def text_example(text: str, origin: str) -> Example:
    """A text without a label."""
    return Example((), text, (), (), None, origin)


def predict(source: Source, examples: Sequence[Example], *, as_lines: bool) -> list[Prediction]:
    """Name the classes of texts; print the one, or as lines of JSON all of them, and return them.

    Raises:
        DataError: texts that are too long; all of them are listed.
    """
    config = source.run
    tokenizer, renderer = source.open_tokenizer()
    assert isinstance(renderer, LabelRenderer)
    samples, faults = _samples(renderer, examples)
    refuse(faults, len(examples), "error")
    if not samples:
        raise DataError("There are no texts to classify.")
    model = source.load_base()
    if source.adapter is not None:
        load_adapter(model, source.adapter).eval()
    layout, _ = source.task().layout(config, model.config, tokenizer)
    logits = _logits(model, TokenizedDataset.from_samples(samples), layout, config)
    found = _predictions(examples, logits, renderer.labels)
    for one in found:
        if as_lines:
            console.print_json(one, indent=None)
        else:
            print(f"{one.predicted}  {one.probability:.1%}")
    return found


def _samples(
    renderer: LabelRenderer, examples: Sequence[Example]
) -> tuple[list[tuple[Sequence[int], Sequence[int]]], list[RowFault]]:
    """Samples of texts whose class is not known, which the layout wants one for: the first."""
    samples: list[tuple[Sequence[int], Sequence[int]]] = []
    faults: list[RowFault] = []
    for example, (ids, border) in zip(examples, renderer.encode(examples), strict=True):
        if len(ids) > renderer.max_length:
            reason = f"{len(ids):,} tokens; data.max_length is {renderer.max_length:,}"
            faults.append(RowFault(example.origin, reason, "too_long"))
        samples.append((ids.tolist(), [0 if place == border else IGNORE for place in range(len(ids))]))
    return samples, faults


def _logits(model: PreTrainedModel, dataset: TokenizedDataset, layout: Layout, config: RunConfig) -> Tensor:
    """Logits [N, C] of all rows, in their order."""
    dataset = dataset.behind(*in_front(model))
    budget = config.train.micro_batch_tokens or config.train.batch_tokens
    everything = np.arange(len(dataset), dtype=np.int64)
    parts = micro_batches(everything, dataset.lengths, budget, layout.padded)
    logits = class_logits(model, (layout.make(dataset, part) for part in parts))
    return logits[torch.from_numpy(np.argsort(np.concatenate(parts)))]


def _predictions(examples: Sequence[Example], logits: Tensor, labels: Sequence[str]) -> list[Prediction]:
    probabilities, predicted = logits.softmax(-1).max(-1)
    return [
        Prediction(example.origin, example.text or "", example.text_pair, example.label, labels[index], probability)
        for example, index, probability in zip(examples, predicted.tolist(), probabilities.tolist(), strict=True)
    ]
