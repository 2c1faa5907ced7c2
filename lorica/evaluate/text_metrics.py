"""Generated text against references: exact match, BLEU, ROUGE-L, chrF, each from 0 to 100.

BLEU (Papineni et al. 2002) and chrF (Popović 2015) are sacrebleu's corpus scores; ROUGE-L (Lin 2004) is rouge-score's
F1 with the best reference, averaged. Chinese is written without spaces: BLEU then takes sacrebleu's `zh` tokenizer, and
ROUGE-L a tokenizer of ours that takes such characters singly (rouge-score's own drops everything but a-z and 0-9).

What it gives up: stemming, and word segmentation of Chinese, Japanese and Thai.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from lorica.errors import DataError

References = Sequence[Sequence[str]]

# Han with its extensions and compatibility forms, and kana.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CJK_CHARACTER = re.compile(f"[{_CJK}]")
_TOKEN = re.compile(f"[{_CJK}]|[^\\W_{_CJK}]+")


def score(predictions: Sequence[str], references: References) -> dict[str, float]:
    """Every metric by its name."""
    metrics: tuple[Callable[[Sequence[str], References], float], ...] = (exact_match, bleu, rouge_l, chrf)
    return {metric.__name__: metric(predictions, references) for metric in metrics}


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Percentage of predictions that equal one of their references.

    Case and punctuation count; white space at the ends does not, and any run of it elsewhere counts as one space.
    """
    _check(predictions, references)
    return _mean(
        float(_normal(prediction) in map(_normal, several))
        for prediction, several in zip(predictions, references, strict=True)
    )


def bleu(predictions: Sequence[str], references: References) -> float:
    """sacrebleu's corpus BLEU, tokenizer `zh` where a reference holds Chinese characters, else `13a`.

    One departure: where all texts are shorter than four tokens, the longest n-gram that exists counts as the last
    (sacrebleu's `effective_order`), since the score would be 0 for perfect answers otherwise.
    """
    from sacrebleu.metrics import BLEU

    streams = _streams(predictions, references)
    chinese = any(_CJK_CHARACTER.search(reference) for several in references for reference in several)
    metric = BLEU(tokenize="zh" if chinese else "13a", effective_order=True)
    return float(metric.corpus_score(list(predictions), streams).score)


def chrf(predictions: Sequence[str], references: References) -> float:
    """sacrebleu's corpus chrF: F2 over character n-grams up to 6."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score(list(predictions), _streams(predictions, references)).score)


def rouge_l(predictions: Sequence[str], references: References) -> float:
    """Mean over the predictions of the ROUGE-L F1 with the best of their references."""
    from rouge_score.rouge_scorer import RougeScorer

    _check(predictions, references)
    scorer = RougeScorer(["rougeL"], tokenizer=_Tokenizer())
    return _mean(
        max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in several)
        for prediction, several in zip(predictions, references, strict=True)
    )


class _Tokenizer:
    """What rouge-score asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return _TOKEN.findall(text.lower())


def _normal(text: str) -> str:
    return " ".join(text.split())


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return 100.0 * sum(numbers) / len(numbers)


def _streams(predictions: Sequence[str], references: References) -> list[list[str | None]]:
    """References as sacrebleu reads them: the k-th list holds everyone's k-th reference, None where there is none."""
    _check(predictions, references)
    most = max(len(several) for several in references)
    return [[several[k] if k < len(several) else None for several in references] for k in range(most)]


def _check(predictions: Sequence[str], references: References) -> None:
    if len(predictions) != len(references):
        raise DataError(f"{len(predictions)} predictions cannot be scored against references for {len(references)}.")
    if not predictions:
        raise DataError("There are no predictions to score.")
    bare = [index for index, several in enumerate(references) if not any(text.strip() for text in several)]
    if bare:
        raise DataError(f"Predictions without a reference that is not empty cannot be scored: {_shortened(bare)}.")


def _shortened(indices: Sequence[int]) -> str:
    shown = ", ".join(f"number {index}" for index in indices[:10])
    return shown if len(indices) <= 10 else f"{shown} and {len(indices) - 10} more"
