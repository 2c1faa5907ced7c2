"""Attention forward and backward on a CPU: the kernel in C beside what torch does of the same, in turns.

    python benchmarks/attention.py
    python benchmarks/attention.py --rounds 21 --threads 2 --only bert,gemma2

Both sides come through the same door (`lorica.kernels.attention`); the second has the kernel refused. "plain" is the
same shape without dropout or soft-capping: what these cost is the quotient of two rows of one side.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorica.kernels import cpu_attention
from lorica.kernels.attention import attention


class Case(NamedTuple):
    """Shapes [rows, heads, tokens, size], and what the call asks for."""

    rows: int
    heads: int
    key_heads: int
    tokens: int
    size: int
    causal: bool
    options: dict[str, Any]


CASES = {
    "bert, 128 tokens, dropout 0.1": Case(8, 12, 12, 128, 64, False, {"dropout": 0.1}),
    "bert, 128 tokens, plain": Case(8, 12, 12, 128, 64, False, {}),
    "bert, 512 tokens, dropout 0.1": Case(2, 12, 12, 512, 64, False, {"dropout": 0.1}),
    "bert, 512 tokens, plain": Case(2, 12, 12, 512, 64, False, {}),
    "gemma2, softcap 50": Case(1, 4, 4, 512, 256, True, {"softcap": 50.0}),
    "gemma2, plain": Case(1, 4, 4, 512, 256, True, {}),
    "gpt-oss, sinks and a window": Case(1, 64, 8, 512, 64, True, {"s_aux": torch.zeros(64), "sliding_window": 128}),
}


def seconds(tensors: list[Tensor], upstream: Tensor, case: Case) -> tuple[float, float]:
    """Forward and backward."""
    begin = time.perf_counter()
    out, _ = attention(nn.Identity(), *tensors, None, is_causal=case.causal, **case.options)
    middle = time.perf_counter()
    torch.autograd.grad(out, tensors, upstream)
    return middle - begin, time.perf_counter() - middle


def measured(case: Case, rounds: int) -> dict[str, list[float]]:
    """Of each side the medians of forward, backward and both."""
    shape = (case.rows, case.tokens, case.heads, case.size)
    tensors = [
        torch.randn(case.rows, case.tokens, heads, case.size).transpose(1, 2).requires_grad_()
        for heads in (case.heads, case.key_heads, case.key_heads)
    ]
    upstream, takes = torch.randn(shape), cpu_attention.takes
    found: dict[str, list[tuple[float, float]]] = {"kernel": [], "torch": []}
    try:
        for turn in range(rounds + 1):
            for side, times in found.items():
                cpu_attention.takes = takes if side == "kernel" else lambda *_, **__: False
                spent = seconds(tensors, upstream, case)
                times += [spent] * (turn > 0)  # the first one builds and warms up
    finally:
        cpu_attention.takes = takes
    return {
        side: [statistics.median(part) for part in (*zip(*times, strict=True), map(sum, times))]
        for side, times in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="beginnings of the rows' names, with commas between")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if cpu_attention.compiled() is None:
        raise SystemExit("There is no kernel to measure: it needs a C compiler.")
    heads = ("kernel: forward", "backward", "torch: forward", "backward")
    print(f"{'milliseconds':30s}", *(f"{head:>16s}" for head in heads), "  times")
    for name, case in CASES.items():
        if name.startswith(tuple(arguments.only.split(","))):
            sides = measured(case, arguments.rounds)
            ours, theirs = ([1e3 * s for s in sides[side]] for side in ("kernel", "torch"))
            parts = (f"{number:16.2f}" for number in (*ours[:2], *theirs[:2]))
            print(f"{name:30s}", *parts, f"{theirs[2] / ours[2]:7.2f}", flush=True)


if __name__ == "__main__":
    main()
