"""LoRA steps on a GPU beside PEFT's (with bitsandbytes for NF4, and Liger where it is installed), and kernels alone.

    python benchmarks/gpu.py                                  # everything: 1B and 8B shapes, bf16 and NF4
    python benchmarks/gpu.py --shapes 1b --steps 20           # only one shape
    python benchmarks/gpu.py --device cpu --tiny              # to see that it works; its figures mean nothing

`benchmarks/gpu.sh` makes the environment, runs the tests that need a GPU and then this. Each side of each case is a
process of its own; the sides take turns (A B A B), and what counts is the ratio of their medians in one run. Random
weights of real shapes, random tokens, r = 16 on all linear layers. Rows are of one length, or of lengths as they come:
then PEFT pads and Lorica packs, and tokens a second are those of the samples, padding not counted. Memory is torch's
`max_memory_allocated` over the steps, the base included; beside it what `lorica plan` predicts for that case.

Goals: twice PEFT's tokens a second, in half its memory. Results: results/gpu.csv, with commit and machine.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_kernels import run_kernels
from gpu_sides import SHAPES, Case, predicted_bytes, run_side
from train_step import processor

GOALS = {"tokens/s": 2.0, "memory": 0.5}


@dataclass(frozen=True)
class Row:
    """A line of the results. predicted_bytes: of `lorica plan`, on our own side only; 0 elsewhere."""

    date: str
    commit: str
    machine: str
    torch: str
    work: str
    side: str
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_bytes: int
    predicted_bytes: int


def cases(shapes: list[str], samples: int, length: int) -> list[Case]:
    even = (length,) * samples
    # As instructions come: most short, a few long.
    uneven = tuple(max(8, round(length * (i + 1) ** 2 / samples**2)) for i in range(samples))
    if shapes == ["tiny"]:
        return [Case("tiny", "", False, even), Case("tiny", "nf4", True, uneven)]
    return [
        *(Case(shape, quant, on, even) for shape in shapes for quant in ("", "nf4") for on in (False, True)),
        *(Case(shape, "", True, uneven) for shape in shapes),
    ]


def machine(device: str) -> str:
    import torch

    if torch.device(device).type != "cuda":
        return processor()
    about = torch.cuda.get_device_properties(device)
    return f"{about.name} sm{about.major}{about.minor} {about.total_memory / 2**30:.0f} GiB"


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()


def in_process(arguments: argparse.Namespace, side: str, case: Case) -> dict[str, Any]:
    """`run_side` in a process of its own; if it fails, the end of its stderr is shown, and the case goes on without."""
    command = [sys.executable, "-W", "ignore", __file__, "--device", arguments.device, "--steps", str(arguments.steps)]
    command += ["--one", json.dumps({"side": side, **asdict(case)})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"  {side} failed: {' | '.join(done.stderr.strip().splitlines()[-2:])}")
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def measure(arguments: argparse.Namespace, case: Case) -> Iterator[Row]:
    import torch

    common = (time.strftime("%Y-%m-%d"), commit(), machine(arguments.device), torch.__version__, case.name)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
    for _ in range(1 if arguments.tiny else arguments.rounds):
        for side, found in runs.items():
            # Tiny steps are there to be tried, not to be measured: one process does them all.
            run = run_side(side, case, arguments.device, arguments.steps) if arguments.tiny else None
            found.append(run or in_process(arguments, side, case))
    for side, found in runs.items():
        if all(found):
            seconds, tokens = statistics.median(s for run in found for s in run["seconds"]), sum(case.lengths)
            peak = max(run["peak"] for run in found)
            plan = predicted_bytes(case, arguments.device) if side == "lorica" else 0
            yield Row(*common, side, tokens, round(seconds, 5), round(tokens / seconds, 1), peak, plan)


def measure_kernels(arguments: argparse.Namespace) -> Iterator[Row]:
    import torch

    common = (time.strftime("%Y-%m-%d"), commit(), machine(arguments.device), torch.__version__)
    for work, sides in run_kernels(arguments.device, arguments.tiny, 2 if arguments.tiny else 20).items():
        for side, found in sides.items():
            yield Row(*common, work, side, 0, round(statistics.median(found["seconds"]), 6), 0, found["peak"], 0)


def show(rows: list[Row]) -> None:
    """The rows of one work, and the first, which is ours, against the others."""
    for row in rows:
        rate = f"{row.tokens_per_second:9.0f} tokens/s  " if row.tokens else ""
        plan = f", {row.predicted_bytes / 1e9:.2f} GB predicted" if row.predicted_bytes else ""
        print(f"  {row.side:32} {row.seconds * 1e3:9.2f} ms  {rate}peak {row.peak_bytes / 1e9:7.2f} GB{plan}")
    ours, *others = rows
    for other in others if ours.side == "lorica" else []:
        speed, memory = other.seconds / ours.seconds, ours.peak_bytes / max(1, other.peak_bytes)
        goal = f" (goals {GOALS['tokens/s']} x, {GOALS['memory']:.0%})" if other.side == "peft" else ""
        print(f"  {speed:.2f} x as fast as {other.side}, {memory:.0%} of its memory{goal}")


def save(rows: list[Row], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = not file.exists()
    with file.open("a", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([[field.name for field in fields(Row)]] if fresh else [])
        writer.writerows(map(astuple, rows))


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and few steps, only to see that it works")
    parser.add_argument(
        "--shapes", nargs="+", choices=[name for name in SHAPES if name != "tiny"], default=["1b", "8b"]
    )
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024, help="tokens of the longest sample")
    parser.add_argument("--steps", type=int, default=8, help="that are measured, in a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "gpu.csv")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.tiny:
        arguments.shapes, arguments.samples, arguments.length, arguments.steps = ["tiny"], 3, 24, 1
    # Liger's kernels are Triton's: they need a GPU.
    arguments.sides = ["lorica", "peft"]
    if arguments.device.startswith("cuda") and find_spec("liger_kernel") is not None:
        arguments.sides.append("liger")
    return arguments


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    if arguments.one:
        one = json.loads(arguments.one)
        side = one.pop("side")
        case = Case(**{**one, "lengths": tuple(one["lengths"])})
        print(json.dumps(run_side(side, case, arguments.device, arguments.steps)))
        return
    print(machine(arguments.device))
    for case in cases(arguments.shapes, arguments.samples, arguments.length):
        print(f"{case.name}, {sum(case.lengths)} tokens")
        rows = list(measure(arguments, case))
        if rows:
            show(rows)
        save(rows, arguments.results)
    alone = list(measure_kernels(arguments))
    for work in dict.fromkeys(row.work for row in alone):
        print(work)
        show([row for row in alone if row.work == work])
    save(alone, arguments.results)


if __name__ == "__main__":
    main()
