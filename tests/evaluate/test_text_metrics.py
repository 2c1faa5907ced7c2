"""Metrics against sacrebleu, rouge-score and counts by hand."""

from __future__ import annotations

import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from lorica.errors import DataError
from lorica.evaluate import text_metrics

PREDICTIONS = ["the cat sat on the mat", "a quick brown fox runs over the dog", "nothing like it"]
REFERENCES = [
    ["the cat sat on the red mat", "a cat was on the mat"],
    ["the quick brown fox jumps over the lazy dog"],
    ["an answer of another kind", "something else"],
]


def test_exact_match_ignores_white_space_only() -> None:
    predictions = ["  Room\n 12 ", "room 12", "Room 12.", ""]
    assert text_metrics.exact_match(predictions, [["no", "Room 12"]] * 4) == 25.0


def test_bleu_and_chrf_are_sacrebleus_corpus_scores() -> None:
    streams = [
        [REFERENCES[0][0], REFERENCES[1][0], REFERENCES[2][0]],
        [REFERENCES[0][1], None, REFERENCES[2][1]],
    ]
    bleu, chrf = sacrebleu.corpus_bleu(PREDICTIONS, streams).score, sacrebleu.corpus_chrf(PREDICTIONS, streams).score
    assert 0 < bleu < 100
    assert text_metrics.bleu(PREDICTIONS, REFERENCES) == pytest.approx(bleu)
    assert text_metrics.chrf(PREDICTIONS, REFERENCES) == pytest.approx(chrf)


def test_chinese_bleu_uses_the_zh_tokenizer() -> None:
    predictions, references = ["今天的天气很好，我们去公园。"], ["今天天气很好，我们去公园玩。"]
    expected = sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score
    assert expected > 10 > sacrebleu.corpus_bleu(predictions, [references]).score
    assert text_metrics.bleu(predictions, [references]) == pytest.approx(expected)


def test_bleu_of_short_answers_is_not_zero() -> None:
    assert text_metrics.bleu(["B-214", "Orla"], [["B-214"], ["Orla"]]) == pytest.approx(100.0)


def test_rouge_l_is_rouge_scores_on_english() -> None:
    scorer = RougeScorer(["rougeL"])
    pairs = zip(PREDICTIONS, REFERENCES, strict=True)
    best = [max(scorer.score(r, p)["rougeL"].fmeasure for r in several) for p, several in pairs]
    assert text_metrics.rouge_l(PREDICTIONS, REFERENCES) == pytest.approx(100 * sum(best) / 3)


def test_rouge_l_takes_chinese_characters_singly() -> None:
    # Longest common subsequence 我 去 公 园 of 4 and 5 characters: precision 4/4, recall 4/5.
    assert text_metrics.rouge_l(["我去公园"], [["我们去公园"]]) == pytest.approx(100 * 2 * 0.8 / 1.8)
    assert text_metrics.rouge_l(["用 LoRA 训练"], [["用lora训练"]]) == pytest.approx(100.0)


def test_empty_predictions_score_zero() -> None:
    scores = text_metrics.score(["", " "], [["something"], ["else"]])
    assert scores == {"exact_match": 0.0, "bleu": 0.0, "rouge_l": 0.0, "chrf": 0.0}


def test_perfect_predictions_score_a_hundred() -> None:
    texts = ["one two three four five", "六七八九十"]
    scores = text_metrics.score(texts, [[text] for text in texts])
    assert scores == pytest.approx(dict.fromkeys(("exact_match", "bleu", "rouge_l", "chrf"), 100.0))


@pytest.mark.parametrize("metric", ["exact_match", "bleu", "rouge_l", "chrf"])
@pytest.mark.parametrize(
    ("predictions", "references", "says"),
    [
        ([], [], "no predictions"),
        (["a"], [["a"], ["b"]], "1 predictions"),
        (["a", "b", "c"], [["a"], [], [" "]], "number 1, number 2"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    metric: str, predictions: list[str], references: list[list[str]], says: str
) -> None:
    with pytest.raises(DataError, match=says):
        getattr(text_metrics, metric)(predictions, references)
