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
from typing import Any, Literal

import numpy as np

from lorica.data import clustering
from lorica.data.clustering import Criterion, Floats, Ints
from lorica.data.features import counts, top_terms
from lorica.errors import ConfigError, DataError

SAMPLE_ROWS = 6_000
_BATCH_ROWS = 1_024
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
            return cls(
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
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"not components as `lorica components` writes them: {type(error).__name__}: {error}"
            ) from None


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
    if (num is not None and num < 1) or max_components < 1 or seed < 0:
        raise ConfigError(
            f"num is {num}, max_components {max_components} and seed {seed}; wanted are 1 or more, or None for num, "
            "1 or more, and 0 or more."
        )
    if method == "dbscan" and num is not None:
        raise ConfigError("DBSCAN finds the number itself; leave num out, or take method='kmeans'.")
    if isinstance(features, str) and features != "tfidf":
        raise ConfigError(f"features are {features!r}; 'tfidf' or a function from texts to arrays is wanted.")
    encode = None if isinstance(features, str) else features
    places, sample, num_rows = _draw(texts, seed)
    table = counts(sample)
    present = table.copy()
    present.data[:] = 1
    raw = table if encode is None else _encoded(sample, encode)
    shape = _halved(clustering.idf(table) if encode is None else raw.mean(0))
    rows = _compared(raw, shape)

    def embed(inside: Ints) -> Floats:
        part = raw[inside]
        return clustering.embed(part if encode is not None else clustering.weigh(part, clustering.idf(part)), seed)

    points = embed(np.arange(len(sample)))
    num_different = len(np.unique(points.round(6), axis=0))
    if num is not None and num > num_different:
        raise DataError(f"{num} components are wanted, but the rows differ in {num_different} ways only.")
    criteria = clustering.judge(points, max_components, seed)
    labels = clustering.divide(present, embed, max_components=max_components, seed=seed)
    chosen = {**clustering.choices(criteria), "overlap": int(labels.max()) + 1}
    if method == "dbscan":
        labels = clustering.dbscan(points, present, seed)
        chosen["dbscan"] = int(labels.max()) + 1
    elif num is not None:
        labels = clustering.kmeans(points, num, seed)
    settings = {
        "features": "tfidf" if encode is None else "hidden",
        "method": method,
        "num": num,
        "max_components": max_components,
        "seed": seed,
        "sampled_rows": len(sample),
    }
    labels = _largest_first(labels)
    centres = _halved(clustering.unit(clustering.centres(rows, labels)))
    cosines = rows @ centres.T
    # Farther out than 98 % of a component's own rows is noise.
    reach = _halved(np.array([np.quantile(cosines[labels == label, label], 0.02) for label in range(len(centres))]))
    flat = _flat(points, labels)[:_MAP_ROWS]
    found = Components(
        labels, (), tuple(criteria), chosen, (), (), settings, centres, shape, reach, flat, labels[:_MAP_ROWS]
    )
    labels = found._nearest(rows)
    groups = [np.flatnonzero(labels == label) for label in range(len(centres))]
    terms = top_terms([[sample[row] for row in group[:_TERM_ROWS]] for group in groups])
    typical = [g[np.argsort(-cosines[g, label], kind="stable")][:_SHOWN_ROWS] for label, g in enumerate(groups)]
    everything = labels
    if num_rows > len(sample):
        everything = np.concatenate([found._nearest(found._rows(batch, encode)) for batch in _batches(texts)])
    return replace(
        found,
        labels=everything,
        sizes=tuple(int((everything == label).sum()) for label in range(len(centres))),
        terms=tuple(tuple(words) for words in terms),
        typical=tuple(tuple(int(places[row]) for row in rows_of) for rows_of in typical),
        point_labels=labels[:_MAP_ROWS],
    )


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


def _encoded(texts: Sequence[str], encode: Encode) -> Floats:
    parts = [np.asarray(encode(batch), np.float32) for batch in _batches(texts)]
    return np.concatenate(parts)


def _compared(raw: Any, shape: Floats) -> Any:
    """Features as they are compared, rows of unit length: counts weighed, or a model's features without their mean."""
    return clustering.unit(raw - shape) if isinstance(raw, np.ndarray) else clustering.weigh(raw, shape)


def _largest_first(labels: Ints) -> Ints:
    """Labels numbered anew by size; if all is noise, it is one component."""
    if labels.max() < 0:
        return np.zeros_like(labels)
    sizes = np.bincount(labels[labels >= 0])
    rank = np.empty_like(sizes)
    rank[np.argsort(-sizes, kind="stable")] = np.arange(len(sizes))
    return np.where(labels >= 0, rank[labels], -1)


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
