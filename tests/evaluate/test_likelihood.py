"""Likelihood against cross-entropies of transformers' own logits in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lorica.data.packing import pad
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import DataError
from lorica.evaluate.likelihood import likelihood, summarize
from lorica.models.loss import logits_loss

# (input_ids, labels)
ROWS = [
    ([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9]),
    ([9, 8, 7], [-100, 8, 7]),
    ([4] * 12, [-100] * 11 + [4]),
]


def expected_losses(model: Any) -> list[float]:
    """-ln p of every trained token, each sample alone, in float64."""
    losses = []
    for ids, labels in ROWS:
        with torch.no_grad():
            logits = model.double()(input_ids=torch.tensor([ids])).logits[0]
        log_p = torch.log_softmax(logits, -1)
        losses += [-float(log_p[t - 1, label]) for t, label in enumerate(labels) if label != -100]
    model.float()
    return losses


def test_mean_over_all_trained_tokens(tiny_llama: Callable[..., Any]) -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    samples = [(np.array(ids, np.int32), np.array(labels, np.int32)) for ids, labels in ROWS]
    dataset = TokenizedDataset.from_samples(samples)
    losses = expected_losses(model.eval())
    model.train()
    for cuts in ([[0, 1, 2]], [[2], [0, 1]], [[0], [1], [2]]):
        batches = [pad(dataset, np.array(cut), 3) for cut in cuts]
        got = likelihood(model, logits_loss, batches, num_bytes=20)
        assert got.num_tokens == len(losses) == 6
        assert got.loss == pytest.approx(sum(losses) / 6, rel=1e-5)
        assert got.perplexity == pytest.approx(math.exp(sum(losses) / 6), rel=1e-4)
        assert got.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / 20, rel=1e-5)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_nothing_to_predict_is_an_error(tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="no token to predict"):
        likelihood(tiny_llama(), logits_loss, [])


def test_a_hopeless_loss_has_infinite_perplexity() -> None:
    assert summarize(8000.0, 10).perplexity == math.inf
    assert summarize(20.0, 10).bits_per_byte is None
