"""How fast this machine does a step's work: a few rates, measured in about a second, and a roofline over them.

An operation takes the longer of its arithmetic and its memory traffic, and a little for being called. It gives up what
cannot be seen from outside: caches that keep a tensor warm between two operations, and other programs on the machine.
So the answer is an estimate, good for "minutes or hours" rather than for comparing two settings by a few percent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorica.kernels.attention import attention
from lorica.kernels.linear import linear
from lorica.training.ledger import Ledger, Operation

_SECONDS_A_RATE = 0.15


@dataclass(frozen=True)
class Speed:
    """Rates of one device in one dtype: floating-point operations a second by kind of operation, and the rest.

    Attributes:
        flops_per_second: for each kind of operation but `memory`.
        bytes_per_second: read and written by elementwise operations.
        call_seconds: of an operation that does next to nothing.
    """

    flops_per_second: Mapping[str, float]
    bytes_per_second: float
    call_seconds: float

    def seconds(self, work: Mapping[Operation, int]) -> float:
        """How long `work` takes, in seconds; an estimate."""
        return sum(count * self._one(operation) for operation, count in work.items())

    def _one(self, operation: Operation) -> float:
        seconds = operation.moved_bytes / self.bytes_per_second
        if operation.flops:
            seconds = max(seconds, operation.flops / self.flops_per_second[operation.kind])
        return seconds + self.call_seconds


def measure_speed(
    dtype: torch.dtype, device: torch.device | str, *, tokens: int, hidden: int, heads: int, length: int
) -> Speed:
    """Measure the rates at shapes like the run's: [tokens, hidden] rows, attention over samples of `length` tokens.

    Products and attention go through the doors that the run's go through, so the kernels are those of the run.
    """
    tokens, length = min(tokens, 1024), min(length, 1024)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, w = random(tokens, hidden), random(4 * hidden, hidden)
    wide = linear(x, w)
    q = random(1, heads, length, max(8, hidden // heads))

    def attend(q: Tensor) -> Tensor:
        return attention(nn.Identity(), q, q, q, None, is_causal=True)[0]

    leaf = q.clone().requires_grad_()
    out = attend(leaf)
    grad = torch.ones_like(out)
    small = random(16)
    calls = {
        "matmul": lambda: linear(x, w),
        "narrow_matmul": lambda: linear(x, w[:16]),
        "attention": lambda: attend(q),
        "attention_backward": lambda: torch.autograd.grad(out, leaf, grad, retain_graph=True),
    }
    moved = 3 * wide.numel() * wide.element_size()
    return Speed(
        {kind: _flops(call) / _seconds(call, device) for kind, call in calls.items()},
        moved / _seconds(lambda: wide * wide, device),
        _seconds(lambda: small + small, device),
    )


def _flops(call: Callable[[], object]) -> int:
    """As a rehearsal counts them."""
    ledger = Ledger()
    with ledger:
        call()
    return ledger.flops


def _seconds(call: Callable[[], object], device: torch.device | str) -> float:
    """The median of as many calls as fit into a moment, after one to warm up."""
    call()
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - begin < _SECONDS_A_RATE:
        start = time.perf_counter()
        call()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[len(seconds) // 2]
