"""A tensor that knows how to be made again, so that backward keeps what it was made of and not the tensor.

What a normalisation or an activation gives out is kept for backward by the adapters that read it, though what it was
made of is kept as well, by itself: two copies of one thing. From the recipe an adapter keeps the ingredients, which
costs nothing, and makes the tensor again for a pass over memory. Adapters that read one tensor share what was made.

A recipe is lost where an operation makes another tensor of the one that has it, and it is not taken where that tensor
or an ingredient was written into since: whoever asks gets the tensor itself then.

A recipe travels with its tensor to whoever reads it. Where a module of ours stands around the reader, as the gated MLP
of models/lean.py around its last layer, a hook for saved tensors does the same for every kind of adapter.

What it gives up: writing through `.data` or in C is not seen, as autograd does not see it either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Recipe:
    """How to make a tensor from its ingredients, for as many users as have asked."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make, self._users = make, 0
        self._made: Tensor | None = None

    def join(self) -> None:
        """One more will ask for the tensor."""
        self._users += 1

    def again(self, *ingredients: Tensor) -> Tensor:
        """The tensor; it is let go when all have had it."""
        with torch.no_grad():
            made = self._make(*ingredients) if self._made is None else self._made
        self._users -= 1
        self._made = made if self._users > 0 else None
        return made


class _Note(NamedTuple):
    recipe: Recipe
    ingredients: tuple[Tensor, ...]
    state: tuple[object, ...]


# Beside the tensors and not on them: an attribute would be pickled and copied along.
_NOTES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def with_recipe(tensor: Tensor, make: Callable[..., Tensor], *ingredients: Tensor) -> Tensor:
    """`tensor`, which `make(*ingredients)` gives again, bit for bit.

    Nothing is noted of a tensor without a gradient: what made it keeps no ingredients then.
    """
    if tensor.requires_grad and not torch.compiler.is_compiling():
        _NOTES[tensor] = _Note(Recipe(make), ingredients, _state(tensor, *ingredients))
    return tensor


def to_keep(tensor: Tensor) -> tuple[Recipe | None, tuple[Tensor, ...]]:
    """What to keep for backward: a recipe and its ingredients, or None and the tensor."""
    note: _Note | None = None if torch.compiler.is_compiling() else _NOTES.get(tensor)  # type: ignore[no-untyped-call]
    if note is None or _state(tensor, *note.ingredients) != note.state:
        return None, (tensor,)
    note.recipe.join()
    return note.recipe, note.ingredients


def _state(*tensors: Tensor) -> tuple[object, ...]:
    """Another one where a tensor was written into, or turned in place."""
    return tuple((t._version, t.shape, t.stride()) for t in tensors)
