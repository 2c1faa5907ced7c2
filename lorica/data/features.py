"""Texts to hashed counts of their words and character n-grams: features of any language, without a vocabulary.

A term is a word, 3 or 4 letters within a word, or 2 neighbouring ideographs or symbols; so Chinese works without a
segmenter, and code by its punctuation. Vowel signs and accents that stand behind their letter belong to it, or Hindi
would fall apart. Upper and lower case are one, and so are all digits. A term's bucket is a
polynomial hash that is the same on every machine, so nothing has to be kept to read new rows. The counting is numpy
over all characters of a batch at once: a loop over n-grams in Python would take ten times as long. What it gives up:
terms of one bucket are not told apart, and only the first `MAX_CHARS` characters of a text count.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

NUM_BUCKETS = 1 << 16
MAX_CHARS = 4_000

_OTHER, _LETTER, _IDEOGRAPH, _SYMBOL = 0, 1, 2, 3
_NGRAMS = ((_LETTER, 3), (_LETTER, 4), (_IDEOGRAPH, 2), (_SYMBOL, 2))
_BASE = 0x9E3779B97F4A7C15  # odd, 2^64 / golden ratio: Knuth's multiplicative hashing
_IDEOGRAPHS = ((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF))


def counts(texts: Sequence[str]) -> csr_matrix:
    """How often each term stands in each text: [texts, NUM_BUCKETS] float32, sparse."""
    from scipy.sparse import csr_matrix

    lowered = [text[:MAX_CHARS].lower() + "\n" for text in texts]
    codes = np.frombuffer("".join(lowered).encode("utf-32-le", "surrogatepass"), np.uint32)
    rows = np.repeat(np.arange(len(texts)), [len(text) for text in lowered])
    short = np.minimum(codes, 0xFFFF)
    kinds = _kinds()[short]
    letters = np.where(_digits()[short], ord("0"), codes).astype(np.uint64)
    keys = [_words(letters, rows, kinds), *(_ngrams(letters, rows, kinds, kind, n) for kind, n in _NGRAMS)]
    unique, times = np.unique(np.concatenate(keys), return_counts=True)
    borders = np.searchsorted(unique, np.arange(len(texts) + 1) * NUM_BUCKETS)
    values = (times.astype(np.float32), (unique % NUM_BUCKETS).astype(np.int32), borders)
    return csr_matrix(values, shape=(len(texts), NUM_BUCKETS))


def words(text: str) -> set[str]:
    """The words of a text as people read them, and pairs of neighbouring ideographs."""
    found: set[str] = set()
    for run in _word().findall(text[:MAX_CHARS].lower()):
        ideographs = any(first <= ord(run[0]) <= last for first, last in _IDEOGRAPHS)
        found.update({run[at : at + 2] for at in range(len(run) - 1)} if ideographs else {run})
    return found


def top_terms(groups: Sequence[Sequence[str]], num: int = 10) -> list[list[str]]:
    """For each group of texts the words that tell it from the others; for a single group those that it is about.

    Scored by p log(p / q), the word's part of the divergence, with p and q the shares of the group's texts and of the
    others' that have it.
    """
    tables = [Counter(word for text in texts for word in words(text)) for texts in groups]
    total: Counter[str] = sum(tables, Counter())
    num_texts = sum(map(len, groups))
    terms = []
    for texts, table in zip(groups, tables, strict=True):
        rest, num_rest = total - table, num_texts - len(texts)
        scores = {}
        for word, count in table.items():
            p = count / len(texts)
            scores[word] = p * np.log(p / ((rest[word] + 0.5) / (num_rest + 1) if num_rest else p * p))
        terms.append(sorted(scores, key=lambda word: (-scores[word], word))[:num])
    return terms


def _words(codes: NDArray[np.uint64], rows: NDArray[np.int64], kinds: NDArray[np.int8]) -> NDArray[np.int64]:
    """Keys, row * NUM_BUCKETS + bucket, of all words."""
    inside = kinds == _LETTER
    starts = np.flatnonzero(inside & ~np.r_[False, inside[:-1]])
    if not len(starts):
        return np.empty(0, np.int64)
    # What stands between two words counts as zero, so that the sum from one start to the next is the word's.
    place = np.arange(len(codes)) - np.repeat(np.r_[0, starts], np.diff(np.r_[0, starts, len(codes)]))
    terms = np.where(inside, codes, 0) * _powers(int(place.max()) + 1)[place]
    return _keys(np.add.reduceat(terms, starts), rows[starts], 0)


def _ngrams(
    codes: NDArray[np.uint64], rows: NDArray[np.int64], kinds: NDArray[np.int8], kind: int, n: int
) -> NDArray[np.int64]:
    """Keys of all runs of `n` neighbouring characters of one kind."""
    num = max(0, len(codes) - n + 1)
    whole, hashes = np.ones(num, bool), np.zeros(num, np.uint64)
    for offset, power in enumerate(_powers(n)):
        whole &= kinds[offset : offset + num] == kind
        hashes += codes[offset : offset + num] * power
    return _keys(hashes[whole], rows[:num][whole], 10 * kind + n)


def _keys(hashes: NDArray[np.uint64], rows: NDArray[np.int64], salt: int) -> NDArray[np.int64]:
    mixed = (hashes + np.uint64(salt)) * np.uint64(_BASE)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(_BASE)
    return rows * NUM_BUCKETS + (mixed >> np.uint64(48)).astype(np.int64)


def _powers(num: int) -> NDArray[np.uint64]:
    """_BASE to the powers 1 to num, modulo 2^64."""
    return np.cumprod(np.full(num, _BASE, np.uint64), dtype=np.uint64)


def _is_mark(character: str) -> bool:
    """Whether it is part of the letter before it. What chooses between pictures of one emoji is not."""
    return unicodedata.category(character)[0] == "M" and not "\ufe00" <= character <= "\ufe0f"


@cache
def _word() -> re.Pattern[str]:
    """A run of ideographs, or two letters and more."""
    ideographs = "".join(f"{chr(first)}-{chr(last)}" for first, last in _IDEOGRAPHS)
    marks = "".join(filter(_is_mark, map(chr, range(0x300, 0x10000))))
    return re.compile(rf"[{ideographs}]+|(?:[^\W\d_{ideographs}][{marks}]*){{2,}}")


@cache
def _kinds() -> NDArray[np.int8]:
    """What a character is, by its code up to 0xFFFF, which stands for all beyond: rare ideographs and emoji."""
    characters = map(chr, range(0x10000))
    kinds = [_LETTER if c.isalnum() or _is_mark(c) else _OTHER if c.isspace() else _SYMBOL for c in characters]
    for first, last in (*_IDEOGRAPHS, (0xFFFF, 0xFFFF)):
        kinds[first : last + 1] = [_IDEOGRAPH] * (last - first + 1)
    return np.array(kinds, np.int8)


@cache
def _digits() -> NDArray[np.bool_]:
    return np.array([chr(code).isdecimal() for code in range(0x10000)])
