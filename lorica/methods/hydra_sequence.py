"""Gates of a sample so far: the mean of the router's outputs over its tokens up to and with each one.

A layer sees rows of a batch and not where samples begin. The model is told, so a hook in front of it notes that:
borders of packed rows (`cu_seq_lens_q`, or positions that do not go on), padding (`attention_mask`), and the KV cache
that it continues. The sums of the router's outputs travel as one more layer of that cache, so that whatever reorders
its rows (beam search) reorders them too.

The router is linear, so this is the router of the mean input, at [rows, N] instead of [rows, in]. Sums are float64: in
a packed row a sample's mean is a difference of sums.

What it gives up: a cache that is shortened, as assisted decoding does; encoder-decoders; and two forward passes before
a backward pass with activation checkpointing, where the first would be computed again with the second one's borders.

Shapes: B rows, T tokens, N heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from lorica.errors import ConfigError


def running_mean(logits: Tensor, tokens: Tokens | None = None, before: Tensor | None = None) -> Tensor:
    """The mean over each sample's tokens so far, of logits [B, T, N]; without `tokens` a row is a sample.

    before: the sums of each row in earlier calls, [B, N + 1] float64, their count last.
    """
    sums = _counted(logits, None if tokens is None else tokens.real).cumsum(1)
    if tokens is not None and tokens.starts is not None:
        # A row of zeros in front: what had been summed up before a sample's first token.
        earlier = F.pad(sums, (0, 0, 1, 0)).gather(1, tokens.starts[..., None].expand_as(sums))
        sums = sums - earlier
    if before is not None:
        sums = sums + before[:, None]
    return (sums[..., :-1] / sums[..., -1:].clamp(min=1)).to(logits.dtype)


def _counted(logits: Tensor, real: Tensor | None) -> Tensor:
    """The outputs [B, T, N] and a one that counts them, float64 [B, T, N + 1]; zeros for padding."""
    rows = F.pad(logits.double(), (0, 1), value=1.0)
    return rows if real is None else rows.masked_fill(~real[..., None], 0.0)


@dataclass(frozen=True)
class Tokens:
    """What the model was called on.

    shape: B and T. starts: the first token of each token's sample [B, T], None where a row is a sample. real: [B, T],
    False for padding; None where all are real. counted: likewise, False for the filler of a packed row too. past: sums
    of what a KV cache holds. keeps: whether to keep sums on.
    """

    shape: tuple[int, int]
    starts: Tensor | None
    real: Tensor | None
    counted: Tensor | None
    past: PastGates
    keeps: bool


class Sequences:
    """What the adapters of one model share: the tokens of its latest forward."""

    def __init__(self, body: nn.Module) -> None:
        self._tokens: Tokens | None = None
        self._names = tuple(inspect.signature(body.forward).parameters)
        self._hooks = (
            body.register_forward_pre_hook(self._before, with_kwargs=True),
            body.register_forward_hook(self._after),
        )

    @classmethod
    def of(cls, model: nn.Module) -> Sequences | None:
        """Hooked to `model`; None where that is none of transformers', or one of two halves that read other tokens."""
        if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
            return None
        return cls(model.base_model)

    def remove(self) -> None:
        """Take the hooks off; once is as good as often."""
        for hook in self._hooks:
            hook.remove()

    def counted(self, num_rows: int) -> Tensor | None:
        """Which of a layer's rows are neither padding nor filler, [num_rows]; None: all, or nobody knows."""
        counted = None if self._tokens is None else self._tokens.counted
        return None if counted is None or counted.numel() != num_rows else counted.flatten()

    def running_mean(self, logits: Tensor, name: str, remember: bool) -> Tensor:
        """As the function, for the rows [B T, N] of the layer at `name`; with `remember` a KV cache gets their sums.

        Raises:
            ConfigError: the rows are not the tokens that the model was called on.
        """
        tokens = self._tokens
        if tokens is None or len(logits) != tokens.shape[0] * tokens.shape[1]:
            what = "never called" if tokens is None else f"called on {tokens.shape[0]} rows of {tokens.shape[1]} tokens"
            raise ConfigError(
                f"hydra: routing sequence cannot tell the samples apart at {name}: it is called on {len(logits)} rows, "
                f"and the model was {what}. Use routing token for such layers."
            )
        grid, before = logits.view(*tokens.shape, -1), tokens.past.sums.get(name)
        result = running_mean(grid, tokens, before).view_as(logits)
        if remember and tokens.keeps:
            tokens.past.add(name, grid, tokens.real)
        return result

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tokens = _tokens({**dict(zip(self._names, args, strict=False)), **kwargs})

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tokens = self._tokens
        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        cache = next((value for value in values if isinstance(value, Cache)), None)
        if tokens is not None and cache is not None and tokens.past not in cache.layers:
            cache.layers.append(tokens.past)


def _tokens(given: Mapping[str, Any]) -> Tokens:
    ids = given.get("input_ids")
    read = ids if ids is not None else given.get("inputs_embeds")
    assert read is not None, "a model reads ids or embeddings"
    batch, length = read.shape[:2]
    mask, cache = given.get("attention_mask"), given.get("past_key_values")
    if mask is not None and (not torch.is_tensor(mask) or mask.dim() != 2):
        raise ConfigError("hydra: routing sequence needs an attention_mask of shape [rows, tokens], or none.")
    real = None if mask is None else mask[:, -length:].to(device=read.device, dtype=torch.bool)
    starts, positions, counted = None, given.get("position_ids"), real
    if (borders := given.get("cu_seq_lens_q")) is not None:
        borders = borders.to(read.device, torch.long)
        places = torch.arange(length, device=read.device)
        starts = borders[torch.bucketize(places, borders[1:], right=True)][None]
        if positions is not None:
            # `data/packing.py` fills a row up with a last sample that stays at one position. A real one of one token
            # looks like it, and has nothing to learn from.
            counted = (places < borders[-2]) | (positions[:, -1:] != positions.gather(1, borders[-2:-1][None]))
    elif positions is not None and mask is None and cache is None:
        # As transformers tells packed samples apart where nothing else does.
        positions = positions.expand(batch, -1)
        is_first = torch.cat([positions.new_ones(batch, 1), positions.diff(dim=1) != 1], 1).bool()
        places = torch.arange(length, device=read.device)
        starts = torch.where(is_first, places, 0).cummax(1).values
    past = PastGates.of(cache)
    return Tokens((batch, length), starts, real, counted, past, given.get("use_cache") is not False)


class PastGates(CacheLayerMixin):  # type: ignore[misc]
    """Sums of the router's outputs over what a KV cache holds, by layer: [B, N + 1] float64, the count last."""

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}

    @classmethod
    def of(cls, cache: object) -> PastGates:
        """What `cache` holds already, or a fresh one.

        Raises:
            ConfigError: it holds tokens whose sums are not known.
        """
        if cache is None:
            return cls()
        if not isinstance(cache, Cache):
            raise ConfigError(f"hydra: routing sequence knows transformers' caches, not a {type(cache).__name__}.")
        found = next((layer for layer in cache.layers if isinstance(layer, cls)), None)
        if found is None and cache.get_seq_length() > 0:
            raise ConfigError(
                "hydra: the KV cache holds tokens that the adapters have not seen, and routing sequence needs their "
                "mean. Start with an empty cache."
            )
        return found or cls()

    def add(self, name: str, logits: Tensor, real: Tensor | None) -> None:
        """Take in the router's outputs [B, T, N] of the layer at `name`."""
        now = _counted(logits.detach(), real).sum(1)
        self.sums[name] = now if name not in self.sums else self.sums[name] + now

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.sums = {name: t.index_select(0, indices.to(t.device)) for name, t in self.sums.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.sums = {name: t.repeat_interleave(repeats, 0) for name, t in self.sums.items()}

    def reset(self) -> None:
        self.sums = {}

    def crop(self, tokens_to_remove: int) -> NoReturn:
        raise ConfigError("hydra: routing sequence cannot forget tokens, as assisted decoding would have it.")

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> NoReturn:
        raise AssertionError("no attention layer has this index")
