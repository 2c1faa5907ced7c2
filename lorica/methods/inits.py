"""How a low-rank pair starts. Each function fills A and B in place so that B A is zero, or says what it changes.

Shapes: lora_a [rank, in], lora_b [out, rank].
"""

from __future__ import annotations

import math

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


INITS = {"kaiming": kaiming, "gaussian": gaussian}
