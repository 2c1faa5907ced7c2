"""NF4 on a CPU: kernels, a training step, decoding and loading, beside bitsandbytes, in one run.

    python benchmarks/quant.py                    # every case, about twenty minutes on two cores
    python benchmarks/quant.py --only dequantise --repeats 15
    python benchmarks/quant.py --only train       # 135M Llama shape, 4 x 512 tokens, r = 16 on all linear layers
    python benchmarks/quant.py --only decode      # Llama-3.2-1B's shape, one prompt, with other heads too
    python benchmarks/quant.py --only load        # the same shape from shards in bfloat16

The sides take turns (A B A B), and the ratio of their medians is what counts: absolute figures on a shared machine
drift. Both get their tensors from Lorica's pool, so neither pays for fresh pages. Bytes are those that must move: codes
and scales read, the result written, so 2.56 an element for NF4 to 16 bits in blocks of 64; their rate is set against
that at which this machine copies, measured in the same run, or reads, for decoding. Whole models have a process for
each side (quant_model.py), in turns, with the peak that the kernel counted for it. `head` is what fewer bits in the
output head cost the embedded base. bitsandbytes is needed for this script and the tests only.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from floor import commit, processor
from torch.nn import functional as F

from lorica.kernels import cpu, nf4_dequantize, nf4_linear, nf4_quantize
from lorica.kernels.linear import cpu_computes, linear
from lorica.kernels.pool import install_pool
from lorica.quant.head import quantize_head

CASES = ("dequantise", "quantise", "multiply", "train", "decode", "load", "head")
SHAPES = ((2048, 2048), (8192, 2048))
BATCHES = (1, 2, 4, 8, 16, 64)
HEAD = ("date", "commit", "machine", "threads", "load", "work", "side", "seconds", "elements", "bytes", "copy_fraction",
        "peak_bytes")  # fmt: skip


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
        self.models = tempfile.TemporaryDirectory()
        source = torch.randn(2**26, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        num_bytes = 2 * source.numel() * source.element_size()
        self.copy = num_bytes / medians({"copy": lambda: target.copy_(source)}, repeats)["copy"]
        numbers = torch.ones(2**27)
        self.read = numbers.nbytes / medians({"read": numbers.sum}, repeats)["read"]
        print(f"copy: {self.copy / 1e9:.1f} GB/s (128 MB from memory to memory, both directions counted)")
        print(f"read: {self.read / 1e9:.1f} GB/s (the sum of 512 MB)")

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
                (round(load, 2), work, side, f"{each:.6g}", elements, round(num_bytes), round(fraction, 4), "")
            )

    def add_model(self, work: str, side: str, elements: int, result: dict[str, Any]) -> float:
        """Keep what the processes of one side of a whole model gave; the median of their seconds."""
        seconds, num_bytes = statistics.median(result["seconds"]), result.get("bytes", "")
        fraction = round(num_bytes / seconds / self.copy, 4) if num_bytes else ""
        peak = result.get("growth", result["peak"])
        self.rows.append(
            (round(os.getloadavg()[0], 2), work, side, f"{seconds:.6g}", elements, num_bytes, fraction, peak)
        )
        return seconds

    def model(self, shape: str) -> Path:
        """The folder of a checkpoint of this shape, made at its first use."""
        folder = Path(self.models.name) / shape
        if not folder.exists():
            process("make", shape, folder)
        return folder

    def save(self) -> None:
        file = Path(__file__).parent / "results" / "quant.csv"
        fresh = not file.exists()
        common = (time.strftime("%Y-%m-%d"), commit(), processor(), torch.get_num_threads())
        with file.open("a", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerows([HEAD] if fresh else [])
            writer.writerow((*common, "", "copy", "torch", "", "", round(self.copy), 1, ""))
            writer.writerow((*common, "", "read", "torch", "", "", round(self.read), "", ""))
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


def process(case: str, side: str, folder: Path, **options: object) -> dict[str, Any]:
    """What `quant_model.py` says of one side, and the peak of its memory that the kernel told its parent."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("quant_model.py")), case, side, str(folder)]
    command += [
        text for name, value in options.items() if value for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    command += ["--threads", str(torch.get_num_threads())]
    # What `lorica` sets for itself; all sides get it.
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        output = child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return {**json.loads(output.splitlines()[-1]), "peak": used.ru_maxrss * 1024}


def together(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of several processes of one side: all seconds, the highest peak."""
    seconds = [second for result in results for second in result["seconds"]]
    return {**results[0], "seconds": seconds, "peak": max(result["peak"] for result in results)}


def train(table: Table) -> None:
    """In the dtype that `model.dtype: auto` takes here for a bfloat16 base, the same for all sides."""
    dtype = "bfloat16" if cpu_computes(torch.bfloat16) else "float32"
    found: dict[str, list[dict[str, Any]]] = {"lorica-nf4": [], "lorica": [], "bitsandbytes": []}
    for _ in range(2):
        for side, results in found.items():
            results.append(process("train", side, table.model("135m"), dtype=dtype))
    work, rows = f"train 135m, {dtype}, 4x512", {side: together(results) for side, results in found.items()}
    seconds = {side: table.add_model(work, side, 4 * 512, row) for side, row in rows.items()}
    for side, row in rows.items():
        print(
            f"{work:39} {side:21} {seconds[side]:8.3f} s a step, peak {row['peak'] / 1e6:7.0f} MB  NF4 takes "
            f"{seconds['lorica-nf4'] / seconds[side]:.2f} of its time, {rows['lorica-nf4']['peak'] / row['peak']:.0%} "
            f"of its peak   losses {' '.join(f'{loss:.3f}' for loss in row['losses'])}"
        )


def decode(table: Table) -> None:
    """In bfloat16, the fastest here for every side; a token a call."""
    sides: dict[str, dict[str, object]] = {
        "lorica-nf4": {}, "lorica-nf4, int8 head": {"head": "int8"}, "lorica-nf4, nf4 head": {"head": "nf4"},
        "lorica": {}, "transformers": {}, "bitsandbytes": {"tokens": 3},
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(2):
        for side, options in sides.items():
            found[side].append(process("decode", side.split(",")[0], table.model("1b"), **options))
    work, rows = "decode 1b, bfloat16, a token", {side: together(results) for side, results in found.items()}
    seconds = {side: table.add_model(work, side, 1, row) for side, row in rows.items()}
    for side, each in seconds.items():
        limit = rows[side]["bytes"] / table.read
        print(
            f"{work:39} {side:21} {1 / each:7.2f} tokens/s, {rows[side]['bytes'] / 1e6:6.0f} MB each: "
            f"{limit / each:5.1%} of what reading allows; {seconds['transformers'] / each:5.2f} x transformers, "
            f"{seconds['lorica'] / each:5.2f} x ours in 16 bits; peak {rows[side]['peak'] / 1e6:.0f} MB"
        )


def load(table: Table) -> None:
    """Growth of the process's peak beyond a warm-up, against the size of what is loaded."""
    for side in ("lorica-nf4", "bitsandbytes", "lorica"):
        row = process("load", side, table.model("1b"), warm_up=table.model("warm-up"))
        work = "load 1b from bfloat16 shards"
        seconds = table.add_model(work, side, 1, row)
        print(
            f"{work:39} {side:21} {seconds:7.2f} s, grows by {row['growth'] / 1e6:6.0f} MB; the model is "
            f"{row['bytes'] / 1e6:6.0f} MB"
        )


def head(table: Table) -> None:
    """What a head in fewer bits costs: the embedded base on this project's docs."""
    import lorica

    text = "\n\n".join(path.read_text() for path in sorted(Path(__file__).parents[1].glob("docs/*.md")))
    ids = lorica.load_tokenizer("embedded")(text, return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // 256 * 256].view(-1, 256)[:32]

    def logs(scheme: str | None) -> torch.Tensor:
        model = lorica.load_model("embedded", dtype="float32", device="cpu")
        if scheme:
            quantize_head(model, scheme)
        return model(input_ids=rows).logits[:, :-1].float().log_softmax(-1).flatten(0, 1)

    targets, exact = rows[:, 1:].reshape(-1, 1), logs(None)
    for scheme in ("int8", "nf4"):
        other = logs(scheme)
        kl = (exact.exp() * (exact - other)).sum(-1).mean().item()
        before, after = ((-side.gather(1, targets)).mean().exp().item() for side in (exact, other))
        same = (exact.argmax(-1) == other.argmax(-1)).float().mean().item()
        print(
            f"head of the embedded base in {scheme:4}: KL {kl:.2e} nats a token, perplexity {before:.4f} -> "
            f"{after:.4f}, the same first choice for {same:.2%} of {len(targets):,} tokens"
        )


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
        for case, run in zip(CASES, (dequantise, quantise, multiply, train, decode, load, head), strict=True):
            if arguments.only in (None, case):
                run(table)
    if not arguments.no_save:
        table.save()


if __name__ == "__main__":
    main()
