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
from torch.nn import functional as F

from lorica.training.rehearsal import Operation

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
    """Measure the rates at shapes like the run's: [tokens, hidden] rows, attention over samples of `length` tokens."""
    tokens, length = min(tokens, 1024), min(length, 1024)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, w = random(tokens, hidden), random(4 * hidden, hidden)
    wide = F.linear(x, w)
    q = random(1, heads, length, max(8, hidden // heads)).requires_grad_()
    out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    grad = torch.ones_like(out)
    small = random(16)
    products = 2 * 2 * heads * length * length * q.shape[-1]
    rates = {
        "matmul": 2 * x.numel() * 4 * hidden / _seconds(lambda: F.linear(x, w), device),
        "narrow_matmul": 2 * x.numel() * 16 / _seconds(lambda: F.linear(x, w[:16]), device),
        "attention": products
        / _seconds(lambda: F.scaled_dot_product_attention(q.detach(), q.detach(), q.detach(), is_causal=True), device),
        "attention_backward": 2.5
        * products
        / _seconds(lambda: torch.autograd.grad(out, q, grad, retain_graph=True), device),
    }
    moved = 3 * wide.numel() * wide.element_size()
    return Speed(rates, moved / _seconds(lambda: wide * wide, device), _seconds(lambda: small + small, device))


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
