"""Tensors that are made again: when they are, how often, and when they are kept after all."""

from __future__ import annotations

import torch
from torch import Tensor

from lorica.kernels.recipes import to_keep, with_recipe


def doubled(source: Tensor, calls: list[int]) -> Tensor:
    def make(x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * x

    return with_recipe(2 * source, make, source)


def test_the_users_of_a_tensor_share_what_is_made_and_the_last_lets_it_go() -> None:
    calls: list[int] = []
    source = torch.arange(3.0)
    tensor = doubled(source, calls)
    (recipe, ingredients), (same, _) = to_keep(tensor), to_keep(tensor)
    assert recipe is not None and recipe is same and ingredients[0] is source
    first, second = recipe.again(*ingredients), recipe.again(*ingredients)
    assert torch.equal(first, tensor) and second is first and len(calls) == 1
    # Backward a second time, with retain_graph.
    assert recipe.again(*ingredients) is not first and len(calls) == 2


def test_a_tensor_that_was_written_into_is_kept_itself() -> None:
    tensor = doubled(torch.arange(3.0), [])
    tensor.add_(1)
    assert to_keep(tensor) == (None, (tensor,))


def test_what_is_made_of_it_has_no_recipe() -> None:
    tensor = doubled(torch.arange(4.0), []).view(2, 2)
    assert to_keep(tensor) == (None, (tensor,))


def test_without_gradients_nothing_is_noted() -> None:
    with torch.inference_mode():
        tensor = doubled(torch.arange(3.0), [])
    assert to_keep(tensor) == (None, (tensor,))
