"""Tensors that are made again: when they are, how often, and when they are kept after all."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lorica.kernels.made_again import _NOTES, to_keep, with_recipe


def doubled(source: Tensor, calls: list[int]) -> Tensor:
    def make(x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * x

    return with_recipe(2 * source, make, source)


def test_the_users_of_a_tensor_share_what_is_made_and_the_last_lets_it_go() -> None:
    calls: list[int] = []
    source = torch.arange(3.0, requires_grad=True)
    tensor = doubled(source, calls)
    (recipe, ingredients), (same, _) = to_keep(tensor), to_keep(tensor)
    assert recipe is not None and recipe is same and ingredients[0] is source
    first, second = recipe.again(*ingredients), recipe.again(*ingredients)
    assert torch.equal(first, tensor) and second is first and len(calls) == 1
    # Backward a second time, with retain_graph.
    assert recipe.again(*ingredients) is not first and len(calls) == 2


def has_none(tensor: Tensor) -> bool:
    recipe, (kept,) = to_keep(tensor)
    return recipe is None and kept is tensor


def test_a_tensor_that_was_written_into_is_kept_itself() -> None:
    source = torch.randn(3, 3, requires_grad=True)
    assert not has_none(doubled(source, []))
    tensor = doubled(source, [])
    assert has_none(tensor.add_(1)) and has_none(doubled(source, []).t_())
    inner = source * 1
    tensor = doubled(inner, [])
    inner.add_(1)
    assert has_none(tensor), "an ingredient was written into"


def test_what_is_made_of_it_has_no_recipe() -> None:
    assert has_none(doubled(torch.ones(4, requires_grad=True), []).view(2, 2))


def test_without_gradients_nothing_is_noted() -> None:
    assert has_none(doubled(torch.arange(3.0), []))
    with torch.inference_mode():
        tensor = doubled(torch.arange(3.0), [])
        with torch.enable_grad():
            assert has_none(doubled(torch.arange(3.0), []))
    assert has_none(tensor)


def test_a_note_goes_with_its_tensor_and_is_not_saved_with_it(tmp_path: Path) -> None:
    before = len(_NOTES)
    tensor = doubled(torch.ones(4, requires_grad=True), [])
    assert len(_NOTES) == before + 1
    torch.save(tensor, tmp_path / "it.pt")
    assert torch.equal(torch.load(tmp_path / "it.pt"), tensor)
    del tensor
    assert len(_NOTES) == before
