"""How probable a model finds held-out text: token-weighted mean loss, perplexity, bits a byte.

The mean is over ALL trained tokens of the batches, so it does not depend on how they were batched. Perplexities compare
models of one tokenizer only; bits a byte compare across tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from lorica.data.packing import Batch
from lorica.errors import DataError
from lorica.models.loss import LossFunction


@dataclass(frozen=True, slots=True)
class Likelihood:
    """loss: mean of -ln p over `num_tokens` trained tokens, in nats. perplexity: exp(loss), inf where that overflows.

    bits_per_byte: -log2 p of all trained tokens over the bytes of their text; None where these were not given.
    """

    loss: float
    perplexity: float
    num_tokens: int
    bits_per_byte: float | None


def likelihood(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Iterable[Batch],
    *,
    num_bytes: int | None = None,
) -> Likelihood:
    """Likelihood of the trained tokens of `batches`, in evaluation mode and without gradients; the mode is restored.

    Args:
        loss_fn: gives the SUM of the token losses of a batch.
        num_bytes: UTF-8 bytes of the text of the trained tokens, for `bits_per_byte`.

    Raises:
        DataError: the batches hold no trained token.
    """
    device = next(model.parameters()).device
    total, num_tokens = 0.0, 0
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in batches:
                total += float(loss_fn(model, batch.to(device).model_inputs(), batch.targets))
                num_tokens += batch.num_targets
    finally:
        model.train(training)
    if num_tokens == 0:
        raise DataError("The evaluation data holds no token to predict: there is nothing to measure.")
    return summarize(total, num_tokens, num_bytes)


def summarize(total: float, num_tokens: int, num_bytes: int | None = None) -> Likelihood:
    """The figures that follow from `total`, the summed -ln p of `num_tokens` tokens."""
    loss = total / num_tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf
    return Likelihood(loss, perplexity, num_tokens, total / math.log(2) / num_bytes if num_bytes else None)
