"""Virtual tokens in PEFT's folders: one tensor for all layers, and the base's names without a `model.` in front.

    PEFT                                  here, as every other method has them
    prompt_embeddings [n, sum of w]       base_model.model.<module>.prompt_embeddings [n, w] of each module
    base_model.<module>.weight            base_model.model.<module>.weight, trained whole beside them

For prefixes PEFT's tensor holds the keys and then the values of layer 0, those of layer 1, and so on: the modules'
pieces side by side, in the model's order. So a folder is read and written as any other, but for this translation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorica.errors import AdapterError
from lorica.methods.method import MethodOptions
from lorica.methods.virtual import SAVED

_OURS, _THEIRS = "base_model.model.", "base_model."


def fold(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as PEFT has them."""
    pieces = {key: tensor for key, tensor in tensors.items() if key.endswith(f".{SAVED}")}
    others = {f"{_THEIRS}{key.removeprefix(_OURS)}": t for key, t in tensors.items() if key not in pieces}
    return {SAVED: torch.cat(list(pieces.values()), dim=1), **others}


class Unfolded:
    """A file of PEFT's, opened by safetensors, as if it had our tensors.

    Raises:
        AdapterError: the virtual tokens are not as many as the options say, or not as wide as this model's.
    """

    def __init__(self, file: Any, options: MethodOptions, model: nn.Module) -> None:
        self._file = file
        shapes = options.shapes_in(model, list(options.candidates(model)))
        widths = {name: shape[SAVED][1] for name, shape in shapes.items()}
        num_tokens, found = next(iter(shapes.values()))[SAVED][0], list(file.get_slice(SAVED).get_shape())
        if found != (expected := [num_tokens, sum(widths.values())]):
            raise AdapterError(f"{SAVED} is {found}, expected {expected}.")
        self._num_tokens, end = num_tokens, 0
        self._pieces: dict[str, tuple[int, int]] = {}
        for name, width in widths.items():
            self._pieces[f"{_OURS}{name}.{SAVED}"] = (end, end := end + width)
        others = [key for key in file.keys() if key != SAVED]  # noqa: SIM118 - not a dict
        self._theirs = {f"{_OURS}{key.removeprefix(_THEIRS)}": key for key in others}
        if twice := self._pieces.keys() & self._theirs.keys():
            raise AdapterError(f"{', '.join(sorted(twice))} are there beside {SAVED}, which holds them.")

    def keys(self) -> list[str]:
        """The names of all tensors."""
        return [*self._pieces, *self._theirs]

    def get_slice(self, key: str) -> Any:
        """As safetensors' own: it knows its shape, and no number is read yet."""
        if key not in self._pieces:
            return self._file.get_slice(self._theirs[key])
        begin, end = self._pieces[key]
        return _Piece((self._num_tokens, end - begin))

    def get_tensor(self, key: str) -> Tensor:
        """The tensor of this name."""
        if key not in self._pieces:
            other: Tensor = self._file.get_tensor(self._theirs[key])
            return other
        begin, end = self._pieces[key]
        piece: Tensor = self._file.get_slice(SAVED)[:, begin:end]
        return piece


class _Piece:
    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape

    def get_shape(self) -> tuple[int, int]:
        return self._shape
