"""One HydraLoRA training step beside a LoRA step of the same rank, and beside a loop over the heads, in the same run.

    python benchmarks/hydra_step.py                # 135M Llama shape, bf16, 4 x 512 tokens, r = 16, N = 4, all linears
    python benchmarks/hydra_step.py --shape qwen3 --samples 1 --length 64

    lora     lorica's LoRA
    hydra    lorica's HydraLoRA: all heads in one product
    loop     HydraLoRA with its heads in a loop, A x and dropout anew in each, as the authors' code has it; the model,
             its attention and its loss are the same as above

Each side runs in a process of its own, and they take turns; what counts is the ratio of the medians. Random weights and
tokens. The goal: hydra at most 1.10 x lora, and loop at least 1.5 x hydra.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from train_step import SHAPES, build, processor, resident_bytes

SIDES = ("lora", "hydra", "loop")
RANK = 16


def loop_layer(base: Any, num_heads: int, dropout: float) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional as F

    from lorica.kernels.linear import linear

    class LoopedHeads(nn.Module):
        """y = W x + s sum_i g_i B_i A drop(x), head by head."""

        def __init__(self) -> None:
            super().__init__()
            self.base = base.requires_grad_(False)
            out_size, in_size = base.weight.shape
            self.lora_a = nn.Parameter(torch.empty(RANK, in_size).uniform_(-(in_size**-0.5), in_size**-0.5))
            self.route = nn.Parameter(torch.empty(num_heads, in_size).uniform_(-(in_size**-0.5), in_size**-0.5))
            self.heads = nn.ParameterList(torch.zeros(out_size, RANK) for _ in range(num_heads))

        @property
        def weight(self) -> Any:
            return self.base.weight

        def forward(self, x: Any) -> Any:
            result = self.base(x)
            gates = F.softmax(linear(x, self.route), dim=-1, dtype=torch.float32).to(result.dtype)
            for i, head in enumerate(self.heads):
                h = linear(F.dropout(x, dropout, self.training), self.lora_a)
                result = result + gates[..., i, None] * linear(h, head) * 2.0
            return result

    return LoopedHeads()


def adapt(side: str, model: Any, num_heads: int, dropout: float) -> dict[str, Any]:
    """Adapt every linear layer but the head; the trainable parameters by name."""
    from torch import nn

    import lorica

    if side == "lora":
        lorica.adapt(model, lorica.LoRA(rank=RANK, alpha=2 * RANK, dropout=dropout))
    elif side == "hydra":
        lorica.adapt(model, lorica.HydraLoRA(rank=RANK, alpha=2 * RANK, dropout=dropout, num_heads=num_heads))
    else:
        model.requires_grad_(False)
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not head:
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, loop_layer(module, num_heads, dropout))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def run_side(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from lorica.kernels.pool import install_pool
    from lorica.models.load import equip
    from lorica.models.loss import make_loss
    from lorica.training.optim import make_optimizer

    install_pool()
    model = equip(build(arguments.shape, arguments.dtype))
    loaded = resident_bytes("VmRSS")
    parameters = adapt(arguments.side, model, arguments.heads, arguments.dropout)
    model.train()
    loss_of = make_loss(model)
    optimizer = make_optimizer(parameters, lr=1e-3, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01)
    samples, length = arguments.samples, arguments.length
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SHAPES[arguments.shape]["vocab_size"], (samples, length), generator=generator)
    borders = torch.arange(0, ids.numel() + 1, length, dtype=torch.int32)
    inputs = {
        "input_ids": ids.reshape(1, -1), "position_ids": torch.arange(length).repeat(samples)[None],
        "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": length, "max_length_k": length,
    }  # fmt: skip
    targets = torch.cat([ids[:, 1:], torch.full((samples, 1), -100)], dim=1).reshape(1, -1)
    losses, seconds = [], []
    for _ in range(arguments.steps):
        begin = time.perf_counter()
        loss = loss_of(model, inputs, targets) / (samples * (length - 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
    peak = resident_bytes("VmHWM")
    return {
        "seconds": seconds[1:], "losses": losses, "growth": peak - loaded,
        "num_parameters": sum(p.numel() for p in parameters.values()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[s for s in SHAPES if s != "gpt2"], default="135m")
    parser.add_argument("--steps", type=int, default=4, help="steps in a process; the first is a warm-up")
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments)))
        return
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ}
    for _ in range(arguments.rounds):
        for side in SIDES:
            command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            results[side].append(json.loads(done.stdout.splitlines()[-1]))
    report(arguments, results)


def report(arguments: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    tokens = arguments.samples * arguments.length
    medians = {side: statistics.median(s for run in runs for s in run["seconds"]) for side, runs in results.items()}
    growth = {side: max(run["growth"] for run in runs) for side, runs in results.items()}
    for side, runs in results.items():
        print(
            f"{side:6} {medians[side]:7.3f} s a step {tokens / medians[side]:7.0f} tokens/s   "
            f"{growth[side] / 1e9:5.2f} GB above the loaded model   {runs[0]['num_parameters']:,} parameters   "
            f"losses {' '.join(f'{loss:.4f}' for loss in runs[0]['losses'])}"
        )
    print(f"hydra takes {medians['hydra'] / medians['lora']:.3f} x the time of lora (goal: at most 1.10)")
    print(f"loop takes {medians['loop'] / medians['hydra']:.3f} x the time of hydra (goal: at least 1.5)")
    file = Path(__file__).parent / "results" / "hydra_step.csv"
    file.parent.mkdir(exist_ok=True)
    head = ("date", "machine", "cores", "shape", "dtype", "tokens", "heads", "side", "seconds", "growth_bytes")
    fresh = not file.exists()
    work = (arguments.shape, arguments.dtype, tokens, arguments.heads)
    with file.open("a", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([head] if fresh else [])
        for side, seconds in medians.items():
            row = (time.strftime("%Y-%m-%d"), processor(), os.cpu_count(), *work, side, round(seconds, 4), growth[side])
            writer.writerow(row)


if __name__ == "__main__":
    main()
