"""How a low-rank pair starts: random with B A = 0, filled in place, or from a weight of the base.

The latter give B A = B0 A0, not zero; the adapter takes it off again and trains the difference B A - B0 A0, so the base
is never written and the output is the base's at the start. The papers put W - s B0 A0 into the base instead: the same
function and the same gradients, in other words.

The starts from data, `eva` and `lora_ga`, stand in `starts.py`.

Shapes: lora_a [rank, in], lora_b [out, rank], weight [out, in].
"""

from __future__ import annotations

import math
from collections.abc import Callable

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


def loftq(
    weight: Tensor, rank: int, scale: float, quantise: Callable[[Tensor], Tensor], num_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """s B A = what quantising takes from W, as far as the rank reaches (Li et al. 2023, arXiv 2310.08659, algorithm 1).

    Two steps alternate: Q = quantise(W - s B A), then s B A = the best approximation of W - Q. The pair belongs to the
    last Q, on which W is Q + s B A and a rest. After one iteration Q is the weight quantised as ever.

    No value of `method.init` yet: it waits for a quantised base to put Q into.

    Args:
        quantise: quantises and widens again, [out, in] to [out, in], both float32.
        num_iterations: at least 1, which is PEFT's default.

    Returns:
        lora_a, lora_b and Q, float32.
    """
    lora_a, lora_b = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    for _ in range(num_iterations):
        quantised = quantise(weight - scale * (lora_b @ lora_a))
        lora_a, lora_b = pissa(weight - quantised, rank, scale, None)
    return lora_a, lora_b, quantised


INITS = {"kaiming": kaiming, "gaussian": gaussian}
FROM_WEIGHT = {"pissa": pissa, "olora": olora}
