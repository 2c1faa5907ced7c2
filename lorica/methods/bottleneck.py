"""Bottleneck adapters: a small MLP with its own shortcut, behind a layer whose output enters the residual stream.

    h = base(x),    y = h + U act(D h + b_D) + b_U,    D [size, out],  U [out, size]

Houlsby et al. 2019 (arXiv 1902.00751) put one behind the attention and one behind the MLP of each layer; Pfeiffer et
al. 2020 (arXiv 2005.00247, the better of many variants) only the one behind the MLP. U and b_U start at zero, so the
start is the base exactly, where Houlsby starts near it. D, U and the biases are float32 masters, and the products run
in the dtype of h.

What it gives up: it is not linear, so it cannot be merged and its two products stay in the model when it is served.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NoReturn

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorica.errors import NotMergeableError
from lorica.kernels.linear import linear
from lorica.methods.method import Adapter, MethodOptions, Targets, unsupported_kind

AUTO = "auto"

# What transformers calls the last layer of an attention and of an MLP.
_ATTENTION = "|".join(
    (
        r"(self_attn|attention|attn)\.o_proj",  # Llama, Mistral, Qwen, Gemma, Phi-3, ViT
        r"(self_attn|encoder_attn|attn|attn\.attention)\.out_proj",  # OPT, BART, Whisper, GPT-J, GPT-Neo, MPT
        r"(attn|crossattention)\.c_proj",  # GPT-2
        r"(attention|crossattention)\.output\.dense",  # BERT and its kin
        r"(attention|self_attention|self_attn)\.dense",  # GPT-NeoX, ALBERT, Bloom, Falcon, Phi
        r"(SelfAttention|EncDecAttention)\.o",  # T5
        r"attention\.out_lin",  # DistilBERT
        r"attn\.Wo",  # ModernBERT
    )
)
_MLP = "|".join(
    (
        r"(mlp|ffn)\.down_proj",  # Llama, Mistral, Qwen, Gemma, Phi-3, MPT
        r"(layers\.\d+|mlp)\.fc2",  # OPT, BART, Whisper, Phi, ViT
        r"mlp\.c_proj",  # GPT-2, GPT-Neo, Starcoder2
        r"layer\.\d+\.output\.dense",  # BERT and its kin
        r"mlp\.dense_4h_to_h",  # GPT-NeoX, Bloom, Falcon
        r"mlp\.fc_out",  # GPT-J
        r"DenseReluDense\.wo",  # T5
        r"ffn\.lin2",  # DistilBERT
        r"ffn_output",  # ALBERT
        r"mlp\.Wo",  # ModernBERT
    )
)
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True)
class Bottleneck(MethodOptions):
    """Options of bottleneck adapters.

    Attributes:
        targets: `"auto"` (the layers that `placement` means, in the architectures of transformers that are known
            here), or as in every method.
        placement: `houlsby` (behind attention and MLP) or `pfeiffer` (behind the MLP).
        size: width of the bottleneck.
        activation: between the two products.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)

    targets: Annotated[
        Targets,
        Field(description="modules to adapt: auto (those that placement means), all-linear, a pattern, or a list"),
    ] = AUTO
    placement: Annotated[
        Literal["houlsby", "pfeiffer"],
        Field(description="where targets auto puts them: houlsby behind attention and MLP, pfeiffer behind the MLP"),
    ] = "houlsby"
    size: Annotated[int, Field(description="width of the bottleneck", ge=1, le=65536)] = 64
    activation: Annotated[
        Literal["relu", "gelu", "silu"], Field(description="activation between the two products of the bottleneck")
    ] = "relu"

    def patterns(self) -> str | tuple[str, ...]:
        if self.targets != AUTO:
            return self.targets
        return f"{_ATTENTION}|{_MLP}" if self.placement == "houlsby" else _MLP

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        if isinstance(module, nn.Linear | Conv1D):
            return BottleneckAdapter(module, self)
        raise unsupported_kind(module, name, "bottleneck")


class BottleneckAdapter(Adapter):
    """A linear layer with a bottleneck behind it: `down` [size, out] and `up` [out, size], with biases."""

    leaves_base = True

    def __init__(self, base: nn.Linear | Conv1D, options: Bottleneck) -> None:
        super().__init__(base, options)
        out_size = base.weight.shape[1 if isinstance(base, Conv1D) else 0]
        float32: dict[str, Any] = {"device": base.weight.device, "dtype": torch.float32}
        self.down = nn.Linear(out_size, options.size, **float32)
        self.up = nn.Linear(options.size, out_size, **float32)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.activation = _ACTIVATIONS[options.activation]

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.base(x)
        inner = self.activation(linear(h, self.down.weight, self.down.bias))
        return h + linear(inner, self.up.weight, self.up.bias)

    def merged(self) -> NoReturn:
        raise NotMergeableError("A bottleneck adapter is not linear, so no change of the base's weights computes it.")


OPTIONS = Bottleneck
