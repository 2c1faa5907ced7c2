"""Prompt tuning: learned vectors in front of the text (Lester et al. 2021, arXiv 2104.08691).

    x = [p_1, ..., p_n, E(t_1), ..., E(t_T)],    p [n, d] trained in float32, E the frozen input embedding

The vectors are the embeddings of token ids that the vocabulary does not have: V, V + 1, ..., V + n - 1, V being the
number of E's rows. So a prompt is n ordinary ids in front of each sample, and packing, masks, positions, the KV cache
and generation know nothing of it; `attach.in_front` says which ids a model wants to see there. What the base does to
its embeddings (Gemma's scale) is not done to the vectors, as if they were `inputs_embeds`.

What it gives up: n positions of the context, in training and in every request; it cannot be merged; and with few
trained numbers (20 x 4,096 on a 7B model) small models learn less than by any other method, and slowly.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer, PreTrainedModel

from lorica.errors import ConfigError, NotMergeableError, TargetError
from lorica.methods.method import Adapter, MethodOptions, unsupported_kind
from lorica.methods.virtual import SAVED, VirtualTokens, num_virtual_tokens

# Rows from which the spread of a vocabulary is taken: enough for three digits.
_SAMPLE = 1024


@dataclass(frozen=True)
class PromptTuning(VirtualTokens):
    """Options of prompt tuning.

    Attributes:
        init: how they start: `vocabulary`, as the embeddings of tokens drawn at random; `text`, as those of
            `init_text`; `random`, drawn with the spread that the vocabulary's embeddings have.
        init_text: what to start from, cut or repeated to `num_virtual_tokens` tokens; the base's own tokenizer reads
            it, which must lie beside its weights.
    """

    linear_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"

    init: Annotated[
        Literal["vocabulary", "text", "random"],
        Field(description="what they start as: embeddings of drawn tokens, of init_text, or random ones of their size"),
    ] = "vocabulary"
    init_text: Annotated[str | None, Field(description="the words that init text starts from")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.init == "text") != bool(self.init_text):
            raise ConfigError(
                f"PromptTuning: init is {self.init} and init_text is {self.init_text!r}; init text, and nothing else, "
                "takes an init_text."
            )

    @property
    def num_virtual_ids(self) -> int:
        return self.num_virtual_tokens

    def candidates(self, model: nn.Module) -> dict[str, nn.Module]:
        return input_embedding(model, self.method_name())

    def wrap(self, module: nn.Module, name: str) -> Adapter:
        if not isinstance(module, nn.Embedding):
            raise unsupported_kind(module, name, "prompt")
        return PromptEmbedding(module, self, self._start(module, ()))

    def wrap_all(self, model: nn.Module, names: Sequence[str]) -> dict[str, Adapter]:
        (name,) = names
        embedding = model.get_submodule(name)
        assert isinstance(embedding, nn.Embedding)
        ids = _token_ids(model, self.init_text) if self.init_text else ()
        return {name: PromptEmbedding(embedding, self, self._start(embedding, ids))}

    @torch.no_grad()
    def _start(self, embedding: nn.Embedding, text: Sequence[int]) -> Tensor:
        """[n, d] float32."""
        num_tokens, num_rows, device = self.num_virtual_tokens, embedding.num_embeddings, embedding.weight.device
        if text:
            ids = torch.tensor(list(islice(cycle(text), num_tokens)), device=device)
        else:
            ids = torch.randint(num_rows, (max(num_tokens, _SAMPLE),), device=device)
        rows: Tensor = embedding(ids).float()
        if self.init == "random":
            return torch.randn_like(rows[:num_tokens]) * rows.std()
        return rows[:num_tokens].clone()

    def to_peft(self, found: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
        return {
            **super().to_peft(found, model),
            # What it started from is no longer there to be found.
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_name_or_path": None,
            "tokenizer_kwargs": None,
        }

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], names: Sequence[str]) -> PromptTuning:
        return PromptTuning(num_virtual_tokens=num_virtual_tokens(config), init="random")


def input_embedding(model: nn.Module, method: str) -> dict[str, nn.Module]:
    """The input embedding of a transformers model, by its name.

    Raises:
        TargetError: the model has none that virtual tokens could be added to.
    """
    if not isinstance(model, PreTrainedModel):
        raise TargetError(f"{method} needs a model of transformers, which knows its input embedding.")
    if model.config.is_encoder_decoder:
        raise TargetError(f"{method} takes no encoder-decoder, as {type(model).__name__} is: it has two inputs.")
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    if not isinstance(embedding, nn.Embedding):
        raise unsupported_kind(embedding, name, method)
    return {name: embedding}


def _token_ids(model: nn.Module, text: str) -> list[int]:
    assert isinstance(model, PreTrainedModel)
    place = model.config.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    except Exception as error:
        # Whatever transformers raises here means that the words cannot be read.
        raise ConfigError(
            f"init text: the base's tokenizer cannot be loaded from {place!r} ({type(error).__name__}: {error}). "
            "Load the base from a folder that has one, or take init vocabulary."
        ) from error
    if not ids:
        raise ConfigError(f"init text: the tokenizer makes no token of {text!r}.")
    return ids


class VirtualEmbedding(Adapter):
    """An input embedding with rows beyond its last: id V + i has row i of `prompt()`."""

    base: nn.Embedding
    leaves_base = True

    @abstractmethod
    def prompt(self) -> Tensor:
        """[n, d] float32."""

    def forward(self, ids: Tensor) -> Tensor:
        """[...] int64 below V + n -> [..., d] in the base's dtype."""
        beyond = ids - self.base.num_embeddings
        is_virtual = beyond >= 0
        rows = self.base(ids.masked_fill(is_virtual, 0))
        vectors = F.embedding(beyond.clamp(min=0), self.prompt()).to(rows.dtype)
        return torch.where(is_virtual[..., None], vectors, rows)

    def merged(self) -> nn.Module:
        raise NotMergeableError(
            "A prompt is input in front of the text, which no change of the base's weights can stand for."
        )

    def saved_tensors(self) -> dict[str, Tensor]:
        # A computed prompt takes the way that the model's forward takes without gradients: an LSTM has two.
        with torch.no_grad():
            return {SAVED: self.prompt()}


class PromptEmbedding(VirtualEmbedding):
    """Prompt tuning's: `prompt_embeddings` [n, d] is trained."""

    def __init__(self, base: nn.Embedding, options: MethodOptions, start: Tensor) -> None:
        super().__init__(base, options)
        self.prompt_embeddings = nn.Parameter(start)

    def prompt(self) -> Tensor:
        return self.prompt_embeddings


OPTIONS = PromptTuning
