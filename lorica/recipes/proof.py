"""Do two models say the same? The measure behind every save, merge and export."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

# Rounding a weight to its dtype once more moves the logits about as much as computing in that dtype does.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Agreement:
    """How close two models' logits are on the same tokens.

    max_difference: largest absolute difference of a logit. largest_logit: the scale to read it against.
    kl: mean Kullback-Leibler divergence in nats a token. top1: share of positions with the same most likely token.
    """

    max_difference: float
    largest_logit: float
    kl: float
    top1: float
    num_tokens: int
    tolerance: float

    @property
    def holds(self) -> bool:
        """Within the rounding of the models' dtype."""
        return self.max_difference <= self.tolerance * self.largest_logit


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits on `ids` [B, T] as float32 on the CPU, [B, T, V], in evaluation mode; the mode is restored."""
    training = model.training
    model.eval()
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()
    model.train(training)
    return logits


def agreement(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> Agreement:
    """Compare two models' logits [B, T, V]; `dtype` is what they computed in."""
    p, q = F.log_softmax(ours, -1), F.log_softmax(theirs, -1)
    return Agreement(
        max_difference=float((ours - theirs).abs().max()),
        largest_logit=float(ours.abs().max()),
        kl=float((p.exp() * (p - q)).sum(-1).mean()),
        top1=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        num_tokens=ours.shape[0] * ours.shape[1],
        tolerance=_TOLERANCE.get(dtype, 1e-4),
    )
