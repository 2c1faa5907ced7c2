"""P-tuning v2: learned keys and values in every layer (Liu et al. 2021, arXiv 2110.07602), called "deep prompts" there.

    attention(Q, [P_K; K], [P_V; V]),    P_K [heads of K, n, size] and P_V likewise, float32, of each attention layer

Every token sees all n of them, whatever mask or window it has. The wrapper of an attention module hands them by keyword
through the module to our attention function (`kernels/attention.py`), which adapting a model sets; so nothing of them
goes through projections, rotations or the KV cache. Positions of the text start at n, as behind n tokens. Which modules
attend is found by running the model (`attending.py`).

What it gives up: n keys more in every row of attention, in training and in every request; it cannot be merged; and on
layers with a sliding window PEFT lets the prefix slide out of sight, where ours stays.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorica.errors import ConfigError, NotMergeableError
from lorica.kernels import attention
from lorica.methods.attending import HeadShape, attention_modules
from lorica.methods.method import Adapter, unsupported_kind
from lorica.methods.virtual import SAVED, VirtualTokens, num_virtual_tokens


@dataclass(frozen=True)
class PrefixOptions(VirtualTokens):
    """What the two methods of the attention share."""

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = ()
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"

    @property
    def position_offset(self) -> int:
        return self.num_virtual_tokens

    def candidates(self, model: nn.Module) -> dict[str, nn.Module]:
        return {name: model.get_submodule(name) for name in attention_modules(model, self.method_name())}

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        # Only the running model knows the shapes of its heads.
        raise unsupported_kind(module, name, self.method_name())

    def wrap_all(self, model: nn.Module, names: Sequence[str]) -> dict[str, Adapter]:
        assert isinstance(model, PreTrainedModel)
        shapes = attention_modules(model, self.method_name())
        wrapped = self.wrap_shapes({name: (model.get_submodule(name), shapes[name]) for name in names})
        for adapter in wrapped.values():
            adapter.attention_before = model.config._attn_implementation
        attention.register()
        model.set_attn_implementation(attention.NAME)
        return dict(wrapped)

    def shapes_in(self, model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, tuple[int, ...]]]:
        found = attention_modules(model, self.method_name())
        return {name: {SAVED: (self.num_virtual_tokens, found[name].width)} for name in names if name in found}

    @abstractmethod
    def wrap_shapes(self, modules: Mapping[str, tuple[nn.Module, HeadShape]]) -> Mapping[str, PrefixedAttention]:
        """Wrap attention modules, whose heads are as told."""

    def to_peft(self, found: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        # PEFT knows one shape for all layers, keys and values; where they differ the folder is ours alone to read.
        shape: HeadShape = next(iter(found.values())).shape
        return {
            **super().to_peft(found, model),
            "token_dim": shape.num_heads * shape.key_size,
            "num_attention_heads": shape.num_heads,
            "num_layers": len(found),
            "encoder_hidden_size": shape.num_heads * shape.key_size,
            "prefix_projection": False,
            "init_weights": None,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], names: Sequence[str]) -> PTuningV2:
        return PTuningV2(num_virtual_tokens=num_virtual_tokens(config))


@dataclass(frozen=True)
class PTuningV2(PrefixOptions):
    """Options of P-tuning v2."""

    def wrap_shapes(self, modules: Mapping[str, tuple[nn.Module, HeadShape]]) -> Mapping[str, PrefixedAttention]:
        return {name: DeepPrompt(module, self, shape) for name, (module, shape) in modules.items()}


class PrefixedAttention(Adapter):
    """An attention module that is handed keys and values of its own beside those of the text.

    attention_before: the attention function that the model had.
    """

    options: PrefixOptions
    attention_before: str
    leaves_base = True

    def __init__(self, base: nn.Module, options: PrefixOptions, shape: HeadShape) -> None:
        super().__init__(base, options)
        self.shape = shape

    @abstractmethod
    def prefix(self) -> Tensor:
        """[n, keys of all heads, then values] float32: this layer's part of PEFT's `prompt_embeddings`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's.

        Raises:
            ConfigError: the model was given another attention since, which would not see the prefix.
        """
        config: Any = self.base.config
        if (chosen := config._attn_implementation) != attention.NAME:
            raise ConfigError(
                f"The attention of the model was changed to {chosen!r} after it was adapted, and that knows no prefix: "
                f"model.set_attn_implementation({attention.NAME!r}) sets it back."
            )
        heads, sizes = self.shape.num_heads, (self.shape.key_size, self.shape.value_size)
        parts = torch.split(self.prefix(), [heads * size for size in sizes], dim=1)
        # [n, K * D] -> [K, n, D].
        key, value = (part.reshape(-1, heads, size).transpose(0, 1) for part, size in zip(parts, sizes, strict=True))
        return self.base(*args, prefix_key=key, prefix_value=value, **kwargs)

    def taken_off(self, model: nn.Module) -> None:
        assert isinstance(model, PreTrainedModel)
        if model.config._attn_implementation == attention.NAME:
            model.set_attn_implementation(self.attention_before)

    def merged(self) -> nn.Module:
        raise NotMergeableError("A prefix is keys and values that no change of the projections' weights can stand for.")

    def saved_tensors(self) -> dict[str, Tensor]:
        with torch.no_grad():
            return {SAVED: self.prefix()}

    def extra_repr(self) -> str:
        return f"num_virtual_tokens={self.options.num_virtual_tokens}"


class DeepPrompt(PrefixedAttention):
    """P-tuning v2's: `prompt_embeddings` [n, width] is trained; it starts normal, as in the paper's code."""

    def __init__(self, base: nn.Module, options: PrefixOptions, shape: HeadShape) -> None:
        super().__init__(base, options, shape)
        device = next(base.parameters()).device
        start = torch.randn(options.num_virtual_tokens, shape.width, device=device, dtype=torch.float32)
        self.prompt_embeddings = nn.Parameter(start)

    def prefix(self) -> Tensor:
        return self.prompt_embeddings


OPTIONS = PTuningV2
