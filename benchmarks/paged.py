"""The paged AdamW beside torch's and bitsandbytes' own, and a full fine-tuning whose moments do not fit.

    python benchmarks/paged.py step                      # 134M parameters: seconds a step of the optimizer alone
    python benchmarks/paged.py step --drop               # the same, pages read from the disk at each step
    python benchmarks/paged.py train                     # 135M Llama shape, method full, 128 tokens a step
    python benchmarks/paged.py train --limit 2.7         # the same where the system gives no more than 2.7 GB

Each side runs in a process of its own, since peak memory is a property of a process; the sides take turns. `growth` of
`step` is what the process's resident set grew by above weights and gradients; a warm-up of the same code in small came
before. The peak of `train` is what the system told the parent of the process (ru_maxrss), beside the process's own
figure, and its losses are compared bit for bit with those of the first side. The limit is RLIMIT_DATA: an allocation
beyond it fails, as it would on a machine without more memory.

Pages are written to the folder of `--folder`; whether they come back from the disk or from the kernel's cache is the
kernel's choice. `--drop` takes the page file out of the cache before each step. What paging moved in a second stands
beside what the disk does with the same file in pages of the same size: written to the disk itself, and read from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train_step import build, resident_bytes

LARGEST_PAGE_BYTES = 8 << 20
STEP_SIDES = ("torch", "paged", "half paged", "8 bits", "8 bits paged", "bitsandbytes 8 bits")
TRAIN_SIDES = ("unpaged", "paged", "8 bits paged")
LAYERS = 32
SHAPES = ((1024, 1024), (1024, 1024), (1024, 2048), (1024,))
"""Of one layer: 4.2M parameters, so 134M in all, whose moments take 1.07 GB in 32 bits."""


def make_step_optimizer(side: str, parameters: list[Any], folder: Path) -> Any:
    import torch

    from lorica.training.paged import PagedAdamW, Tiers

    if side == "torch":
        return torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    if side == "bitsandbytes 8 bits":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, lr=1e-3)
    num_bytes = sum(p.numel() for p in parameters) * (2 if side.startswith("8") else 8)
    device = {"half paged": num_bytes // 2, "8 bits": None}.get(side, 64 << 20)
    bits = 8 if side.startswith("8") else 32
    groups = [{"params": parameters, "weight_decay": 1e-2}]
    return PagedAdamW(groups, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, bits=bits, tiers=Tiers(device, 0, folder))


def run_step(side: str, steps: int, folder: Path, drop: bool) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)

    def go(layers: int) -> tuple[list[float], int, int]:
        parameters = [torch.nn.Parameter(torch.randn(shape)) for _ in range(layers) for shape in SHAPES]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes("VmRSS")
        optimizer = make_step_optimizer(side, parameters, folder)
        pages = getattr(optimizer, "_travelling", [])
        seconds = []
        for _ in range(steps):
            if drop and pages:
                forget_cached(optimizer._file)
            seconds.append(timed(optimizer.step))
        # There and back.
        return seconds[1:], resident_bytes("VmHWM") - before, 2 * sum(page.num_bytes for page in pages)

    go(2)
    seconds, growth, moved = go(LAYERS)
    return {"seconds": seconds, "growth": growth, "peak": resident_bytes("VmHWM"), "moved": moved}


def timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def forget_cached(file: Any) -> None:
    """Write a page file to the disk and take it out of the kernel's cache."""
    number = file._file.fileno()
    os.fsync(number)
    os.posix_fadvise(number, 0, 0, os.POSIX_FADV_DONTNEED)


def disk_speed(folder: Path, num_bytes: int) -> dict[str, float]:
    """Bytes a second of a page file of `num_bytes`, a page at a time from its beginning: `write` until it is on the
    disk, `read` from there, and `cached` from the kernel's cache.
    """
    import torch

    from lorica.training.pages import PageFile

    file = PageFile(folder, num_bytes)
    # No zeros: some disks pack them.
    page = torch.randint(0, 256, (LARGEST_PAGE_BYTES,), dtype=torch.uint8)
    offsets = range(0, num_bytes - LARGEST_PAGE_BYTES + 1, LARGEST_PAGE_BYTES)

    def write() -> None:
        for offset in offsets:
            file.write(offset, page)
        os.fsync(file._file.fileno())

    def read() -> None:
        for offset in offsets:
            file.read(offset, page)

    moved = len(offsets) * LARGEST_PAGE_BYTES
    written = timed(write)
    forget_cached(file)
    return {"write": moved / written, "read": moved / timed(read), "cached": moved / timed(read)}


def run_train(side: str, steps: int, folder: Path) -> dict[str, Any]:
    """A full fine-tuning as `recipes/train.py` does it: the pool, the loop, a checkpoint at the end."""
    import torch

    import lorica
    from lorica.data.sampler import Order
    from lorica.data.tokenized import TokenizedDataset
    from lorica.kernels.pool import install_pool
    from lorica.methods.full import FullFineTuning
    from lorica.models.load import equip
    from lorica.models.loss import make_loss
    from lorica.training.loop import run_loop
    from lorica.training.metrics import read_metrics
    from lorica.training.step import LoopOptions

    install_pool()
    model = lorica.adapt(equip(build("135m", "bfloat16")), FullFineTuning())
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 49152, (64,), generator=generator).tolist() for _ in range(2 * steps)]
    dataset = TokenizedDataset.from_samples([(ids, ids) for ids in rows])
    memory = None if side == "unpaged" else 64 << 20
    options = LoopOptions(
        lr=1e-4, micro_batch_tokens=128, optimizer_memory=memory, optimizer_bits=8 if side.startswith("8") else 32
    )
    with tempfile.TemporaryDirectory(dir=folder) as run:
        run_loop(
            model,
            make_loss(model),
            dataset,
            Order(dataset.lengths, seed=0, batch_tokens=128, epochs=1.0),
            folder=Path(run),
            options=options,
            evaluate=None,
            resume=None,
            identity={},
        )
        rows = read_metrics(Path(run) / "metrics.jsonl")
    ends = [row["seconds"] for row in rows]
    return {
        "seconds": [after - before for before, after in itertools.pairwise(ends)],
        "peak": resident_bytes("VmHWM"),
        "losses": [row["loss"] for row in rows],
    }


def run_apart(side: str) -> dict[str, Any] | None:
    """What a side measures in a process of its own, and the peak that the system tells of it; None where it failed."""
    command = [sys.executable, "-W", "ignore", *sys.argv, "--side", side]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print(f"{side}: ended with exit code {process.returncode}")
        return None
    return {**json.loads(output.splitlines()[-1]), "ru_maxrss": usage.ru_maxrss * 1024}


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    first = next((runs[0] for runs in results.values() if runs), {})
    for side, runs in results.items():
        if not runs:
            continue
        seconds = statistics.median(second for run in runs for second in run["seconds"])
        if "losses" in runs[0]:
            peaks = " / ".join(f"{max(run[key] for run in runs) / 1e9:5.2f}" for key in ("ru_maxrss", "peak"))
            equal = "losses equal" if runs[0]["losses"] == first["losses"] else "losses differ"
            print(f"{side:20} {seconds:7.3f} s a step   peak {peaks} GB   {equal}: {runs[0]['losses']}")
            continue
        moved = max(run["moved"] for run in runs)
        paging = f"   paging moved {moved / seconds / 1e6:,.0f} MB/s" if moved else ""
        growth = max(run["growth"] for run in runs)
        print(f"{side:20} {seconds:7.3f} s a step   growth {growth / 1e6:6.0f} MB{paging}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "train"))
    parser.add_argument("--steps", type=int, default=4, help="steps in a process; the first is a warm-up")
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--drop", action="store_true", help="of step: no page comes from the kernel's cache")
    parser.add_argument("--limit", type=float, help="GB that the system gives to the process")
    parser.add_argument("--sides", nargs="+", help="some of them")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        if arguments.limit:
            limit = int(arguments.limit * 1e9)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        if arguments.what == "step":
            measured = run_step(arguments.side, arguments.steps, arguments.folder, arguments.drop)
        else:
            measured = run_train(arguments.side, arguments.steps, arguments.folder)
        print(json.dumps(measured))
        return
    sides = arguments.sides or (STEP_SIDES if arguments.what == "step" else TRAIN_SIDES)
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(arguments.rounds):
        for side in sides:
            measured = run_apart(side)
            results[side] += [] if measured is None else [measured]
    show(results)
    if arguments.what == "step":
        parameters = LAYERS * sum(math.prod(shape) for shape in SHAPES)
        speed = disk_speed(arguments.folder, 8 * parameters)
        told = ", ".join(f"{name} {value / 1e6:,.0f} MB/s" for name, value in speed.items())
        print(f"the disk, {8 * parameters / 1e9:.2f} GB in pages: {told}")


if __name__ == "__main__":
    main()
