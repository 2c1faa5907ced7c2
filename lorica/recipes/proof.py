"""Do two models say the same? The measure behind every save, merge and export."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lorica.errors import AdapterError
from lorica.methods.attach import in_front

# Rounding a weight to its dtype once more moves the logits about as much as computing in that dtype does: so many parts
# of the largest logit, and so many nats a token.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_NOISE_NATS = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
# A merge that loses more than this share of what the adapter changes is no rounding, whatever the dtype.
_MOST_LOST = 0.2


@dataclass(frozen=True)
class Agreement:
    """How close two models' logits are on the same tokens.

    max_difference: largest absolute difference of a logit. largest_logit: the scale to read it against.
    kl: mean Kullback-Leibler divergence in nats a token. kept: share of the divergence from the base that is still
    there, 1 where nothing was lost. top1: share of positions with the same most likely token. tolerance: what rounding
    may move a logit by, as a share of the largest. noise: what it may make of `kl`.
    """

    max_difference: float
    largest_logit: float
    kl: float
    kept: float
    top1: float
    num_tokens: int
    tolerance: float
    noise: float

    @property
    def holds(self) -> bool:
        """Within the rounding of the models' dtype, and much nearer to each other than to the base."""
        near = self.max_difference <= self.tolerance * self.largest_logit
        return near and (self.kl <= self.noise or self.kept >= 1 - _MOST_LOST)


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits on `ids` [B, T] as float32 on the CPU, in evaluation mode; the mode is restored.

    [B, T, V]; of an encoder-decoder, whose decoder reads the same ids, too; of a classifier [B, C]. An adapted model
    reads them behind what its method wants there.
    """
    training = model.training
    model.eval()
    virtual, position = in_front(model)
    whole = torch.cat([torch.tensor(virtual, dtype=ids.dtype).expand(len(ids), -1), ids], 1).to(model.device)
    inputs = {"input_ids": whole}
    if position:
        inputs["position_ids"] = (torch.arange(whole.shape[1], device=whole.device) + position).expand_as(whole)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    logits: Tensor = model(**inputs, use_cache=False).logits.float().cpu()
    model.train(training)
    return logits[:, len(virtual) :] if logits.dim() == 3 else logits


def agreement(ours: Tensor, theirs: Tensor, base: Tensor, dtype: torch.dtype) -> Agreement:
    """Compare two models' logits [B, T, V], read against their common base's; `dtype` is what they computed in."""
    kl, from_base = _divergence(ours, theirs), _divergence(ours, base)
    return Agreement(
        max_difference=float((ours - theirs).abs().max()),
        largest_logit=float(ours.abs().max()),
        kl=kl,
        kept=1 - kl / from_base if from_base > 0 else 1.0,
        top1=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        num_tokens=ours.argmax(-1).numel(),
        tolerance=_TOLERANCE.get(dtype, 1e-4),
        noise=_NOISE_NATS.get(dtype, 1e-6),
    )


def check_read_back(before: Tensor, after: Tensor, device: torch.device, what: str) -> float:
    """The largest difference of a logit before saving and after reading back; AdapterError if there should be none.

    The CPU's forward is deterministic, so there it must be 0; a GPU's may add in another order.
    """
    difference = float((before - after).abs().max())
    allowed = 0.0 if device.type == "cpu" else _TOLERANCE[torch.bfloat16] * float(before.abs().max())
    if not difference <= allowed:
        raise AdapterError(f"{what}: read back, the logits differ by {difference:.3g}.")
    return difference


def _divergence(ours: Tensor, theirs: Tensor) -> float:
    p, q = F.log_softmax(ours, -1), F.log_softmax(theirs, -1)
    return max(0.0, float((p.exp() * (p - q)).sum(-1).mean()))
