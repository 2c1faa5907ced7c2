"""One LoRA training step, beside PEFT's, in the same run.

    python benchmarks/train_step.py                       # 135M Llama shape, bf16, 4 x 512 tokens, r = 16, all linears
    python benchmarks/train_step.py --shape qwen3 --steps 7

Each side runs in a process of its own, since peak memory is a property of a process; the sides take turns (A B A B),
and the ratio of their medians is what counts: absolute seconds on a shared machine drift. Random weights, random
tokens. The process's peak resident set includes the import of torch and transformers on both sides; `growth` is what
lies above the resident set with the model loaded. PEFT is needed for this script only.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "360m": {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
             "num_key_value_heads": 5, "vocab_size": 49152, "tie_word_embeddings": True},
    "qwen3": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
              "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 65536, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257},
}  # fmt: skip
SIDES = ("lorica", "peft")


def build(shape: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

    kind = {"qwen3": Qwen3Config, "gpt2": GPT2Config}.get(shape, LlamaConfig)
    torch.manual_seed(0)
    config = kind(**SHAPES[shape], bos_token_id=0, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))


def resident_bytes(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def prepare_peft(model: Any, ids: Any, targets: str | list[str]) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model

    kind = "all-linear" if targets == "all-linear" else targets
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=kind, task_type="CAUSAL_LM"))
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3, fused=True)

    def step() -> float:
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def prepare_lorica(model: Any, ids: Any, targets: str | list[str]) -> Any:
    import torch

    import lorica
    from lorica.models.load import equip
    from lorica.models.loss import make_loss
    from lorica.training.optim import make_optimizer

    lorica.adapt(equip(model), lorica.LoRA(rank=16, alpha=32, targets=targets))
    model.train()
    loss_of = make_loss(model)
    optimizer = make_optimizer(
        lorica.trainable_parameters(model), lr=1e-3, betas=(0.9, 0.999), epsilon=1e-8, weight_decay=0.01
    )
    samples, length = ids.shape
    borders = torch.arange(0, ids.numel() + 1, length, dtype=torch.int32)
    inputs = {
        "input_ids": ids.reshape(1, -1), "position_ids": torch.arange(length).repeat(samples)[None],
        "cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": length, "max_length_k": length,
    }  # fmt: skip
    shifted = torch.cat([ids[:, 1:], torch.full((samples, 1), -100)], dim=1).reshape(1, -1)
    num_targets = samples * (length - 1)

    def step() -> float:
        loss = loss_of(model, inputs, shifted) / num_targets
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def run_side(side: str, shape: str, steps: int, samples: int, length: int, dtype: str) -> dict[str, Any]:
    import torch

    from lorica.kernels.pool import install_pool

    if side == "lorica":
        install_pool()
    model = build(shape, dtype)
    loaded = resident_bytes("VmRSS")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SHAPES[shape]["vocab_size"], (samples, length), generator=generator)
    prepare = prepare_peft if side == "peft" else prepare_lorica
    step = prepare(model, ids, "all-linear")
    losses, seconds = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - begin)
    peak = resident_bytes("VmHWM")
    return {"side": side, "seconds": seconds[1:], "losses": losses, "peak": peak, "growth": peak - loaded}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--steps", type=int, default=4, help="steps in a process; the first is a warm-up")
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (arguments.shape, arguments.steps, arguments.samples, arguments.length, arguments.dtype)
    if arguments.side:
        print(json.dumps(run_side(arguments.side, *shape)))
        return
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    command = [sys.executable, "-W", "ignore", __file__, "--shape", arguments.shape, "--steps", str(arguments.steps)]
    command += ["--samples", str(arguments.samples), "--length", str(arguments.length), "--dtype", arguments.dtype]
    # What `lorica` sets for itself; both sides get it, since it helps both where the machine has other work.
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ}
    for _ in range(arguments.rounds):
        for side in SIDES:
            done = subprocess.run(
                [*command, "--side", side], stdout=subprocess.PIPE, text=True, check=True, env=environment
            )
            results[side].append(json.loads(done.stdout.splitlines()[-1]))
    report(arguments, results)


def report(arguments: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    tokens = arguments.samples * arguments.length
    rows = {}
    for side, runs in results.items():
        seconds = statistics.median(second for run in runs for second in run["seconds"])
        peak, growth = (max(run[key] for run in runs) for key in ("peak", "growth"))
        rows[side] = {"seconds": seconds, "peak": peak, "growth": growth}
        losses = " ".join(f"{loss:.4f}" for loss in runs[0]["losses"])
        print(
            f"{side:8} {seconds:7.3f} s a step {tokens / seconds:7.0f} tokens/s   peak {peak / 1e9:5.2f} GB, "
            f"{growth / 1e9:5.2f} GB of it above the loaded model   losses {losses}"
        )
    theirs = rows["peft"]
    for side in SIDES[:-1]:
        ours = rows[side]
        print(
            f"{side}: {theirs['seconds'] / ours['seconds']:.2f} x as fast as peft, "
            f"{ours['peak'] / theirs['peak']:.0%} of the peak memory, "
            f"{ours['growth'] / theirs['growth']:.0%} of the growth"
        )
    append_results(f"{arguments.shape} {arguments.dtype}", tokens, rows)


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    has = next((line for line in lines if line.startswith("flags")), "").split()
    return name + "".join(f" {flag}" for flag in ("avx2", "avx512_bf16", "amx_bf16") if flag in has)


def append_results(work: str, tokens: int, rows: dict[str, dict[str, float]]) -> None:
    file = Path(__file__).parent / "results" / "train_step.csv"
    file.parent.mkdir(exist_ok=True)
    head = ("date", "commit", "machine", "cores", "shape", "tokens", "side", "seconds", "peak_bytes", "growth_bytes")
    fresh = not file.exists()
    git = ["git", "-C", str(file.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    common = (time.strftime("%Y-%m-%d"), commit, processor(), os.cpu_count(), work, tokens)
    with file.open("a", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([head] if fresh else [])
        writer.writerows(
            (*common, side, round(row["seconds"], 4), row["peak"], row["growth"]) for side, row in rows.items()
        )


if __name__ == "__main__":
    main()
