"""Planted mixtures are recovered, one corpus is one component, and what was found can be kept and used again."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from planted import TOPICS, mixture, rows
from sklearn.metrics import adjusted_rand_score

from lorica.data import components as module
from lorica.data.components import Components, find_components
from lorica.errors import ConfigError, DataError


@pytest.mark.parametrize(
    "sizes",
    [
        {"birds": 40, "编程": 320},
        {"baking": 160, "courts": 40, "法律": 80},
        {"networks": 40, "旅行": 80, "birds": 120, "法律": 40, "编程": 60, "chess": 60},
    ],
    ids=lambda sizes: "+".join(sizes),
)
def test_planted_mixtures_are_found(sizes: dict[str, int]) -> None:
    texts, truth = mixture(sizes, 7)
    found = find_components(texts)
    assert found.num == len(sizes) == found.choices["overlap"]
    assert adjusted_rand_score(truth, found.labels) >= 0.9
    assert list(found.sizes) == sorted(np.bincount(found.labels).tolist(), reverse=True)
    assert sum(found.sizes) == len(texts)


def test_scripts_with_vowel_signs_are_told_apart_too() -> None:
    """Two topics in Hindi: their words would be cut at each vowel sign that stands behind its letter."""
    words = {
        "चावल दाल मसाला हल्दी प्याज टमाटर अदरक लहसुन धनिया मिर्च आटा नमक पनीर": (
            "{} और {} को धीमी आँच पर पकाइए।",
            "क्या {} की जगह {} डाल सकते हैं?",
        ),
        "अदालत वकील मुकदमा जमानत गवाह सबूत फैसला याचिका न्यायाधीश अपील संविधान अपराध सजा": (
            "{} के बारे में {} क्या कहती है?",
            "इस {} में {} को समझाइए।",
        ),
    }
    generator = random.Random(0)
    pairs = [
        (" ".join(generator.choice(forms).format(*generator.sample(said.split(), 2)) for _ in range(2)), topic)
        for topic, (said, forms) in enumerate(words.items())
        for _ in range(100)
    ]
    found = find_components([text for text, _ in pairs], max_components=3)
    assert found.num == 2 and adjusted_rand_score([topic for _, topic in pairs], found.labels) >= 0.9
    assert {word for terms in found.terms for word in terms} & {"मसाला", "हल्दी", "पकाइए"}


@pytest.mark.parametrize("topic", ["sailing", "法律"])
def test_a_single_topic_is_one_component(topic: str) -> None:
    assert find_components(rows(topic, 250, 3), max_components=4).num == 1


@pytest.mark.parametrize(
    "texts",
    [[""], ["one"], ["one", "two"], ["the same"] * 40, [""] * 30, ["你好，世界。"] * 12],
    ids=["empty", "one", "two", "same", "empties", "chinese"],
)
@pytest.mark.parametrize("method", ["kmeans", "dbscan"])
def test_few_or_equal_rows_are_one_component(texts: list[str], method: Any) -> None:
    found = find_components(texts, method=method)
    assert (found.num, found.sizes) == (1, (len(texts),)) and found.points.shape == (len(texts), 2)
    assert Components.from_json(found.to_json()).num == 1


def test_the_number_may_be_given() -> None:
    texts, truth = mixture({"sailing": 80, "baking": 80, "农业": 80}, 1)
    found = find_components(texts, num=3, max_components=3)
    assert found.num == 3 and adjusted_rand_score(truth, found.labels) >= 0.9
    assert find_components(texts, num=2, max_components=3).num == 2
    with pytest.raises(DataError, match="2 components are wanted, but the rows differ in 1 ways"):
        find_components(["same words"] * 30, num=2)


def test_never_more_than_wanted() -> None:
    texts, _ = mixture(dict.fromkeys(list(TOPICS)[:5], 50), 2)
    assert 2 <= find_components(texts, max_components=3).num <= 3
    assert find_components(texts, max_components=1).num == 1


@pytest.mark.parametrize("method", ["kmeans", "dbscan"])
def test_what_was_found_is_kept_and_assigns_new_rows(method: Any) -> None:
    sizes = {"birds": 120, "courts": 200}
    texts, truth = mixture(sizes, 5)
    found = find_components(texts, method=method, max_components=3)
    again = Components.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    assert (again.assign(texts) == found.labels).all() and found.labels.dtype == np.int64
    new, new_truth = mixture(sizes, 6)
    known = again.assign(new) >= 0
    assert known.mean() > 0.8 and adjusted_rand_score(np.array(new_truth)[known], again.assign(new)[known]) >= 0.9
    assert again.assign([]).shape == (0,)
    assert np.array(truth)[found.typical[0][0]] == 1, "the largest component comes first"
    assert set(found.terms[0]) & set(TOPICS["courts"][0].split()) and "falcon" not in found.terms[0]


@pytest.mark.filterwarnings("error")
def test_a_handful_of_texts_repeated_is_no_reason_to_warn() -> None:
    assert sum(find_components(["yes", "no", "maybe"] * 100, max_components=3).sizes) == 300


def test_dbscan_of_one_topic_is_one() -> None:
    assert find_components(rows("baking", 250, 3), method="dbscan", max_components=2).num == 1


def test_a_seed_decides_everything() -> None:
    texts, _ = mixture({"chess": 40, "旅行": 60}, 3)
    first, second = (find_components(texts, seed=4, max_components=3) for _ in range(2))
    assert first.to_json() == second.to_json() and (first.points == second.points).all()


def test_more_rows_than_the_sample_are_read_twice_and_all_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE_ROWS", 300)
    texts, truth = mixture({"networks": 900, "农业": 700}, 9)
    passes = 0

    def factory() -> Any:
        nonlocal passes
        passes += 1
        return iter(texts)

    found = find_components(factory, max_components=4)
    assert passes == 2 and found.settings["sampled_rows"] == 300 and len(found.labels) == 1600
    assert found.num == 2 and adjusted_rand_score(truth, found.labels) >= 0.9
    # Drawn from all of the rows, in equal shares.
    places, _, num_rows = module._draw(texts, 0)
    assert num_rows == 1600 and len(set(places.tolist())) == 300 and 600 < places.mean() < 1000


def test_features_of_a_model_take_the_place_of_tfidf() -> None:
    texts, truth = mixture({"sailing": 100, "法律": 100}, 4)
    known = dict(zip(texts, truth, strict=True))
    generator = np.random.default_rng(0)

    def encode(batch: Sequence[str]) -> Any:
        return np.eye(8)[[known[text] for text in batch]] + 5 + generator.normal(0, 0.05, (len(batch), 8))

    found = find_components(texts, features=encode, max_components=4)
    assert found.num == 2 and adjusted_rand_score(truth, found.labels) == 1
    again = Components.from_json(found.to_json())
    assert (again.assign(texts, encode) == found.labels).all()
    with pytest.raises(ConfigError, match="encode="):
        again.assign(texts)
    same = find_components(rows("sailing", 200, 0), features=lambda batch: generator.normal(size=(len(batch), 8)))
    assert same.num == 1


def test_arguments_that_cannot_be_meant() -> None:
    for wrong in (
        {"num": 0},
        {"max_components": 0},
        {"seed": -1},
        {"features": "bert"},
        {"method": "spectral"},
        {"num": 2, "method": "dbscan"},
    ):
        with pytest.raises(ConfigError):
            find_components(["a", "b"], **wrong)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="there is no row"):
        find_components([])


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 2}', '{"version": 1, "labels": "x"}'])
def test_what_is_no_such_json_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not components"):
        Components.from_json(text)


def test_json_whose_parts_do_not_fit_is_refused() -> None:
    good = json.loads(find_components(mixture({"birds": 30, "农业": 40}, 5)[0], max_components=2).to_json())
    assert Components.from_json(json.dumps(good)).num == 2
    nan, narrow = good["reach"] | {"float16": "AH4AfA=="}, {"shape": [2, 3], "float16": "A" * 16}
    for change, said in (
        ({"sizes": [70]}, "2 centres"),
        ({"labels": [0, 2]}, "from 0 to 1"),
        ({"labels": [[0], [1]]}, "labels"),
        ({"labels": [10**30]}, "not components"),
        ({"terms": [[1], [2]]}, "words"),
        ({"settings": {**good["settings"], "features": "bert"}}, "not known"),
        ({"settings": {}}, "features"),
        ({"settings": []}, "not components"),
        ({"centres": narrow}, "3 features"),
        ({"centres": narrow, "shape": {"shape": [3], "float16": "AAAAAAAA"}}, "3 features"),
        ({"reach": nan}, "finite"),
    ):
        with pytest.raises(DataError, match=said):
            Components.from_json(json.dumps({**good, **change}))
