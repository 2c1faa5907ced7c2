"""A tensor that knows how to be made again, so that backward keeps what it was made of and not the tensor.

What a normalisation or an activation gives out is kept for backward by the adapters that read it, though what it was
made of is kept as well, by itself: two copies of one thing. From the recipe an adapter keeps the ingredients, which
costs nothing, and makes the tensor again for a pass over memory. Adapters that read one tensor share what was made.

The recipe stands on the tensor as a Python attribute. It is lost where an operation makes another tensor of it, and it
is not taken where the tensor was written into since: whoever asks gets the tensor itself then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_NAME = "lorica_recipe"


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


def with_recipe(tensor: Tensor, make: Callable[..., Tensor], *ingredients: Tensor) -> Tensor:
    """`tensor`, which `make(*ingredients)` gives again, bit for bit."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        setattr(tensor, _NAME, (Recipe(make), ingredients, tensor._version))
    return tensor


def to_keep(tensor: Tensor) -> tuple[Recipe | None, tuple[Tensor, ...]]:
    """What to keep for backward: a recipe and its ingredients, or None and the tensor."""
    recipe, ingredients, version = getattr(tensor, _NAME, (None, (), None))
    if recipe is None or tensor._version != version:
        return None, (tensor,)
    recipe.join()
    return recipe, ingredients
