"""P-tuning: a prompt that a small network writes while it is trained (Liu et al. 2021, arXiv 2103.10385).

    mlp     p = W3 relu(W2 relu(W1 e + b1) + b2) + b3                          e [n, d] and the network are trained
    lstm    p = W2 relu(W1 BiLSTM(e) + b1) + b2                                (two layers in both directions)

The vectors p stand in front of the text as prompt tuning's do (`prompt.py`), but a step moves all of them together,
which tames their training. The network has PEFT's shapes; it is dropped once it is trained: what is saved is p, read
back as prompt tuning. A checkpoint of a run keeps the network, so a resumed run is the same run.

What it gives up: what prompt tuning gives up, and millions of parameters for the network while it is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lorica.methods.method import Adapter, Rank, unsupported_kind
from lorica.methods.prompt import PromptTuning, VirtualEmbedding, input_embedding
from lorica.methods.virtual import VirtualTokens

_LSTM_LAYERS = 2


@dataclass(frozen=True)
class PTuning(VirtualTokens):
    """Options of P-tuning.

    Attributes:
        encoder: the network that writes them.
        encoder_hidden_size: its inner width; None: the embedding's.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    peft_type: ClassVar[str | None] = "P_TUNING"

    encoder: Annotated[Literal["mlp", "lstm"], Field(description="the network that writes them")] = "mlp"
    encoder_hidden_size: Annotated[Rank | None, Field(description="its inner width; null: the embedding's")] = None

    @property
    def num_virtual_ids(self) -> int:
        return self.num_virtual_tokens

    def candidates(self, model: nn.Module) -> dict[str, nn.Module]:
        return input_embedding(model, self.method_name())

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        if not isinstance(module, nn.Embedding):
            raise unsupported_kind(module, name, "ptuning")
        return EncodedEmbedding(module, self)

    def to_peft(self, found: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        common = super().to_peft(found, model)
        return {
            **common,
            "encoder_reparameterization_type": self.encoder.upper(),
            "encoder_hidden_size": self.encoder_hidden_size or common["token_dim"],
            "encoder_num_layers": _LSTM_LAYERS,
            "encoder_dropout": 0.0,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], names: Sequence[str]) -> PromptTuning:
        return PromptTuning.from_peft(config, names)


class EncodedEmbedding(VirtualEmbedding):
    """P-tuning's: `embedding` [n, d], `lstm_head` and `mlp_head` are trained, by PEFT's names."""

    def __init__(self, base: nn.Embedding, options: PTuning) -> None:
        super().__init__(base, options)
        size, hidden = base.embedding_dim, options.encoder_hidden_size or base.embedding_dim
        factory: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.embedding = nn.Embedding(options.num_virtual_tokens, size, **factory)
        if options.encoder == "lstm":
            self.lstm_head: nn.LSTM | None = nn.LSTM(
                size, hidden, num_layers=_LSTM_LAYERS, bidirectional=True, batch_first=True, **factory
            )
            widths = [2 * hidden, 2 * hidden, size]
        else:
            self.lstm_head, widths = None, [size, hidden, hidden, size]
        layers: list[nn.Module] = []
        for width, following in pairwise(widths):
            layers += [nn.Linear(width, following, **factory), nn.ReLU()]
        self.mlp_head = nn.Sequential(*layers[:-1])

    def prompt(self) -> Tensor:
        rows = self.embedding.weight[None]
        if self.lstm_head is not None:
            rows = self.lstm_head(rows)[0]
        prompt: Tensor = self.mlp_head(rows)[0]
        return prompt


OPTIONS = PTuning
