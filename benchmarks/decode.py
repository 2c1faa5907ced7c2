"""Greedy decoding, beside transformers' `generate` (and PEFT's adapters) in the same run.

    python benchmarks/decode.py                                         # 135M Llama shape, float32, one prompt
    python benchmarks/decode.py --shape qwen3 --batch 16 --dtype bfloat16 --adapter lora
    python benchmarks/decode.py --published                             # weights as a checkpoint in bfloat16 has them
    python benchmarks/decode.py --shape 1b --dtype bfloat16 --quant nf4
    python benchmarks/decode.py --all                                   # every case of the table, appended to the CSV

Each side is a process of its own, since peak memory is a property of a process; the sides take turns (A B A B), and
the ratio of their medians is what counts. Random weights, the same on both sides, prompts of 64 tokens (`--uneven`: of
16 to 64), 64 new tokens for each. Seconds are those of the whole call; `step` is a token's without the prompt's: the
long answer less an answer of one token. The floor of a step is what it must read, all weights but the embedding's and
the filled part of the cache, over the bandwidth measured in the same run, or its products over the rate of matrix
products, whichever is longer. The peer of `hydra`, which PEFT does not have, is transformers' `generate` over the same
adapted model, not equipped.

With `--published` both sides start from weights rounded to bfloat16 and held in float32, which is what Lorica makes of
nearly every checkpoint on a CPU that computes no bfloat16. Then, and for `8m`, which is such a checkpoint, it stores
them in 16 bits for decoding (evaluate/compact.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import quant_model
from floor import (
    Comparison,
    announce,
    append_rows,
    decode_bytes,
    measure_bandwidth,
    measure_ceiling,
    resident_bytes,
    rounded,
)
from train_step import SHAPES, make_config

SIDES = ("lorica", "transformers")
ADAPTERS = ("none", "lora", "merged", "hydra")
KEYS = ("shape", "dtype", "batch", "adapter", "quant", "uneven", "published")


def build(shape: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from lorica.assets import embedded_base

    if shape == "8m":
        return AutoModelForCausalLM.from_pretrained(embedded_base(), dtype=getattr(torch, dtype))
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make_config(shape), dtype=getattr(torch, dtype))


def make(side: str, a: argparse.Namespace) -> Any:
    """The model of one side; adapters get the same random weights on both."""
    import torch

    is_ours = side == "lorica"
    if a.quant:
        model = quant_model.load("lorica-nf4" if is_ours else "bitsandbytes", Path(a.folder), a.dtype)
    else:
        model = build(a.shape, a.dtype)
        if a.published:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter.bfloat16())
        if is_ours:
            from lorica.models.load import equip

            equip(model)
    if a.adapter == "none":
        return model.eval()
    if is_ours or a.adapter == "hydra":
        import lorica

        options: Any = lorica.HydraLoRA(rank=8) if a.adapter == "hydra" else lorica.LoRA(rank=16, targets="all-linear")
        adapted = lorica.adapt(model, options)
    else:
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    generator = torch.Generator().manual_seed(1)
    trained = {
        n.replace(".default", "").replace(".weight", ""): p for n, p in adapted.named_parameters() if p.requires_grad
    }
    with torch.no_grad():
        for name in sorted(trained, key=lambda n: n[n.find("layers.") :].lower()):
            trained[name].copy_(torch.randn(trained[name].shape, generator=generator) * 0.02)
    if a.adapter == "merged":
        import lorica

        adapted = lorica.merge(adapted) if is_ours else adapted.merge_and_unload()
    return adapted.eval()


def run_side(side: str, a: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import GenerationConfig
    from transformers.utils import logging

    from lorica.evaluate.compact import compact
    from lorica.evaluate.generation import generate

    logging.disable_progress_bar()
    model = make(side, a)
    if side == "lorica":
        compact(model.requires_grad_(False))
    generator = torch.Generator().manual_seed(1)
    lengths = [16 + 48 * row // a.batch for row in range(a.batch)] if a.uneven else [a.prompt] * a.batch
    prompts = [torch.randint(3, 4000, (length,), generator=generator).tolist() for length in lengths]
    tokenizer: Any = types.SimpleNamespace(pad_token_id=0)
    model.generation_config = GenerationConfig()

    def answer(count: int) -> tuple[float, list[list[int]]]:
        begin = time.perf_counter()
        if side == "lorica":
            found = generate(model, tokenizer, prompts, max_new_tokens=count, stop_ids=(), batch_size=a.batch)
        else:
            width = max(lengths)
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
            config = GenerationConfig(max_new_tokens=count, eos_token_id=None, pad_token_id=0)
            with torch.inference_mode():
                found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            found = found[:, width:].tolist()
        return time.perf_counter() - begin, found

    answer(2)
    # Not while it answers: reading the tensors' sizes is cheap, but belongs to nobody.
    longs, shorts = [answer(a.tokens) for _ in range(a.repeats)], [answer(1)[0] for _ in range(a.repeats)]
    short = statistics.median(shorts)
    return {
        "seconds": [seconds for seconds, _ in longs],
        "step": [(seconds - short) / (a.tokens - 1) for seconds, _ in longs],
        "tokens": longs[0][1],
        "bytes": decode_bytes(model, a.batch * (a.prompt + a.tokens // 2), getattr(torch, a.dtype)),
        "flops": 2 * a.batch * num_weights(model),
        "peak": resident_bytes("VmHWM"),
    }


def num_weights(model: Any) -> int:
    """Weights that a token is multiplied with; a quantised one counts as what it stands for."""
    from lorica.quant.linear import num_parameters

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = any(t is embedding.weight for t in head.parameters())
    return num_parameters(model) - (0 if is_tied else embedding.weight.numel())


def compare(a: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if a.quant:
            quant_model.make(a.shape, Path(folder))
        command = [sys.executable, "-W", "ignore", __file__, "--folder", folder]
        command += ["--prompt", str(a.prompt), "--tokens", str(a.tokens), "--repeats", str(a.repeats)]
        for key in KEYS:
            value = getattr(a, key)
            command += [f"--{key}"] if value is True else [f"--{key}", str(value)] if value else []
        # What `lorica` sets for itself; both sides get it, since it helps both where the machine has other work.
        environment = {"GOMP_SPINCOUNT": "20000", **os.environ}
        results: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for _ in range(a.rounds):
            for side in SIDES:
                done = subprocess.run(
                    [*command, "--side", side], stdout=subprocess.PIPE, text=True, check=True, env=environment
                )
                results[side].append(json.loads(done.stdout.splitlines()[-1]))
    report(a, results)


def report(a: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    bandwidth, ceiling = measure_bandwidth().read, measure_ceiling(a.dtype)
    answers = [runs[0]["tokens"] for runs in results.values()]
    pairs = [list(zip(ours, theirs, strict=True)) for ours, theirs in zip(*answers, strict=True)]
    same = sum(next((i for i, (x, y) in enumerate(pair) if x != y), len(pair)) for pair in pairs)
    rows: dict[str, dict[str, float]] = {}
    for side, runs in results.items():
        seconds, step = (statistics.median(s for run in runs for s in run[key]) for key in ("seconds", "step"))
        floor = max(runs[0]["bytes"] / bandwidth, runs[0]["flops"] / ceiling)
        rows[side] = {
            "seconds": seconds, "step": step, "tokens_per_second": a.batch * a.tokens / seconds, "floor": floor,
            "of_floor": floor / step, "peak_bytes": max(run["peak"] for run in runs),
            "equal": same / a.batch / a.tokens,
        }  # fmt: skip
        print(
            f"  {side:12} {rows[side]['tokens_per_second']:7.1f} tokens/s  a step {step * 1e3:7.2f} ms, its floor "
            f"{floor * 1e3:6.2f} ms ({floor / step:.0%} of it reached)  peak {rows[side]['peak_bytes'] / 1e9:5.2f} GB"
        )
    ours, theirs = rows.values()
    case = "decoding " + " ".join(f"{key} {getattr(a, key)}" for key in KEYS if getattr(a, key))
    print(
        f"{case}: {theirs['seconds'] / ours['seconds']:.2f} x transformers, {theirs['step'] / ours['step']:.2f} x a "
        f"step; {ours['equal']:.1%} of the tokens before a first other one"
    )
    announce(
        Comparison(
            case,
            "seconds a step",
            ours["step"],
            theirs["step"],
            "transformers",
            ours["peak_bytes"],
            theirs["peak_bytes"],
            ours["floor"],
            f"{theirs['seconds'] / ours['seconds']:.2f} x with the prompt",
        )
    )
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    append_rows(
        "decode.csv",
        [
            {"threads": threads, "case": case, "side": side, **{key: rounded(value) for key, value in row.items()}}
            for side, row in rows.items()
        ],
    )


CASES = [
    *({"shape": s, "dtype": d, "batch": b} for s, d, b in itertools.product(
        ("8m", "135m", "360m", "1b", "qwen3", "gemma", "gemma2", "gpt2"), ("float32", "bfloat16"), (1, 16))),
    *({"shape": s, "dtype": "float32", "batch": b, "published": True} for s, b in itertools.product(
        ("135m", "360m", "1b", "qwen3", "gemma", "gemma2", "gpt2"), (1, 16))),
    *({"shape": "135m", "dtype": d, "batch": b, "adapter": x} for d, b, x in itertools.product(
        ("float32", "bfloat16"), (1, 16), ADAPTERS[1:])),
    *({"shape": "135m", "dtype": d, "batch": 16, "uneven": True} for d in ("float32", "bfloat16")),
    *({"shape": s, "dtype": "float32", "batch": b, "quant": "nf4"} for s, b in itertools.product(
        ("135m", "1b"), (1, 16))),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("8m", *SHAPES), default="135m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--adapter", choices=ADAPTERS, default="none")
    parser.add_argument("--quant", choices=("nf4",))
    parser.add_argument("--uneven", action="store_true", help="prompts of 16 to 64 tokens")
    parser.add_argument("--published", action="store_true", help="weights that bfloat16 holds, in float32")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="answers in a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes a side")
    parser.add_argument("--all", action="store_true", help="every case of the table")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.side:
        print(json.dumps(run_side(a.side, a)))
    else:
        for case in CASES if a.all else [{}]:
            compare(argparse.Namespace(**{**vars(a), **case}))


if __name__ == "__main__":
    main()
