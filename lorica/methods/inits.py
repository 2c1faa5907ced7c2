"""How a low-rank pair starts: random with B A = 0, filled in place, or from a weight of the base, or from its error.

Those from a weight give B A = B0 A0, not zero; the adapter takes it off again and trains the difference B A - B0 A0, so
the base is never written and the output is the base's at the start. The papers put W - s B0 A0 into the base instead:
the same function and the same gradients, in other words.

`loftq` starts from what quantising took from the weight, W - Q, and that stays in: the output begins nearer to the
16-bit original than to the quantised base, on purpose. The starts from data, `eva` and `lora_ga`, stand in `starts.py`.

Shapes: lora_a [rank, in], lora_b [out, rank], weight [out, in].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def kaiming(lora_a: Tensor, lora_b: Tensor) -> None:
    """A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0: what loralib and PEFT do by default."""
    nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    nn.init.zeros_(lora_b)


def gaussian(lora_a: Tensor, lora_b: Tensor) -> None:
    """A ~ N(0, 1/rank^2), B = 0: the Gaussian of the LoRA paper (section 4.1), with PEFT's deviation 1/rank."""
    nn.init.normal_(lora_a, std=1.0 / lora_a.shape[0])
    nn.init.zeros_(lora_b)


def embedding(lora_a: Tensor, lora_b: Tensor) -> None:
    """A = 0, B ~ N(0, 1): a looked-up column of A must start at zero (loralib's Embedding)."""
    nn.init.zeros_(lora_a)
    nn.init.normal_(lora_b)


def pissa(weight: Tensor, rank: int, scale: float, niter: int | None) -> tuple[Tensor, Tensor]:
    """s B A = the best approximation of W of this rank (Meng et al. 2024, arXiv 2404.02948).

    A = sqrt(S / s) V^T and B = U sqrt(S / s). `niter` takes the randomised SVD with so many power iterations.
    """
    if niter is None:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, q=rank, niter=niter)
        vh = v.t()
    root = (s[:rank] / scale).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def olora(weight: Tensor, rank: int, scale: float, niter: int | None) -> tuple[Tensor, Tensor]:
    """B = the first columns of Q and A = the first rows of R in W = Q R (Büyükakyüz 2024, arXiv 2406.01775).

    Neither the scale nor `niter` matters: the paper scales the product, and a QR decomposition is exact.
    """
    q, r = torch.linalg.qr(weight)
    return r[:rank].contiguous(), q[:, :rank].contiguous()


def loftq(error: Tensor, rank: int, niter: int | None) -> tuple[Tensor, Tensor]:
    """B A = the best approximation of what quantising took from a weight (Li et al. 2023, arXiv 2310.08659).

    One round of the paper's algorithm 1, which is PEFT's default too: Q is the weight quantised as ever. Further rounds
    would quantise W - B A anew. They mend more (on the embedded base at rank 16, one takes 21 % and five take 41 % of
    the logits' divergence), but Q would follow from singular vectors, which differ from one machine to the next, and
    whoever opens the adapter has to quantise as it was trained.

    Args:
        error: W - Q, float32 [out, in].
        niter: as for `pissa`. The spectrum of an error is flat: 4 iterations reach 90 to 97 % of what the exact one
            takes away.
    """
    rank = min(rank, *error.shape)
    if niter is not None:
        return pissa(error, rank, 1.0, niter)
    if error.shape[0] > error.shape[1]:
        lora_b, lora_a = loftq(error.t(), rank, None)
        return lora_a.t().contiguous(), lora_b.t().contiguous()
    # The singular vectors of the shorter side give those of the longer, in a third of the time of an SVD of both.
    squares, vectors = torch.linalg.eigh(error @ error.t())
    u, s = vectors[:, -rank:].flip(1), squares[-rank:].flip(0).clamp_min(torch.finfo(error.dtype).tiny).sqrt()
    return (u / s.sqrt()).t() @ error, u * s.sqrt()


INITS = {"kaiming": kaiming, "gaussian": gaussian}
FROM_WEIGHT = {"pissa": pissa, "olora": olora}
