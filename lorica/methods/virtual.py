"""What the methods with virtual tokens share: they stand where they must, and PEFT keeps them in one tensor.

    prompt, ptuning          n vectors at the input embedding              `prompt_embeddings` [n, d]
    ptuning_v2, prefix       n keys and values at every attention module   `prompt_embeddings` [n, sum of their widths]

`interop/prompts.py` cuts that tensor at the modules' borders and puts it together again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from lorica.errors import AdapterError, ConfigError
from lorica.methods.method import MethodOptions

SAVED = "prompt_embeddings"
"""The name of what is saved of each adapter, and of PEFT's one tensor."""


@dataclass(frozen=True)
class VirtualTokens(MethodOptions):
    """Options that all of them have.

    Attributes:
        targets: `auto`: the modules are those that there are.
        num_virtual_tokens: n.
    """

    targets: Annotated[
        Literal["auto"], Field(description="auto: the input embedding, or every attention module; nothing else")
    ] = "auto"
    num_virtual_tokens: Annotated[int, Field(description="virtual tokens in front of every sample", ge=1, le=16384)] = (
        20
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trainable_tokens:
            raise ConfigError(
                f"{type(self).__name__} trains no trainable_tokens beside its own: there is no folder for it."
            )

    def patterns(self) -> str | tuple[str, ...]:
        return ".*"

    def to_peft(self, found: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        config: Any = model.config
        text = config.get_text_config()
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "token_dim": next(iter(found.values())).saved_tensors()[SAVED].shape[1],
            "num_transformer_submodules": 1,
            "num_attention_heads": text.num_attention_heads,
            "num_layers": text.num_hidden_layers,
        }


def num_virtual_tokens(config: Mapping[str, Any]) -> int:
    """n, by a PEFT configuration.

    Raises:
        AdapterError: it is one for an encoder-decoder.
    """
    if config.get("num_transformer_submodules") not in (None, 1):
        raise AdapterError("num_transformer_submodules is not 1: virtual tokens of encoder-decoders are not supported.")
    return int(config["num_virtual_tokens"])
