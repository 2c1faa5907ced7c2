"""Counts against a slow count of the same terms, and their hash against nothing but itself: it may not change."""

from __future__ import annotations

import random
import re
import unicodedata

import numpy as np
import pytest

from lorica.data.features import MAX_CHARS, NUM_BUCKETS, counts, top_terms, words

TEXTS = [
    "The cat, the CAT and 12 cats.",
    "",
    "   \n",
    "今天天气很好，我们去公园。",
    "mixed 中文 and English; x = y[3] += 'ab'",
    "émile Straße ΑΒΓ",
    "चावल और हल्दी, e\u0301mile ที่นี่",
    "❤\ufe0f❤\ufe0f",
    "\ud800 half a pair",
    "😀😀 𠀀𠀁",
]


def terms(text: str) -> list[str]:
    """What the documentation calls terms, with a loop and regular expressions."""
    text = "".join("0" if char.isdecimal() else char for char in text[:MAX_CHARS].lower())
    found = []
    ideograph = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00010000-\U0010ffff"
    # What is written above, below or behind a letter belongs to it.
    marks = "".join({c for c in text if unicodedata.category(c) in ("Mn", "Mc")} - {"\ufe0f"}) or "\u0301"
    for run in re.findall(rf"(?:[^\W_{ideograph}]|[{marks}])+", text):
        found += [f"word {run}"] + [f"{n} {run[at : at + n]}" for n in (3, 4) for at in range(len(run) - n + 1)]
    for kind, pattern in (("ideographs", rf"[{ideograph}]+"), ("symbols", rf"(?:[^\w\s{ideograph}{marks}]|_)+")):
        found += [f"{kind} {run[at : at + 2]}" for run in re.findall(pattern, text) for at in range(len(run) - 1)]
    return found


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_has_as_many_terms_as_counted_by_hand(text: str) -> None:
    ours = sorted(counts([text]).data.astype(int))
    theirs = terms(text)
    assert ours == sorted(theirs.count(term) for term in set(theirs))


def test_equal_terms_fall_into_equal_buckets_and_others_spread_evenly() -> None:
    generator = random.Random(0)
    made = ["".join(generator.choices("abcdefghij", k=9)) for _ in range(2_000)]
    table = counts(made)
    assert (counts(made[::-1])[::-1] != table).nnz == 0
    num_terms = len({term for text in made for term in terms(text)})
    # Of N terms in B buckets, B (1 - exp(-N / B)) buckets are met.
    expected = NUM_BUCKETS * (1 - np.exp(-num_terms / NUM_BUCKETS))
    assert abs(len(np.unique(table.indices)) - expected) < 0.02 * expected


def test_the_rows_of_a_batch_are_counted_as_alone() -> None:
    together = counts(TEXTS).toarray()
    assert all((together[row] == counts([text]).toarray()).all() for row, text in enumerate(TEXTS))


def test_case_digits_and_what_is_too_long_do_not_count() -> None:
    assert (counts(["Room 101"]) != counts(["rOOM 999"])).nnz == 0
    assert (counts(["word " * MAX_CHARS]) != counts([("word " * MAX_CHARS)[:MAX_CHARS]])).nnz == 0
    assert counts([]).shape == (0, NUM_BUCKETS)


def test_words_and_the_terms_that_tell_a_group() -> None:
    assert words("Der Hund, 42 Hunde; 天气好 a") == {"der", "hund", "hunde", "天气", "气好"}
    assert words("चावल और हल्दी") == {"चावल", "और", "हल्दी"}
    groups = [["the apple is red", "the apple is sweet"], ["the engine is loud", "the engine is fast"], []]
    found = top_terms(groups, 1)
    assert found == [["apple"], ["engine"], []]
