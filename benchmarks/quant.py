"""NF4 on a CPU: quantise, dequantise and multiply, beside bitsandbytes, in one process and one run.

    python benchmarks/quant.py                    # every case, about two minutes on two cores
    python benchmarks/quant.py --only dequantise --repeats 15

The sides take turns (A B A B), and the ratio of their medians is what counts: absolute figures on a shared machine
drift. Both get their tensors from Lorica's pool, so neither pays for fresh pages. Bytes are those that must move: codes
and scales read, the result written, so 2.56 an element for NF4 to 16 bits in blocks of 64; their rate is set against
that at which this machine copies, measured in the same run. bitsandbytes is needed for this script and the tests only.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from train_step import processor

from lorica.kernels import cpu, nf4_dequantize, nf4_linear, nf4_quantize
from lorica.kernels.linear import linear
from lorica.kernels.pool import install_pool

CASES = ("dequantise", "quantise", "multiply")
SHAPES = ((2048, 2048), (8192, 2048))
BATCHES = (1, 2, 4, 8, 16, 64)
HEAD = ("date", "commit", "machine", "threads", "load", "work", "side", "seconds", "elements", "bytes", "copy_fraction")


def medians(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds a call of each side, the sides in turn after a warm-up. Short calls are repeated within a measurement."""
    counts = {}
    for name, call in sides.items():
        call()
        begin = time.perf_counter()
        call()
        counts[name] = max(1, min(100, int(2e-3 / (time.perf_counter() - begin))))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, call in sides.items():
            begin = time.perf_counter()
            for _ in range(counts[name]):
                call()
            seconds[name].append((time.perf_counter() - begin) / counts[name])
    return {name: statistics.median(values) for name, values in seconds.items()}


class Table:
    """Prints each result as it comes and keeps the rows for the file."""

    def __init__(self, repeats: int) -> None:
        self.repeats, self.rows = repeats, list[tuple[object, ...]]()
        source = torch.randn(2**26, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        num_bytes = 2 * source.numel() * source.element_size()
        self.copy = num_bytes / medians({"copy": lambda: target.copy_(source)}, repeats)["copy"]
        print(f"copy: {self.copy / 1e9:.1f} GB/s (128 MB from memory to memory, both directions counted)")

    def add(self, work: str, elements: int, num_bytes: float, sides: dict[str, Callable[[], object]]) -> None:
        """Measure the sides of one piece of work; the first is ours."""
        load = os.getloadavg()[0]
        seconds = medians(sides, self.repeats)
        first = next(iter(seconds.values()))
        for side, each in seconds.items():
            fraction = num_bytes / each / self.copy
            note = "" if each == first else f"  we are {each / first:6.2f} x as fast"
            rate = f"{each * 1e3:9.3f} ms {elements / each / 1e9:8.3f} G/s {fraction:6.1%} of copy"
            print(f"{work:39} {side:21} {rate}{note}")
            self.rows.append(
                (round(load, 2), work, side, f"{each:.6g}", elements, round(num_bytes), round(fraction, 4))
            )

    def save(self) -> None:
        file = Path(__file__).parent / "results" / "quant.csv"
        fresh = not file.exists()
        git = ["git", "-C", str(file.parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
        common = (time.strftime("%Y-%m-%d"), commit, processor(), torch.get_num_threads())
        with file.open("a", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerows([HEAD] if fresh else [])
            writer.writerow((*common, "", "copy", "torch", "", "", round(self.copy), 1))
            writer.writerows((*common, *row) for row in self.rows)


def dequantise(table: Table) -> None:
    import bitsandbytes.functional as bnb

    for name, shape in (("in cache, 1M", (1024, 1024)), ("from memory, 64M", (8192, 8192))):
        count = shape[0] * shape[1]
        for dtype in (torch.bfloat16, torch.float32):
            codes, absmax = nf4_quantize(torch.randn(shape, dtype=dtype))
            state = bnb.QuantState(absmax, torch.Size(shape), None, 64, "nf4", dtype)
            table.add(
                f"dequantise {name}, {str(dtype)[6:]}", count, count * (0.5 + 4 / 64 + dtype.itemsize),
                {"lorica": lambda c=codes, a=absmax, s=shape, d=dtype: nf4_dequantize(c, a, s, d),
                 "bitsandbytes": lambda c=codes, s=state: bnb.dequantize_4bit(c, s)},
            )  # fmt: skip


def quantise(table: Table) -> None:
    import bitsandbytes.functional as bnb

    for name, count in (("1M", 2**20), ("16M", 2**24)):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(count, dtype=dtype)
            table.add(
                f"quantise {name}, {str(dtype)[6:]}", count, count * (0.5 + 4 / 64 + dtype.itemsize),
                {"lorica": lambda x=x: nf4_quantize(x),
                 "bitsandbytes": lambda x=x: bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")},
            )  # fmt: skip


def multiply(table: Table) -> None:
    """Against the ways that write the weight out, and against the same layer in 16 or 32 bits."""
    for shape in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            dense = torch.randn(shape, dtype=dtype)
            for batch in BATCHES:
                work = f"multiply {shape[0]}x{shape[1]}, {str(dtype)[6:]}, {batch} rows"
                sides = products(torch.randn(batch, shape[1], dtype=dtype), dense)
                table.add(work, dense.numel() * batch, dense.numel() * (0.5 + 4 / 64), sides)


def products(x: torch.Tensor, dense: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The ways to multiply x by `dense` in NF4, and by itself."""
    import bitsandbytes
    import bitsandbytes.functional as bnb

    codes, absmax = nf4_quantize(dense)
    state = bnb.QuantState(absmax, dense.shape, torch.empty(16), 64, "nf4", dense.dtype)
    is_fused = len(x) <= cpu.fused_rows(x.dtype)
    sides: dict[str, Callable[[], object]] = {
        "lorica, fused" if is_fused else "lorica, not fused": lambda: nf4_linear(x, codes, absmax, dense.shape),
        "dequantise, multiply": lambda: linear(x, nf4_dequantize(codes, absmax, dense.shape, dense.dtype)),
        "bitsandbytes": lambda: bitsandbytes.matmul_4bit(x, codes.t(), state),
        "not quantised, torch": lambda: F.linear(x, dense),
    }
    if dense.dtype is torch.bfloat16:
        sides["not quantised, lorica"] = lambda: linear(x, dense)
    return sides


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args()
    install_pool()
    torch.set_num_threads(arguments.threads)
    built = cpu.compiled()
    path = "reference" if built is None else f"{built.lorica_simd()} bits" if built.lorica_simd() else "plain C"
    print(f"{processor()}, {arguments.threads} threads, kernels: {path}")
    if os.getloadavg()[0] > 0.5:
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): believe the ratios only")
    table = Table(arguments.repeats)
    with torch.no_grad():
        for case, run in (("dequantise", dequantise), ("quantise", quantise), ("multiply", multiply)):
            if arguments.only in (None, case):
                run(table)
    if not arguments.no_save:
        table.save()


if __name__ == "__main__":
    main()
