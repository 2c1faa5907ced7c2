"""The intrinsic components of a corpus: which kinds of rows it consists of, and how many.

HydraLoRA (arXiv:2404.19245) takes one head for each. A sample of the rows is clustered (`clustering.py`), then every
row is assigned to the component whose centre is nearest by cosine, a batch at a time, so that a corpus of any length
takes the memory of the sample. What it gives up: a component with less than 3 % of the rows is not looked for.

    components = find_components(texts)
    components.num, components.labels, components.terms[0]
    Components.from_json(components.to_json()).assign(new_texts)
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lorica.data import clustering
from lorica.data.clustering import Criterion, Floats, Ints
from lorica.data.features import NUM_BUCKETS, counts, top_terms
from lorica.errors import ConfigError, DataError

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

SAMPLE_ROWS = 6_000
_BATCH_ROWS = 512
_SHOWN_ROWS, _TERM_ROWS, _MAP_ROWS = 3, 1_000, 2_000
_VERSION = 1

Encode = Callable[[Sequence[str]], Floats]
Texts = Sequence[str] | Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Components:
    """The components of a corpus, the largest first.

    labels: [rows] int64, -1 for the noise of DBSCAN. sizes: rows of each component. criteria: for each number of
    groups. choices: the number that each criterion would take; `overlap` is the one that decides. terms: the words that
    tell a component from the others. typical: for each, the numbers (from 0) of the rows nearest its centre.
    """

    labels: Ints
    sizes: tuple[int, ...]
    criteria: tuple[Criterion, ...]
    choices: dict[str, int]
    terms: tuple[tuple[str, ...], ...]
    typical: tuple[tuple[int, ...], ...]
    settings: dict[str, Any]
    # Of unit length, [num, buckets] or [num, d]. shape: what makes features comparable, the inverse document frequency
    # of each bucket or, for a model's features, their mean [d]. reach: the cosine below which a row is noise, [num].
    centres: Floats
    shape: Floats
    reach: Floats
    # Where rows of the sample lie on the map, [m, 2], and their labels [m]; not kept in JSON.
    points: Floats
    point_labels: Ints

    @property
    def num(self) -> int:
        """How many there are."""
        return len(self.sizes)

    def assign(self, texts: Sequence[str], encode: Encode | None = None) -> Ints:
        """The component of each text, [texts] int64, -1 for noise; `encode` where the features are a model's.

        Raises:
            ConfigError: `encode` is missing, or the features need none.
        """
        if (encode is None) != (self.settings["features"] == "tfidf"):
            raise ConfigError(
                f"these components were found with the features {self.settings['features']!r}; assign() takes encode= "
                "for features of a model, and only for them."
            )
        batches = (self._nearest(self._rows(batch, encode)) for batch in _batches(texts))
        return np.concatenate([np.empty(0, np.int64), *batches])

    def _rows(self, texts: Sequence[str], encode: Encode | None) -> Any:
        return _compared(counts(texts) if encode is None else encode(texts), self.shape)

    def _nearest(self, rows: Any) -> Ints:
        cosines = rows @ self.centres.T
        labels: Ints = cosines.argmax(1).astype(np.int64)
        if self.settings["method"] == "dbscan":
            labels[cosines.max(1) < self.reach[labels]] = -1
        return labels

    def to_json(self) -> str:
        """One JSON object that holds everything but the map; `from_json` reads it."""
        content = {
            "version": _VERSION,
            "num": self.num,
            "sizes": self.sizes,
            "settings": self.settings,
            "choices": self.choices,
            "criteria": [asdict(criterion) for criterion in self.criteria],
            "terms": self.terms,
            "typical": self.typical,
            "labels": self.labels.tolist(),
            "centres": _packed(self.centres),
            "shape": _packed(self.shape),
            "reach": _packed(self.reach),
        }
        return json.dumps(content, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Components:
        """What `to_json` wrote.

        Raises:
            DataError: it is no such text.
        """
        try:
            content = json.loads(text)
            if content["version"] != _VERSION:
                raise ValueError(f"version {content['version']} is not known")
            found = cls(
                np.array(content["labels"], np.int64),
                tuple(content["sizes"]),
                tuple(Criterion(**criterion) for criterion in content["criteria"]),
                content["choices"],
                tuple(map(tuple, content["terms"])),
                tuple(map(tuple, content["typical"])),
                content["settings"],
                _unpacked(content["centres"]),
                _unpacked(content["shape"]),
                _unpacked(content["reach"]),
                np.empty((0, 2)),
                np.empty(0, np.int64),
            )
            found._check()
            return found
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            raise DataError(
                f"not components as `lorica components` writes them: {type(error).__name__}: {error}"
            ) from None

    def _check(self) -> None:
        """ValueError where parts do not fit one another: a file may be cut, edited, or of something else."""
        num, width = self.centres.shape
        if num < 1 or {len(part) for part in (self.sizes, self.terms, self.typical, self.reach)} != {num}:
            raise ValueError(f"sizes, terms, typical rows and reach are not those of {num} centres")
        if self.labels.ndim != 1 or not -1 <= self.labels.min(initial=0) <= self.labels.max(initial=0) < num:
            raise ValueError(f"labels are not numbers from 0 to {num - 1}, or -1")
        if not all(isinstance(term, str) for terms in self.terms for term in terms):
            raise ValueError("terms are not words")
        if self.settings["features"] not in ("tfidf", "hidden") or self.settings["method"] not in ("kmeans", "dbscan"):
            raise ValueError(f"settings {self.settings} are not known")
        if self.shape.shape != (width,) or (self.settings["features"] == "tfidf" and width != NUM_BUCKETS):
            raise ValueError(f"centres have {width} features, which are not those of these settings")
        if not all(np.isfinite(part).all() for part in (self.centres, self.shape, self.reach)):
            raise ValueError("some numbers are not finite")


def find_components(
    texts: Texts,
    *,
    features: Literal["tfidf"] | Encode = "tfidf",
    method: Literal["kmeans", "dbscan"] = "kmeans",
    num: int | None = None,
    max_components: int = 8,
    seed: int = 0,
) -> Components:
    """Find the components of a corpus.

    texts: a sequence, or a function that gives the texts anew each time it is called, for more rows than memory holds.
    features: "tfidf", or a function from texts to features [texts, d], such as a model's mean hidden states.
    num: how many components, if known; else found, between 1 and `max_components`.

    Raises:
        DataError: there is no text, or fewer different ones than `num`.
        ConfigError: an argument that cannot be meant.
    """
    _check_arguments(features, method, num, max_components, seed)
    encode = None if isinstance(features, str) else features
    places, sample, num_rows = _draw(texts, seed)
    settings = {
        "features": "tfidf" if encode is None else "hidden",
        "method": method,
        "num": num,
        "max_components": max_components,
        "seed": seed,
        "sampled_rows": len(sample),
    }
    table = _counted(sample)
    raw = table if encode is None else _encoded(sample, encode)
    found = _with_centres(raw, _grouped(raw, table, settings), settings)
    groups = [np.flatnonzero(found.labels == label) for label in range(len(found.centres))]
    terms = top_terms([[sample[row] for row in group[:_TERM_ROWS]] for group in groups])
    labels = found.labels
    if num_rows > len(sample):
        labels = np.concatenate([found._nearest(found._rows(batch, encode)) for batch in _batches(texts)])
    sizes = np.bincount(labels[labels >= 0], minlength=len(groups))
    order = np.argsort(-sizes, kind="stable")
    return replace(
        found,
        labels=_numbered(labels, order),
        sizes=tuple(sizes[order].tolist()),
        terms=tuple(tuple(terms[label]) for label in order),
        typical=tuple(tuple(places[list(found.typical[label])].tolist()) for label in order),
        centres=found.centres[order],
        reach=found.reach[order],
        point_labels=_numbered(found.point_labels, order),
    )


def _check_arguments(features: object, method: str, num: int | None, max_components: int, seed: int) -> None:
    if (num is not None and num < 1) or max_components < 1 or seed < 0:
        raise ConfigError(
            f"num is {num}, max_components {max_components} and seed {seed}; wanted are 1 or more, or None for num, "
            "1 or more, and 0 or more."
        )
    if method not in ("kmeans", "dbscan"):
        raise ConfigError(f"method is {method!r}; 'kmeans' or 'dbscan' is wanted.")
    if method == "dbscan" and num is not None:
        raise ConfigError("DBSCAN finds the number itself; leave num out, or take method='kmeans'.")
    if isinstance(features, str) and features != "tfidf":
        raise ConfigError(f"features are {features!r}; 'tfidf' or a function from texts to arrays is wanted.")


@dataclass(frozen=True)
class _Groups:
    """Of a sample: labels [n], its rows as points [n, d], and what the criteria say."""

    labels: Ints
    points: Floats
    criteria: tuple[Criterion, ...]
    choices: dict[str, int]


def _grouped(raw: Any, table: csr_matrix, settings: dict[str, Any]) -> _Groups:
    """The groups of the rows with the features `raw`, whose terms are counted in `table`; -1 for noise."""
    num, most, seed = settings["num"], settings["max_components"], settings["seed"]
    present = table.copy()
    present.data[:] = 1

    def embed(inside: Ints) -> Floats:
        part = raw[inside]
        is_model = isinstance(part, np.ndarray)
        return clustering.embed(part if is_model else clustering.weigh(part, clustering.idf(part)), seed)

    points = embed(np.arange(table.shape[0]))
    num_different = len(np.unique(points.round(6), axis=0))
    if num is not None and num > num_different:
        raise DataError(f"{num} components are wanted, but the rows differ in {num_different} ways only.")
    criteria = clustering.judge(points, most, seed)
    labels = clustering.divide(present, embed, max_components=most, seed=seed)
    choices = {**clustering.choices(criteria), "overlap": int(labels.max()) + 1}
    if settings["method"] == "dbscan":
        labels = clustering.dbscan(points, present, seed)
        choices["dbscan"] = int(labels.max()) + 1
        # If all is noise, it is one component.
        labels = labels if labels.max() >= 0 else np.zeros_like(labels)
    elif num is not None:
        labels = clustering.kmeans(points, num, seed)
    return _Groups(labels, points, tuple(criteria), choices)


def _with_centres(raw: Any, groups: _Groups, settings: dict[str, Any]) -> Components:
    """The components of the sample, as they assign any row: to the nearest centre. `typical`: places in the sample."""
    shape = _halved(raw.mean(0) if isinstance(raw, np.ndarray) else clustering.idf(raw))
    rows = _compared(raw, shape)
    centres = _halved(clustering.unit(clustering.centres(rows, groups.labels)))
    cosines = rows @ centres.T
    # Farther out than 98 % of a component's own rows is noise.
    own = [cosines[groups.labels == label, label] for label in range(len(centres))]
    reach = _halved(np.array([np.quantile(part, 0.02) for part in own]))
    points = _flat(groups.points, groups.labels)[:_MAP_ROWS]
    none = np.empty(0, np.int64)
    found = Components(none, (), groups.criteria, groups.choices, (), (), settings, centres, shape, reach, points, none)
    labels = found._nearest(rows)
    inside = [np.flatnonzero(labels == label) for label in range(len(centres))]
    nearest = [part[np.argsort(-cosines[part, label], kind="stable")] for label, part in enumerate(inside)]
    typical = tuple(tuple(part[:_SHOWN_ROWS].tolist()) for part in nearest)
    return replace(found, labels=labels, typical=typical, point_labels=labels[:_MAP_ROWS])


def _draw(texts: Texts, seed: int) -> tuple[Ints, list[str], int]:
    """Places and texts of `SAMPLE_ROWS` rows drawn at random, all if there are no more, and the number of all rows."""
    generator = np.random.default_rng(seed)
    places: list[int] = []
    sample: list[str] = []
    place = -1
    for place, text in enumerate(texts() if callable(texts) else texts):
        if place < SAMPLE_ROWS:
            places.append(place)
            sample.append(text)
        elif (at := int(generator.integers(place + 1))) < SAMPLE_ROWS:
            places[at], sample[at] = place, text
    if not sample:
        raise DataError("there is no row to find components in.")
    return np.array(places, np.int64), sample, place + 1


def _batches(texts: Texts) -> Iterator[list[str]]:
    rows = iter(texts() if callable(texts) else texts)
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield batch


def _counted(texts: Sequence[str]) -> csr_matrix:
    """The counts of many texts, a batch at a time: counting takes a hundred times as much memory as its result."""
    from scipy.sparse import vstack

    return vstack([counts(batch) for batch in _batches(texts)], "csr")


def _encoded(texts: Sequence[str], encode: Encode) -> Floats:
    parts = [np.asarray(encode(batch), np.float32) for batch in _batches(texts)]
    return np.concatenate(parts)


def _compared(raw: Any, shape: Floats) -> Any:
    """Features as they are compared, rows of unit length: counts weighed, or a model's features without their mean."""
    return clustering.unit(raw - shape) if isinstance(raw, np.ndarray) else clustering.weigh(raw, shape)


def _numbered(labels: Ints, order: Ints) -> Ints:
    """Labels as their places in `order`; -1 stays."""
    numbers: Ints = np.where(labels >= 0, np.argsort(order)[labels], -1)
    return numbers


def _flat(points: Floats, labels: Ints) -> Floats:
    """Points [n, 2] as seen where the components lie farthest apart; what is left of two directions shows the rows."""
    centred = points - points.mean(0)
    middles = np.stack([centred[labels == label].mean(0) for label in range(int(labels.max()) + 1)])
    weights = np.sqrt(np.bincount(labels[labels >= 0]))[:, None]
    between = np.linalg.svd((middles - middles.mean(0)) * weights, full_matrices=False)[2][: len(middles) - 1][:2]
    rest = centred - centred @ between.T @ between
    axes = np.concatenate([between, np.linalg.svd(rest, full_matrices=False)[2]])[:2]
    flat: Floats = centred @ axes.T
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))


def _halved(values: Floats) -> Floats:
    """Rounded to what JSON keeps, so that rows read back are assigned as they were."""
    return values.astype(np.float16).astype(np.float32)


def _packed(values: Floats) -> dict[str, Any]:
    """16-bit numbers in base64: in decimal they would take five times as much."""
    data = base64.b64encode(np.ascontiguousarray(values, "<f2").tobytes()).decode()
    return {"shape": values.shape, "float16": data}


def _unpacked(value: dict[str, Any]) -> Floats:
    flat = np.frombuffer(base64.b64decode(value["float16"], validate=True), "<f2")
    return flat.reshape(value["shape"]).astype(np.float32)
