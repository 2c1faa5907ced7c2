"""A ledger of what operations do: storages that are born and die, floating-point operations, bytes moved.

It is a dispatch mode below autograd, so it sees what really runs, forward and backward, views and checkpointing
included, on fake tensors as on real ones. torch counts the work of its own products; of the operators of this project
it knows nothing, and of attention it counts the whole square where causality skips half. Attention is counted here by
the pairs of a query and a key that see each other, whichever kernel does it.

What it gives up: what a kernel writes out inside is known for the few in `_bytes_inside`.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# The first two are imported for the operators that they define.
import lorica.kernels.cpu_attention
import lorica.kernels.low_rank
import lorica.kernels.ops  # noqa: F401
from lorica.kernels.linear import is_widened

_QUANTISED_PRODUCTS = (
    torch.ops.lorica.linear_4bit, torch.ops.lorica.linear_4bit_input_grad,
    torch.ops.lorica.linear_8bit, torch.ops.lorica.linear_8bit_input_grad,
)  # fmt: skip
_PRODUCTS = (torch.ops.lorica.linear_rows, *_QUANTISED_PRODUCTS)
# And where among its arguments A stands.
_UPDATES = {torch.ops.lorica.low_rank_: 2, torch.ops.lorica.low_rank_backward: 3}

# Operations a byte: an adapter of rank 16 has about 15 in bfloat16, a square product of the smallest models 80.
_NARROW = 40


class Operation(NamedTuple):
    """How much one call of a kind of operation does.

    Kinds: `matmul`, `narrow_matmul` (few operations a byte: an adapter's, which run far below a kernel's best),
    `attention`, `attention_backward` and `memory`, all that has no flops. `moved_bytes` are read and written.
    """

    kind: str
    flops: int
    moved_bytes: int


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Books every storage that operations give out and drop while the mode is on, and the work that they do.

    Storages are numbered from 0 in the order of birth: `sizes` are their bytes, `events` holds (number, +1 for its
    birth or -1 for its death) in order. `work` counts operations.
    """

    def __init__(self, lengths: Sequence[int] = ()) -> None:
        """lengths: of the samples of a packed row, where the row is fake and its borders cannot be read."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._lengths = np.array(lengths, np.int64)
        self.sizes: list[int] = []
        self.events: list[tuple[int, int]] = []
        self.work: Counter[Operation] = Counter()
        self._numbers: dict[int, int] = {}

    @property
    def flops(self) -> int:
        """Floating-point operations of all work."""
        return sum(operation.flops * count for operation, count in self.work.items())

    def add(self, tensor: Tensor) -> int:
        """The number of the tensor's storage, which is born now if it was not known."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._numbers:
            self._numbers[key] = len(self.sizes)
            self.events.append((len(self.sizes), 1))
            self.sizes.append(storage.nbytes())
            weakref.finalize(storage, self._died, key).atexit = False
        return self._numbers[key]

    def alive(self, end: int | None = None) -> set[int]:
        """The storages alive before event `end`."""
        changes = Counter[int]()
        for number, change in self.events[:end]:
            changes[number] += change
        return {number for number, change in changes.items() if change}

    def peak(self, begin: int = 0, end: int | None = None) -> int:
        """The `end` for `alive` at which most bytes are alive, after event `begin` and not after `end`."""
        changes = np.array([self.sizes[number] * change for number, change in self.events])
        return begin + 1 + int(np.argmax(np.cumsum(changes)[begin:end]))

    def _died(self, key: int) -> None:
        self.events.append((self._numbers.pop(key), -1))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {self.add(t) for t in inputs}
        born = [t for t in tree_leaves(out) if isinstance(t, Tensor) and self.add(t) not in known]
        if inside := _bytes_inside(func._overloadpacket, args, out):
            self.events += [(len(self.sizes), 1), (len(self.sizes), -1)]
            self.sizes.append(inside)
        if born or func._schema.is_mutable:
            kind, flops = _work(func, args, kwargs or {}, out, self._lengths)
            moved_bytes = sum(t.numel() * t.element_size() for t in inputs + born)
            if kind == "matmul" and flops < _NARROW * moved_bytes:
                kind = "narrow_matmul"
            self.work[Operation(kind, flops, moved_bytes)] += 1
        return out


def _work(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any, lengths: npt.NDArray[np.int64]
) -> tuple[str, int]:
    """Kind and floating-point operations of one call."""
    op = func._overloadpacket
    if op in _PRODUCTS:
        return "matmul", 2 * args[0].numel() * out.shape[-1]
    if "attention" in str(op):
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | dict(kwargs)
        if {"query", "key", "value"} <= given.keys():
            backward = "backward" in str(op)
            return "attention_backward" if backward else "attention", _attention_flops(given, lengths, backward)
    if op in _UPDATES:
        x, (rank, in_size), out_size = args[1], args[_UPDATES[op]].shape, args[0].shape[-1]
        # Forward has a product with each of A and B, and backward two.
        return "matmul", (2 if op is torch.ops.lorica.low_rank_ else 4) * len(x) * rank * (in_size + out_size)
    if op not in flop_registry:
        return "memory", 0
    return "matmul", int(flop_registry[op](*args, **kwargs, out_val=out))


def _attention_flops(given: Mapping[str, Any], lengths: npt.NDArray[np.int64], backward: bool) -> int:
    """Of one call of torch's attention or ours by the names of its arguments: query [B, H, T, D], value [.., Tk, V].

    Forward has two products over each pair, of D and of V operations twice. Backward takes the scores again, and has
    one product for each gradient, that of the scores among them.
    """
    query, value = given["query"], given["value"]
    size, value_size = query.shape[-1], value.shape[-1]
    each = 3 * size + 2 * value_size if backward else size + value_size
    flops: int = 2 * query.shape[1] * _num_pairs(given, lengths) * each
    return flops


def _num_pairs(given: Mapping[str, Any], lengths: npt.NDArray[np.int64]) -> int:
    """Pairs of a query and a key, of all samples, that are computed; a mask skips none."""
    query, key, borders, prefix = given["query"], given["key"], given.get("borders"), given.get("prefix_key")
    if borders is None or len(borders) == len(query):
        # Each row is a sample.
        queries, keys = (np.full(t.shape[0], t.shape[2], np.int64) for t in (query, key))
    elif isinstance(borders, FakeTensor):
        queries = keys = lengths[: len(borders)]
    else:
        queries, keys = borders[:, 2].numpy(), borders[:, 4].numpy()
    pairs = queries * keys
    if given.get("causal", given.get("is_causal", False)):
        window = given.get("window", np.iinfo(np.int32).max)

        def up_to(length: Any) -> Any:
            # Of a square of `length` queries: 1 + 2 + ... and, from the window on, as many as it has.
            beyond = np.maximum(length - window, 0)
            return (length * (length + 1) - beyond * (beyond + 1)) // 2

        # The last query stands at the last key.
        pairs = up_to(keys) - up_to(keys - queries)
    in_front = 0 if prefix is None else prefix.shape[1]
    return int((pairs + queries * in_front).sum())


def _bytes_inside(op: Any, args: Sequence[Any], out: Tensor) -> int:
    """Of what an operation writes out inside for a moment.

    For a product that is a quantised weight, its scales if they are quantised too, and what is widened to float32 for
    it, the result among that. `logsumexp` writes out the exponentials of all its input.
    """
    if op is torch.ops.aten.logsumexp:
        return int(args[0].nbytes)
    if op not in _PRODUCTS:
        return 0
    x: Tensor = args[0]
    wide = 4 if is_widened(x) else 0
    if op is torch.ops.lorica.linear_rows:
        return 0
    absmax: Tensor = args[2]
    weight = x.shape[-1] * int(args[5]) * (wide or x.element_size())
    scales = 0 if absmax.dtype == torch.float32 else 4 * absmax.numel()
    return weight + scales + wide * (x.numel() + out.numel())
