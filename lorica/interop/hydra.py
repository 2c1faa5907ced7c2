"""HydraLoRA as its authors save it, read as if it had our tensors (their code to arXiv 2404.19245).

    theirs, behind the module's name                          here
    lora_A.weight [r, in]                                     lora_a [r, in]
    lora_B0.weight ... lora_B{N-1}.weight, [out, r] each      lora_b [out, N r]
    lora_route.weight [N, in]                                 router [N, in]; nothing where N is 1

adapter_config.json says `lora_nums`, N, beside LoRA's fields. Its `blc_alpha` and `blc_weight` changed training alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorica.errors import AdapterError
from lorica.methods.hydra import HydraLoRA

_A, _ROUTE, _HEAD = "lora_A.weight", "lora_route.weight", re.compile(r"(.*)\.lora_B(\d+)\.weight")


class AuthorsHeads:
    """A file of theirs, opened by safetensors, as if it had our tensors.

    Raises:
        AdapterError: a layer's heads are not N of one shape; all such layers.
    """

    def __init__(self, file: Any, options: HydraLoRA) -> None:
        assert isinstance(options.num_heads, int)
        self._file = file
        self._heads: dict[str, list[str]] = {}
        self._others: dict[str, str] = {}
        numbered: dict[str, set[int]] = {}
        for key in file.keys():  # noqa: SIM118 - not a dict
            name, _, rest = key.rpartition(".lora_")
            if found := _HEAD.fullmatch(key):
                numbered.setdefault(found[1], set()).add(int(found[2]))
            elif f"lora_{rest}" == _A:
                self._others[f"{name}.lora_a"] = key
            elif f"lora_{rest}" != _ROUTE:
                self._others[key] = key
            elif options.num_heads > 1:
                self._others[f"{name}.router"] = key
        faults = []
        for name, numbers in numbered.items():
            keys = [f"{name}.lora_B{i}.weight" for i in range(options.num_heads)]
            if numbers != set(range(options.num_heads)) or len(numbers) != _count(file, name):
                faults.append(f"{name} has the heads {sorted(numbers)[:8]}, and lora_nums is {options.num_heads}")
            elif len(shapes := {tuple(self._shape(key)) for key in keys}) > 1 or len(next(iter(shapes))) != 2:
                faults.append(f"{name} has heads of shapes {sorted(shapes)[:4]}, expected one shape [out, rank]")
            else:
                self._heads[f"{name}.lora_b"] = keys
        if faults:
            raise AdapterError("; ".join(faults[:10]) + ".")

    def keys(self) -> list[str]:
        """The names of all tensors."""
        return [*self._heads, *self._others]

    def get_slice(self, key: str) -> Any:
        """As safetensors' own: it knows its shape, and no number is read yet."""
        if key not in self._heads:
            return self._file.get_slice(self._others[key])
        out_size, rank = self._shape(self._heads[key][0])
        return _Joined((out_size, rank * len(self._heads[key])))

    def get_tensor(self, key: str) -> Tensor:
        """The tensor of this name."""
        if key in self._heads:
            return torch.cat([self._file.get_tensor(head) for head in self._heads[key]], dim=1)
        other: Tensor = self._file.get_tensor(self._others[key])
        return other

    def _shape(self, key: str) -> Sequence[int]:
        shape: Sequence[int] = self._file.get_slice(key).get_shape()
        return shape


def _count(file: Any, name: str) -> int:
    """How many tensors of heads a layer has: `lora_B01` is a second name of the first head."""
    return sum(key.startswith(f"{name}.lora_B") for key in file.keys())  # noqa: SIM118 - not a dict


class _Joined:
    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape

    def get_shape(self) -> tuple[int, int]:
        return self._shape
