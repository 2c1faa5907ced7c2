"""Next-token cross-entropy that never makes the [tokens, vocabulary] logits.

The model runs up to its last hidden states; only the positions that are trained go through the output head, a few
hundred at a time, and each chunk's gradient is taken on the spot, so what survives a chunk is one gradient of the
hidden states (Cut Cross-Entropy, arXiv 2411.09009, and Liger, arXiv 2410.10989, keep as little; theirs are CUDA
kernels). With a vocabulary of 49,152 and 2,048 tokens that replaces 400 MB of float32 logits, and as much again for
their gradient, by one chunk of 64 MB (131 where the vocabulary has 128,256 entries), whose logits become their own
gradient (kernels/cross_entropy.py).

What a model does to its logits after the head (scaling, soft-capping) is checked, not trusted: `make_loss` compares
with the model's own logits once, on a few tokens. Where nothing matches, the model computes its logits itself, at the
trained positions only.

What it gives up: evaluation and training make their logits twice if both are asked for.

Shapes: N trained positions, E hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from lorica.kernels.cross_entropy import cross_entropy_
from lorica.kernels.linear import is_widened
from lorica.models.classifier import packed_exit, row_logits
from lorica.models.tasks import CLASSIFICATION, task_of

IGNORED = -100
_CHUNK_BYTES = 1 << 26
_ROUND_TO = 64
_FEWEST_ROWS = 256
"""A product of fewer rows spends its time on reading the head's weight: a large vocabulary gets more memory instead."""

LossFunction = Callable[[PreTrainedModel, Mapping[str, Any], Tensor], Tensor]
"""(model, keywords for the model, targets on the CPU) -> sum of the losses, a float32 scalar.

targets [B, T]: the token to predict at position t (of the answer, for seq2seq), or -100 where nothing is trained.
For a classifier [B]: the class of each row.
"""


@dataclass(frozen=True)
class PostProcessing:
    """What a model does to its logits x: cap tanh(scale x / cap), or scale x."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """As a model does it, in the logits' dtype."""
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def make_loss(model: PreTrainedModel) -> LossFunction:
    """The loss for `model`: from its hidden states where that provably equals its own logits, else from its logits."""
    if task_of(model) is CLASSIFICATION:
        # Tried before there are adapters in it.
        packed_exit(model)
        return class_loss
    head = model.get_output_embeddings()
    if head is None:
        return logits_loss
    if next(model.parameters()).device.type == "meta" or _is_fake(model):
        return _hidden_states_loss(_post_processing(model)[0])
    for after in _post_processing(model):
        if _agrees(model, after):
            return _hidden_states_loss(after)
    return logits_loss


def _hidden_states_loss(after: PostProcessing) -> LossFunction:
    def loss(model: PreTrainedModel, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
        hidden = _last_hidden_state(model, inputs)
        assert hidden is not None
        positions, wanted = _trained_positions(targets, hidden.device)
        return chunked_cross_entropy(hidden.flatten(0, 1)[positions], wanted, _head(model), after)

    return loss


def class_loss(model: PreTrainedModel, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    """Sum over the rows of -log softmax(logits)[class], by a classifier's own forward."""
    logits = row_logits(model, inputs, len(targets))
    return F.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum")


def logits_loss(model: PreTrainedModel, inputs: Mapping[str, Any], targets: Tensor) -> Tensor:
    """The loss by the model's own forward, with logits at the trained positions only where B is 1."""
    device = model.device
    positions, wanted = _trained_positions(targets, device)
    keep = {"logits_to_keep": positions} if targets.shape[0] == 1 and "decoder_input_ids" not in inputs else {}
    logits = model(**inputs, use_cache=False, **keep).logits
    rows = logits[0] if keep and logits.shape[1] == len(positions) else logits.flatten(0, 1)[positions]
    return F.cross_entropy(rows.float(), wanted, reduction="sum")


def chunked_cross_entropy(
    hidden: Tensor, targets: Tensor, head: nn.Module, after: PostProcessing = PostProcessing()
) -> Tensor:
    """Sum of -log softmax(after(head(hidden)))[target] over the rows; the softmax and `after` in float32.

    Args:
        hidden: [N, E], any float dtype.
        targets: [N] int64, each in [0, V), or IGNORED where nothing is trained.
        head: gives [n, V] from [n, E], a tensor of its own; an adapter or a trainable layer is trained along.

    Returns:
        float32 scalar; zero for N = 0. The gradient reaches `hidden` and the head's trainable parameters.
    """
    vocabulary = cast(Tensor, head.weight).shape[0]
    # The logits, which become their gradient; where products are widened, one of both in float32 for a moment as well.
    row_bytes = vocabulary * (hidden.dtype.itemsize + (4 if is_widened(hidden) else 0))
    chunk = max(_FEWEST_ROWS, _CHUNK_BYTES // (row_bytes * _ROUND_TO) * _ROUND_TO)
    parameters = [p for p in head.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, targets, head, after, chunk, *parameters)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward computes the gradient as well: a chunk's logits exist once, and backward only scales."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: nn.Module,
        after: PostProcessing,
        chunk: int,
        *parameters: Tensor,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants_hidden = ctx.needs_input_grad[0]
        wants = wants_hidden or bool(parameters)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grads = [torch.zeros_like(p) for p in parameters]
        for begin in range(0, hidden.shape[0], chunk):
            rows, wanted = hidden[begin : begin + chunk].detach(), targets[begin : begin + chunk]
            if filler := -rows.shape[0] % _ROUND_TO:
                # Matrix kernels are built and kept by shape.
                rows, wanted = F.pad(rows, (0, 0, 0, filler)), F.pad(wanted, (0, filler), value=IGNORED)
            rows.requires_grad_(wants_hidden)
            with torch.set_grad_enabled(wants):
                logits = head(rows)
            gradient = logits.detach().contiguous()
            total += cross_entropy_(gradient, wanted, scale=after.scale, cap=after.cap, with_gradient=wants).sum()
            inputs = ([rows] if wants_hidden else []) + list(parameters)
            found = list(torch.autograd.grad(logits, inputs, gradient)) if wants else []
            # Or they would be there beside the next chunk's.
            del logits, gradient
            if grad_hidden is not None:
                part = found.pop(0)
                grad_hidden[begin : begin + chunk] = part[: len(part) - filler]
            for grad, part in zip(grads, found, strict=True):
                grad += part
        ctx.grads = (grad_hidden, *grads)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *grads = (None if g is None else g * grad_outputs[0].to(g.dtype) for g in ctx.grads)
        return (grad_hidden, None, None, None, None, *grads)


def _head(model: PreTrainedModel) -> nn.Module:
    return cast(nn.Module, model.get_output_embeddings())


def _trained_positions(targets: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    # On the CPU in numpy: no synchronisation with an accelerator, and nothing for a fake-tensor rehearsal to guess.
    # (`tolist`, because under fake tensors `numpy` of a real one reads garbage.)
    flat = np.array(targets.tolist()).ravel()
    positions = np.flatnonzero(flat != IGNORED)
    return torch.from_numpy(positions).to(device), torch.from_numpy(flat[positions]).to(device)


def _last_hidden_state(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor | None:
    """What the head reads, [B, T, E]; of an encoder-decoder the decoder's. None where the model does not show it."""
    if "decoder_input_ids" not in inputs:
        return getattr(model.base_model(**inputs, use_cache=False), "last_hidden_state", None)
    seen = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    output = model.get_decoder()(
        input_ids=inputs["decoder_input_ids"],
        encoder_hidden_states=model.get_encoder()(**seen).last_hidden_state,
        encoder_attention_mask=inputs["attention_mask"],
        use_cache=False,
    )
    return getattr(output, "last_hidden_state", None)


def _post_processing(model: PreTrainedModel) -> list[PostProcessing]:
    """What this model may do to its logits, the likeliest first: read off the config, to be checked by `_agrees`."""
    config = model.config.get_text_config()
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    factors = ("logit_scale", "lm_head_multiplier", "logits_scaling")
    cap = next((v for v in (getattr(config, key, None) for key in caps) if v), None)
    factor = next((v for v in (getattr(config, key, None) for key in factors) if v), None)
    scales = [1.0] if factor is None else [factor, 1.0 / factor, 1.0]
    if factor is None and model.config.is_encoder_decoder and getattr(config, "d_model", None):
        # T5 with a head tied to its embedding scales what goes into it, which is the same.
        scales = [config.d_model**-0.5, 1.0]
    return [PostProcessing(scale, cap) for scale in scales]


@torch.no_grad()
def _agrees(model: PreTrainedModel, after: PostProcessing) -> bool:
    """Do hidden states, head and `after` give the model's own logits on seven tokens?"""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(7, device=model.device)[None] * 37 % vocabulary
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs |= {"attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    training = model.training
    model.eval()
    try:
        want = model(**inputs, use_cache=False).logits.float()
        hidden = _last_hidden_state(model, inputs)
        if hidden is None:
            return False
        got = after(_head(model)(hidden)).float()
    finally:
        model.train(training)
    scale = float(want.abs().max())
    if got.shape != want.shape or not math.isfinite(scale):
        return False
    return torch.allclose(got, want, rtol=1e-3, atol=1e-3 * scale)


def _is_fake(model: nn.Module) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(next(model.parameters()), FakeTensor)
