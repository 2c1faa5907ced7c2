"""The paged AdamW beside torch's and bitsandbytes' own, and a full fine-tuning whose moments do not fit.

    python benchmarks/paged.py step                      # 134M parameters: seconds a step of the optimizer alone
    python benchmarks/paged.py train                     # 135M Llama shape, method full, 128 tokens a step
    python benchmarks/paged.py train --limit 2.2         # the same where the system gives no more than 2.2 GB

Each side runs in a process of its own, since peak memory is a property of a process; the sides take turns. `growth` of
`step` is what the process's resident set grew by above weights and gradients; a warm-up of the same code in small came
before. The limit is RLIMIT_DATA: an allocation beyond it fails, as it would on a machine without more memory. Pages are
written to the folder of `--folder`; whether they come back from the disk or from the kernel's cache is the kernel's
choice, and `--drop` takes the cache away between steps.
"""

from __future__ import annotations

import argparse
import itertools
import json
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

STEP_SIDES = ("torch", "paged", "half paged", "8 bits", "8 bits paged", "bitsandbytes 8 bits")
TRAIN_SIDES = ("unpaged", "paged", "8 bits")
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

    def go(layers: int) -> tuple[list[float], int]:
        parameters = [torch.nn.Parameter(torch.randn(shape)) for _ in range(layers) for shape in SHAPES]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident_bytes("VmRSS")
        optimizer = make_step_optimizer(side, parameters, folder)
        seconds = [timed(optimizer.step, drop) for _ in range(steps)]
        return seconds[1:], resident_bytes("VmHWM") - before

    go(2)
    seconds, growth = go(LAYERS)
    return {"seconds": seconds, "growth": growth, "peak": resident_bytes("VmHWM")}


def timed(step: Callable[[], Any], drop: bool) -> float:
    if drop:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("1")
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def run_train(side: str, steps: int, folder: Path, drop: bool) -> dict[str, Any]:
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
        "growth": 0,
        "peak": resident_bytes("VmHWM"),
        "losses": [row["loss"] for row in rows],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "train"))
    parser.add_argument("--steps", type=int, default=4, help="steps in a process; the first is a warm-up")
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--drop", action="store_true", help="empty the kernel's cache before each step (needs root)")
    parser.add_argument("--limit", type=float, help="GB that the system gives to the process")
    parser.add_argument("--sides", nargs="+", help="some of them")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        if arguments.limit:
            limit = int(arguments.limit * 1e9)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        run = run_step if arguments.what == "step" else run_train
        print(json.dumps(run(arguments.side, arguments.steps, arguments.folder, arguments.drop)))
        return
    sides = arguments.sides or (STEP_SIDES if arguments.what == "step" else TRAIN_SIDES)
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for _ in range(arguments.rounds):
        for side in sides:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", *sys.argv, "--side", side],
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if done.returncode == 0:
                results[side].append(json.loads(done.stdout.splitlines()[-1]))
            else:
                print(f"{side}: ended with exit code {done.returncode}")
    for side, runs in results.items():
        if runs:
            seconds = statistics.median(second for run in runs for second in run["seconds"])
            growth, peak = (max(run[key] for run in runs) for key in ("growth", "peak"))
            losses = " ".join(f"{loss:.6f}" for loss in runs[0].get("losses", []))
            memory = f"growth {growth / 1e6:6.0f} MB" if growth else f"peak {peak / 1e9:5.2f} GB   losses {losses}"
            print(f"{side:20} {seconds:7.3f} s a step   {memory}")


if __name__ == "__main__":
    main()
