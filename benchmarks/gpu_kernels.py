"""The kernels of benchmarks/gpu.py, each alone beside what one would take without it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from gpu_sides import quantized_by_bitsandbytes


def kernels(device: str, tiny: bool) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """(work, side, a call) of cross-entropy, packed attention and the NF4 product, with their gradients."""
    import torch
    from torch.nn import functional as F

    import lorica.kernels.attention as door
    from lorica.kernels import cuda_attention
    from lorica.kernels.cross_entropy import cross_entropy_
    from lorica.quant.blockwise import linear, quantize

    torch.manual_seed(0)
    dtype = torch.bfloat16
    rows, vocabulary = (16, 256) if tiny else (4096, 128256)
    logits = torch.randn(rows, vocabulary, device=device, dtype=dtype)
    targets = torch.randint(0, vocabulary, (rows,), device=device)

    def by_torch() -> Any:
        x = logits.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(x.float(), targets, reduction="sum"), x)

    yield "cross-entropy", "lorica", lambda: cross_entropy_(logits.clone(), targets)
    yield "cross-entropy", "torch", by_torch

    heads, key_heads, size, length = (4, 2, 16, 16) if tiny else (32, 8, 128, 2048)
    cuts = torch.tensor([0, length // 8, length // 2, length, 2 * length], dtype=torch.int32)
    packed = [
        torch.randn(1, h, int(cuts[-1]), size, device=device, dtype=dtype, requires_grad=True)
        for h in (heads, key_heads, key_heads)
    ]

    def attend() -> Any:
        out = door.attention(torch.nn.Module(), *packed, None, cu_seq_lens_q=cuts, is_causal=True)[0]
        return torch.autograd.grad(out.float().sum(), packed)

    def grouped() -> Any:
        takes, cuda_attention.takes = cuda_attention.takes, lambda *_: False
        try:
            return attend()
        finally:
            cuda_attention.takes = takes

    yield "packed attention", "lorica", attend
    yield "packed attention", "torch, by groups of one length", grouped

    features = 64 if tiny else 4096
    weight = torch.randn(features, features, device=device, dtype=dtype)
    x = torch.randn(rows, features, device=device, dtype=dtype, requires_grad=True)
    codes = quantize(weight, "nf4", double_quant=True)
    plain = torch.nn.Linear(features, features, bias=False, device="meta")
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    yield "NF4 product", "lorica", lambda: torch.autograd.grad(linear(x, codes).float().sum(), x)
    if find_spec("bitsandbytes") is not None:
        theirs = quantized_by_bitsandbytes(plain)
        yield "NF4 product", "bitsandbytes", lambda: torch.autograd.grad(theirs(x).float().sum(), x)
    yield "NF4 product", "bf16 weight", lambda: torch.autograd.grad(plain(x).float().sum(), x)


def run_kernels(device: str, tiny: bool, repeats: int) -> dict[str, dict[str, dict[str, Any]]]:
    """By work and side: median seconds, and bytes above what was there before."""
    import torch

    is_cuda, found = torch.device(device).type == "cuda", {}
    for work, side, call in kernels(device, tiny):
        seconds, before = [], 0
        for turn in range(repeats + 2):
            if is_cuda and turn == 2:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            begin = time.perf_counter()
            call()
            if is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated() - before if is_cuda else 0
        found.setdefault(work, {})[side] = {"seconds": seconds[2:], "peak": peak}
    return found
