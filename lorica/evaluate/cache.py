"""A KV cache with room for what is to come, and which models a loop of our own can decode with it.

transformers' cache grows by joining tensors: each new token copies all keys and values of its layer. Here they are
written where they will stay. Pages of that room that no token ever reaches are never touched, so they cost no memory.

What it gives up: what is not a list of keys and values, such as the states of recurrent layers, and models that prepare
their inputs in a way of their own: `plain_cache` says so, and transformers' own loop decodes those.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values [B, K, tokens, D], views of the beginning of tensors that hold `room` tokens."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self._length = 0
        self._whole: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._whole = tuple(t.new_empty(*t.shape[:2], self.room, t.shape[3]) for t in (key_states, value_states))
        # Written out: a decoded token comes here in each layer.
        keys, values = self._whole
        begin, added = self._length, key_states.shape[2]
        keys.narrow(2, begin, added).copy_(key_states)
        values.narrow(2, begin, added).copy_(value_states)
        self._length = end = begin + added
        self.keys, self.values = keys.narrow(2, 0, end), values.narrow(2, 0, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._whole = tuple(t.index_select(0, indices) for t in self._whole)
        self.keys, self.values = (t.narrow(2, 0, self._length) for t in self._whole)


def plain_cache(model: PreTrainedModel, room: int) -> DynamicCache | None:
    """An empty cache for `room` tokens; None where `model` cannot be decoded by calling it on its newest tokens."""
    kind = type(model)
    is_plain = all(
        getattr(kind, name) is getattr(GenerationMixin, name)
        for name in ("generate", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_prefill")
    )
    if not is_plain or model.config.is_encoder_decoder or not kind._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=model.config)
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache if cache.layers else None
