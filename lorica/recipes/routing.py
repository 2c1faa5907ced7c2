"""What the routers of a HydraLoRA run do on its rows: watched in each evaluation, and once more for the report.

The means over layers join the evaluation's scores, so they stand in metrics.jsonl, on the console and in `lorica
compare`. Layer by layer it is `routing.json`: of the latest evaluation while the run goes on, of the saved adapter at
the end, from where the report's table and picture are too (`heat_map.py`). A pass that is watched gives the same loss
as one that is not, and draws no random numbers, so nothing of this changes what is trained.

Agreement is with the components that the run found or was given, else with the `task` of the rows. Where there is
neither none is looked for: finding components takes half a minute on a small machine. A run without evaluation rows is
looked at once, at its end, on a few of its training rows.

What it gives up: encoder-decoders, whose halves read different rows; see `methods/gates.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from transformers import PreTrainedModel

from lorica.data.clustering import Ints
from lorica.data.components import Components
from lorica.data.layouts import Layout
from lorica.data.rows import Example
from lorica.data.tokenized import TokenizedDataset
from lorica.files import write_json
from lorica.methods.attach import adapters
from lorica.methods.gates import UNKNOWN, GateSummary, head_cosines, watching
from lorica.methods.hydra_linear import HydraLinear
from lorica.models.loss import LossFunction
from lorica.recipes.components import text_of
from lorica.recipes.console import jsonable
from lorica.recipes.intrinsic import FILE as COMPONENTS
from lorica.recipes.intrinsic import Intrinsic, read_components
from lorica.recipes.preparing import PreparedRun
from lorica.recipes.tasks import RunTask

FILE, PICTURE = "routing.json", "routing.png"
MAX_TRAIN_ROWS = 256
MAX_TASKS = 12
"""More would not fit on a picture; rows of rarer tasks count, but not for agreement."""
_NAME_TERMS = 3

MEANS: Mapping[str, Callable[[GateSummary], float | None]] = {
    "routing_entropy": lambda layer: layer.row_entropy,
    "load_entropy": lambda layer: layer.load_entropy,
    "top_share": lambda layer: max(layer.top_shares),
    "nmi": lambda layer: layer.nmi,
    "adjusted_nmi": lambda layer: layer.adjusted_nmi,
}
"""What an evaluation is told: means over layers. In metrics.jsonl each name begins with `eval_`."""


@dataclass(frozen=True)
class Watched:
    """Rows to watch routers on.

    Attributes:
        components: [rows] int64, UNKNOWN for none; names: theirs, none at all where there are fewer than two.
        called: what the rows are, for a reader.
    """

    dataset: TokenizedDataset
    components: Ints
    names: tuple[str, ...]
    called: str


@dataclass(frozen=True)
class Cosines:
    """How alike each two heads are: 1 the same, 0 nothing in common."""

    mean: float
    least: float


@dataclass(frozen=True)
class Routing:
    """What the routers did on `rows`.

    Attributes:
        components: their names.
        layers: by name; cosines: of a layer's heads.
    """

    rows: str
    components: tuple[str, ...]
    layers: dict[str, GateSummary]
    cosines: dict[str, Cosines]

    def means(self) -> dict[str, float]:
        """`MEANS`, those that are known."""
        found = {name: mean(map(value, self.layers.values())) for name, value in MEANS.items()}
        return {name: value for name, value in found.items() if value is not None}

    def save(self, file: Path) -> None:
        """Write all of it as JSON."""
        write_json(file, jsonable(asdict(self)))


Look = Callable[[], tuple[Mapping[str, float], Routing]]
"""`watch_routing` of a run: the scores on its rows, and what the routers did."""


def mean(values: Iterable[float | None]) -> float | None:
    """Of the known ones; None where none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def is_routed(model: PreTrainedModel) -> bool:
    """Whether `model` has routers that can be watched."""
    routed = any(isinstance(layer, HydraLinear) and layer.is_routed for layer in adapters(model).values())
    return routed and not model.config.is_encoder_decoder


def rows_to_watch(data: PreparedRun, intrinsic: Intrinsic | None) -> Watched:
    """The evaluation rows of a run; without such at most `MAX_TRAIN_ROWS` training rows, evenly spread."""
    found = None if intrinsic is None else intrinsic.components
    if data.eval is not None:
        labels, names = labelled(data.eval_examples, found, None if intrinsic is None else intrinsic.eval)
        return Watched(data.eval, labels, names, f"the {len(data.eval):,} evaluation rows")
    num_rows, num = len(data.train), min(len(data.train), MAX_TRAIN_ROWS)
    chosen = np.arange(num, dtype=np.int64) * num_rows // num
    examples = [data.train_examples[row] for row in chosen]
    labels, names = labelled(examples, found, None if intrinsic is None else intrinsic.train[chosen])
    return Watched(data.train.subset(chosen), labels, names, f"{num:,} training rows, as none are held out")


def labelled(
    examples: Sequence[Example], components: Components | None = None, assigned: Ints | None = None
) -> tuple[Ints, tuple[str, ...]]:
    """Of each row its component [rows] int64, as `assigned`, else its task; and what these are called."""
    if components is not None and assigned is not None:
        labels, names = assigned, tuple(" ".join(terms[:_NAME_TERMS]) for terms in components.terms)
    else:
        tasks = Counter(example.task for example in examples if example.task is not None)
        names = tuple(task for task, _ in tasks.most_common(MAX_TASKS))
        numbers = {name: number for number, name in enumerate(names)}
        labels = np.array([numbers.get(example.task or "", UNKNOWN) for example in examples], np.int64)
    # One kind of rows is nothing to agree with.
    return (labels, names) if len(names) > 1 else (np.full(len(examples), UNKNOWN, np.int64), ())


def other_rows_to_watch(folder: Path, dataset: TokenizedDataset, examples: Sequence[Example], name: str) -> Watched:
    """The rows of `lorica eval`, whose losses are told by task: agreement is with tasks, else with the components of
    the run in `folder`. Those that it found by the features of a model are left out: that would have to be loaded.
    """
    labels, names = labelled(examples)
    file = folder / COMPONENTS
    if not names and file.is_file() and (found := read_components(file)).settings["features"] == "tfidf":
        labels, names = labelled(examples, found, found.assign([text_of(example) for example in examples]))
    return Watched(dataset, labels, names, f"{len(dataset):,} rows of {name}")


def watch_routing(
    model: PreTrainedModel, loss_fn: LossFunction, task: RunTask, layout: Layout, rows: Watched, max_tokens: int
) -> tuple[Mapping[str, float], Routing]:
    """The task's scores on `rows`, as without anybody watching, and what the routers did."""
    everything = np.arange(len(rows.dataset), dtype=np.int64)
    parts = layout.parts(rows.dataset, everything, max_tokens)
    with watching(model, len(rows.names)) as watch:
        batches = (layout.make(rows.dataset, part) for part in parts)
        scores = task.scores(model, loss_fn, watch.over(batches, (rows.components[part] for part in parts)))
    return scores, routing_of(model, watch.summaries(), rows)


def scores_and_routing(look: Look, folder: Path) -> dict[str, float]:
    """The scores and the routers' means of one evaluation; layer by layer they replace `routing.json`."""
    scores, routing = look()
    routing.save(folder / FILE)
    return {**scores, **routing.means()}


def routing_of(model: PreTrainedModel, layers: dict[str, GateSummary], rows: Watched) -> Routing:
    """What was watched, beside the heads themselves."""
    heads = {name: layer.heads() for name, layer in adapters(model).items() if isinstance(layer, HydraLinear)}
    cosines = {}
    for name in layers:
        table = head_cosines(heads[name])
        pairs = table[torch.ones_like(table, dtype=torch.bool).tril(-1)]
        cosines[name] = Cosines(float(pairs.mean()), float(pairs.min()))
    return Routing(rows.called, rows.names, layers, cosines)
