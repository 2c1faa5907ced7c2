"""A classifier's logits of packed rows: its layers read real tokens only, its head reads rows.

How a classifier pools its hidden states, and what it does to them then, is its own business: one takes the first token,
another the last that is no padding, a third the mean. So its own forward runs, on padded rows [n, T]; only, what its
body reads is exchanged for the packed row on the way in, and its last hidden states are laid out in rows on the way
out: behind the body, or behind its last layer where pooling is a part of the body. No layer computes a token of
padding, and no head knows.

Whether the logits are then those of padded rows is tried once a model, on a few rows. Where they are not, and where
attention cannot pack (`attention.py`), rows are padded.

What it gives up: a head for every token, as a decoder's, computes padding.

Shapes: n rows, T tokens of the longest, M tokens of all, C classes, E hidden size.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lorica.models.tasks import padding_id, start_position

# By model.
_exits: weakref.WeakKeyDictionary[nn.Module, nn.Module | None] = weakref.WeakKeyDictionary()


def row_logits(model: PreTrainedModel, inputs: Mapping[str, Any], num_rows: int) -> Tensor:
    """Logits [n, C] of a batch of `num_rows` rows, padded or packed; what a packed one holds beyond them is filler."""
    if "cu_seq_lens_q" not in inputs:
        padded: Tensor = model(**inputs).logits
        return padded
    rows = Rows(inputs["cu_seq_lens_q"], num_rows)
    exit = packed_exit(model)
    return _padded_logits(model, inputs, rows) if exit is None else _packed_logits(model, inputs, rows, exit)


def packed_exit(model: PreTrainedModel) -> nn.Module | None:
    """The module of `model` behind which packed hidden states are to be laid out in rows; None where it cannot pack."""
    if model not in _exits:
        _exits[model] = next((m for m in (model.base_model, *layers_of(model)[-1:]) if _agrees(model, m)), None)
    return _exits[model]


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model of transformers, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


class Rows:
    """Where the tokens of packed samples stand in padded rows."""

    def __init__(self, borders: Tensor, num_rows: int) -> None:
        """borders: [n + 1 or more] of the samples in the packed row."""
        ends = np.array(borders.tolist(), np.int64)[: num_rows + 1]
        lengths = np.diff(ends)
        real = np.arange(lengths.max()) < lengths[:, None]
        self.mask = torch.from_numpy(real.astype(np.int64))
        self._places = torch.from_numpy(np.flatnonzero(real))

    def lay_out(self, packed: Tensor, filler: int = 0) -> Tensor:
        """[n, T, ...] of a packed [1, M or more, ...]."""
        flat = packed[0, : len(self._places)]
        empty = flat.new_full((self.mask.numel(), *flat.shape[1:]), filler)
        filled = empty.index_copy(0, self._places.to(packed.device), flat)
        return filled.view(*self.mask.shape, *flat.shape[1:])


def _packed_logits(model: PreTrainedModel, inputs: Mapping[str, Any], rows: Rows, exit: nn.Module) -> Tensor:
    with _packed_body(model, inputs, rows, exit):
        logits: Tensor = model(**_row_inputs(model, inputs, rows)).logits
    return logits


def _padded_logits(model: PreTrainedModel, inputs: Mapping[str, Any], rows: Rows) -> Tensor:
    """As if the batch had come in rows: what only some models are given is laid out as well."""
    more = {"token_type_ids": inputs["token_type_ids"]} if "token_type_ids" in inputs else {}
    # The model's own positions are the safer ones, unless a prefix has moved them.
    if int(inputs["position_ids"][0, 0]) != start_position(model.config):
        more["position_ids"] = inputs["position_ids"]
    laid_out = {name: rows.lay_out(tensor) for name, tensor in more.items()}
    logits: Tensor = model(**_row_inputs(model, inputs, rows), **laid_out).logits
    return logits


def _row_inputs(model: PreTrainedModel, inputs: Mapping[str, Any], rows: Rows) -> dict[str, Tensor]:
    ids = inputs["input_ids"]
    return {"input_ids": rows.lay_out(ids, padding_id(model.config)), "attention_mask": rows.mask.to(ids.device)}


@contextmanager
def _packed_body(model: PreTrainedModel, inputs: Mapping[str, Any], rows: Rows, exit: nn.Module) -> Iterator[None]:
    """Inside, the layers of `model` read the packed `inputs`, and what comes out of `exit` is laid out in rows."""

    def enter(body: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        plain = {name: value for name, value in kwargs.items() if not torch.is_tensor(value)}
        return (), {**plain, **inputs, "use_cache": False}

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if torch.is_tensor(output):
            return rows.lay_out(output)
        if isinstance(output, tuple):
            return (rows.lay_out(output[0]), *output[1:])
        output.last_hidden_state = rows.lay_out(output.last_hidden_state)
        return output

    hooks = (
        # In front of others, which then see what the body reads.
        model.base_model.register_forward_pre_hook(enter, with_kwargs=True, prepend=True),
        exit.register_forward_hook(leave),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _agrees(model: PreTrainedModel, exit: nn.Module) -> bool:
    """Whether packed rows of 5, 1 and 7 tokens have the logits that the model gives them padded."""
    with unset_fake_temporarily():
        # What is read of it stands in Python, also in a rehearsal on fake tensors.
        borders = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(13, device=model.device) * 37 % vocabulary
    ids = torch.where(ids == padding_id(model.config), (ids + 1) % vocabulary, ids)
    positions = torch.cat([torch.arange(n, device=model.device) for n in (5, 1, 7)]) + start_position(model.config)
    inputs: dict[str, Any] = {"input_ids": ids[None], "position_ids": positions[None]}
    inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 7, "max_length_k": 7}
    rows, training = Rows(borders, 3), model.training
    model.eval()
    try:
        got = _packed_logits(model, inputs, rows, exit).float()
        if isinstance(got, FakeTensor):
            return got.shape == (3, model.config.num_labels)
        want = _padded_logits(model, inputs, rows).float()
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError, AttributeError):
        # Its body takes other arguments, or its layers run in another way than one after another.
        return False
    finally:
        model.train(training)
    if got.shape != want.shape:
        return False
    scale = float(want.abs().max())
    # Rounding of 16 bits, through layers whose matrix products have other shapes.
    tolerance = 1e-4 if model.dtype.itemsize == 4 else 3e-2
    return math.isfinite(scale) and bool((got - want).abs().max() <= tolerance * scale)
