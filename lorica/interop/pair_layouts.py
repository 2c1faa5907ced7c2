"""How the two tensors of a module on disk hold low-rank pairs: PEFT's shapes taken apart, and put together again.

    matrix, embedding     A [r, in]             B [out, r]                one pair
    convolution           A [r, in, k...]       B [out, r, 1...]          one pair, the taps laid out flat: [r, in k]
    ... of g groups       A [r, in, k...]       B [out, r / g, 1...]      a pair for each group, of rank r / g
    stack of E experts    A [E r, in]           B [out, r E]              a pair for each expert

A group of a convolution has outputs of its own, and its share of the rank, so its update is a matrix like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MATRIX = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
"""The names of a pair behind its module's."""


class Layout(NamedTuple):
    """What the tensors of a module hold. names: on disk. kernel: the taps, none for a matrix."""

    names: tuple[str, str] = MATRIX
    kernel: tuple[int, ...] = ()
    num_groups: int = 1
    num_experts: int = 1

    @property
    def num_parts(self) -> int:
        return self.num_groups * self.num_experts

    def part_names(self, name: str) -> list[str]:
        """The names of the pairs of the module `name`."""
        return [name] if self.num_parts == 1 else [f"{name}[{i}]" for i in range(self.num_parts)]

    def split(self, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The pairs, A [r, in] and B [out, r], in two tensors from disk."""
        if self.num_experts > 1:
            by_expert = b.view(len(b), -1, self.num_experts)
            return [(rows, by_expert[:, :, e]) for e, rows in enumerate(a.chunk(self.num_experts))]
        a, b = a.flatten(1), b.flatten(1)
        return list(zip(a.chunk(self.num_groups), b.chunk(self.num_groups), strict=True))

    def join(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The two tensors that `split` takes apart; the pairs are of one rank."""
        a = torch.cat([rows for rows, _ in pairs])
        if self.num_experts > 1:
            return a, torch.stack([columns for _, columns in pairs], 2).flatten(1)
        b = torch.cat([columns for _, columns in pairs])
        taps = (1,) * len(self.kernel)
        return (a.view(len(a), -1, *self.kernel), b.view(*b.shape, *taps)) if self.kernel else (a, b)


def layout_of(a: Tensor, b: Tensor, names: tuple[str, str], rank: int, *, is_stack: bool) -> Layout | None:
    """The layout of A and B where they are such a pair of `rank`, else None. is_stack: they may hold experts."""
    kernel = tuple(a.shape[2:])
    if a.dim() < 2 or b.dim() != a.dim() or (kernel and names == EMBEDDING) or any(size != 1 for size in b.shape[2:]):
        return None
    if is_stack and not kernel and len(a) == b.shape[1] and len(a) % rank == 0:
        return Layout(names, num_experts=len(a) // rank)
    if len(a) != rank or rank % max(1, b.shape[1]):
        return None
    num_groups = rank // max(1, b.shape[1])
    return None if num_groups > 1 and (not kernel or len(b) % num_groups) else Layout(names, kernel, num_groups)
