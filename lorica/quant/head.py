"""An output head in few bits, for answering: decoding reads the whole head for each token.

In a Llama of 1B with a vocabulary of 128,256 a head of 16 bits is 525 MB a token, as much as all other layers in NF4
together. Where the head shares its weight with the embedding, it gets codes of its own and the embedding stays as it
is, since of that a token reads one row: time is saved, not memory.

What it gives up: int8 keeps the answers of nearly every token; NF4 costs more than in any other layer, since every
error lands in the logits (docs/quantised.md has the measured loss). A model whose head was made so is for answering
and measuring: it is not trained, and saved it would be another model.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from lorica.errors import ConfigError
from lorica.kernels.linear import Linear
from lorica.quant.codebooks import bits, codebook
from lorica.quant.linear import empty_like

Model = TypeVar("Model", bound=PreTrainedModel)


def quantize_head(model: Model, scheme: str = "int8") -> Model:
    """Quantise the output head of `model`, in place and for good, and return it.

    Args:
        scheme: of `quant.codebooks`; the scales are quantised too in 4 bits, where they weigh more.

    Raises:
        ConfigError: there is no such scheme, the model has no head, or one that is quantised or adapted already.
    """
    codebook(scheme)
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, Linear):
        has = "no output head" if head is None else f"an output head of type {type(head).__name__}"
        raise ConfigError(f"{type(model).__name__} has {has}: only a plain linear head can be quantised.")
    made = empty_like(head, scheme, double_quant=bits(scheme) == 4)
    made.take({"weight": head.weight})
    model.set_output_embeddings(made)
    return model
