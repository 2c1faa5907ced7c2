"""Instruction tuning from rows to a saved adapter, real lengths, loss on responses, beside TRL's SFTTrainer with PEFT.

    pip install trl==1.16.0 datasets==5.2.0                 # the peer; nothing that the project pins changes
    python benchmarks/sft.py --train math.train.jsonl --dev math.dev.jsonl
    python benchmarks/sft.py --train ... --dev ... --sides lorica trl-grouped trl-free trl-defaults --rounds 1

Rows are `{"prompt", "response"}`; `--rows` of them are read. Every side adapts the embedded base of 8 million
parameters (or `--base`) by LoRA of rank 16 on every linear layer, with the same learning rate, schedule, warm-up,
clipping, fused AdamW, epochs, seed and `--dtype`, and about the same tokens a step: TRL takes 8 rows, Lorica as many
tokens as give the same number of steps. TRL comes in its variants:

    trl-padded     8 random rows, padded to the longest
    trl-packed     rows packed into one of about the same tokens, kept apart by a block-diagonal mask
    trl-tuned      as trl-packed, with a malloc that keeps what it has (`KEEP_MEMORY`)
    trl-grouped    8 rows of like length, padded
    trl-free       8 random rows behind one another without padding (`padding_free`), the same mask
    trl-compiled   as trl-padded under torch.compile, rows filled up to a multiple of 64
    trl-defaults   TRL's own choice of precision and checkpointing: bfloat16 autocast, activations computed twice

All but the last without activation checkpointing, in TRL's default of a fused head (no logits of masked tokens). Each
run is a process of its own, and the sides take turns. Useful tokens are those that are not filler. `seconds` are of the
training call: TRL's `train()`, Lorica's `run_loop`; `cpu` is the processor time that it took in all threads, to compare
by where the machine has other work; `whole` is the process, from its start to its end.

The held-out loss is measured by one function that knows nothing of either side: transformers and PEFT load both
adapters in float32, and the mean is over the tokens of the responses and the token that ends them. The loss that a side
reaches after how many seconds comes from a second, untimed run of Lorica, the same bit for bit, that evaluates ten
times: the first time where it is as good as the peer's at its end, within `TOLERANCE`.
"""

from __future__ import annotations

import argparse
import importlib.util
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

from floor import Comparison, announce, append_rows, measure_ceiling, resident_bytes, step_flops

PEER = "trl==1.16.0 datasets==5.2.0"
BATCH_ROWS, RANK, ALPHA, WARMUP, CLIP = 8, 16, 32, 0.03, 1.0
TOLERANCE = 0.01
"""Nats; a third of what another seed changed of the held-out loss on 96 rows (3.713 and 3.679)."""

MEAN = "mean"
"""Stands for the tokens of a mean step."""
VARIANTS: dict[str, dict[str, Any]] = {
    "trl-padded": {},
    "trl-packed": {"packing": True, "per_device_train_batch_size": 1, "max_length": MEAN},
    "trl-tuned": {"packing": True, "per_device_train_batch_size": 1, "max_length": MEAN},
    "trl-grouped": {"train_sampling_strategy": "group_by_length"},
    "trl-free": {"padding_free": True, "max_length": None},
    "trl-compiled": {"torch_compile": True, "pad_to_multiple_of": 64},
    "trl-defaults": {"bf16": None, "gradient_checkpointing": True},
}
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 33), "MALLOC_MMAP_THRESHOLD_": str(1 << 33)}
"""glibc's malloc gives nothing back to the system: fewer page faults, more memory."""
WATCHED, SCORE = "lorica-watched", "score"
SIDES = ("lorica", *VARIANTS)
Result = dict[str, Any]


def read_rows(path: str, limit: int) -> list[dict[str, str]]:
    # Not `splitlines`, which also breaks at separators that JSON leaves as they are.
    lines = Path(path).read_text(encoding="utf-8").strip("\n").split("\n")[:limit]
    return [{"prompt": row["prompt"], "response": row["response"]} for row in map(json.loads, lines)]


def base_folder(base: str) -> str:
    from lorica.assets import embedded_base

    return str(embedded_base()) if base == "embedded" else base


def configuration(options: argparse.Namespace, folder: Path, evaluate_every: int | None = None) -> Any:
    from lorica import LoRA
    from lorica.config import DataConfig, ModelConfig, RunConfig, TrainConfig

    return RunConfig(
        model=ModelConfig(base=options.base, dtype=options.dtype, device="cpu"),
        method=LoRA(rank=RANK, alpha=ALPHA),
        data=DataConfig(
            train=str(folder / "train.jsonl"), eval=str(folder / "dev.jsonl") if evaluate_every else None,
            max_length=options.max_length,
        ),
        train=TrainConfig(
            output=str(folder / "run"), epochs=options.epochs, lr=options.lr, warmup=WARMUP, clip=CLIP,
            batch_tokens=options.batch_tokens, micro_batch_tokens=None, seed=options.seed, threads=options.threads,
            eval_every=evaluate_every or 10**6, save_every=10**6,
        ),
    )  # fmt: skip


def lay_out(options: argparse.Namespace, folder: Path) -> dict[str, int]:
    """The budget of tokens that gives as many steps as `BATCH_ROWS` rows a step do, and what Lorica makes of it.

    flops: what these rows must cost at least, without filler.
    """
    from transformers import AutoConfig

    from lorica.recipes.preparing import prepare
    from lorica.recipes.train import make_order

    options.batch_tokens = 10**6
    config = configuration(options, folder)
    prepared = prepare(config)
    data = prepared.train
    mean = int(data.lengths.mean() * BATCH_ROWS)
    wanted = -(-len(data) // BATCH_ROWS) * options.epochs

    def order_of(budget: int) -> Any:
        train = config.train.model_copy(update={"batch_tokens": budget})
        return make_order(config.model_copy(update={"train": train}), data, padded=False)

    budgets = range(max(mean, int(data.lengths.max())), 2 * mean + int(data.lengths.max()), 8)
    budget = min(budgets, key=lambda budget: abs(order_of(budget).num_steps - wanted))
    order = order_of(budget)
    steps = [order.batch(step) for step in range(order.num_steps)]
    batches = [batch for indices in steps for batch in prepared.layout.batches(data, indices, budget)]
    targets = sum(batch.num_targets for batch in batches)
    lengths = [int(data.lengths[i]) for indices in steps for i in indices]
    base = AutoConfig.from_pretrained(base_folder(options.base))
    return {
        "batch_tokens": budget,
        "mean_tokens": mean,
        "num_steps": order.num_steps,
        "computed": sum(batch.input_ids.numel() for batch in batches),
        "targets": targets,
        "flops": step_flops(base, lengths, rank=RANK, trained=targets).total,
    }


def run_lorica(options: argparse.Namespace, folder: Path) -> Result:
    from lorica.recipes import train as recipe
    from lorica.training.metrics import read_metrics

    config = configuration(options, folder, max(1, options.num_steps // 10) if options.side == WATCHED else None)
    loop, clock = recipe.run_loop, {"seconds": 0.0, "cpu": 0.0}

    def timed(*arguments: Any, **keywords: Any) -> Any:
        begin, cpu = time.perf_counter(), time.process_time()
        result = loop(*arguments, **keywords)
        clock.update(seconds=time.perf_counter() - begin, cpu=time.process_time() - cpu)
        return result

    recipe.run_loop = timed  # type: ignore[attr-defined]
    done = recipe.train(config)
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    return {
        "steps": done.steps,
        **clock,
        "tokens": done.tokens,
        "adapter": done.adapter,
        "losses": [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row],
        "ends": [row["seconds"] for row in rows if "loss" in row],
    }


def run_trl(options: argparse.Namespace, folder: Path) -> Result:
    import datasets
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    if options.threads:
        torch.set_num_threads(options.threads)
    variant = {k: options.mean_tokens if v == MEAN else v for k, v in VARIANTS[options.side].items()}
    settings: dict[str, Any] = {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": BATCH_ROWS, "use_cpu": True, "bf16": False,
        "gradient_checkpointing": False, "completion_only_loss": True, "learning_rate": options.lr, "weight_decay": 0.0,
        "lr_scheduler_type": "cosine", "warmup_steps": WARMUP, "max_grad_norm": CLIP, "optim": "adamw_torch_fused",
        "num_train_epochs": options.epochs, "seed": options.seed, "save_strategy": "no", "report_to": "none",
        "max_length": options.max_length, "logging_steps": 10**6, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    if options.dtype == "bfloat16":
        settings["bf16"] = True
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["response"]}],
        }
        for row in read_rows(str(folder / "train.jsonl"), 10**9)
    ]
    base = base_folder(options.base)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=options.dtype, attn_implementation="sdpa"),
        args=SFTConfig(**{**settings, **variant}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    collate, counts = trainer.data_collator, {"tokens": 0, "computed": 0, "targets": 0}

    def counted(examples: list[Any]) -> Any:
        batch = collate(examples)
        counts["tokens"] += sum(len(example["input_ids"]) for example in examples)
        counts["computed"] += batch["input_ids"].numel()
        counts["targets"] += int((batch["labels"] != -100).sum())
        return batch

    trainer.data_collator = counted
    begin, cpu = time.perf_counter(), time.process_time()
    done = trainer.train()
    clock = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
    adapter = str(folder / "trl" / "adapter")
    trainer.save_model(adapter)
    return {"steps": done.global_step, **clock, **counts, "adapter": adapter}


def held_out_loss(base: str, adapter: str, rows: list[dict[str, str]]) -> float:
    """Mean -ln p, in nats, of the responses' tokens and the token that ends each, by transformers and PEFT alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), adapter).eval()
    total, num_tokens = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            turns = [{"role": "user", "content": row["prompt"]}]
            prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template(
                [*turns, {"role": "assistant", "content": row["response"]}], tokenize=False
            )
            shown = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            answer = tokenizer(whole.removeprefix(shown).rstrip("\n"), add_special_tokens=False).input_ids
            ids = torch.tensor([prompt + answer])
            log_p = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            total -= float(log_p.gather(1, ids[0, len(prompt) :, None]).double().sum())
            num_tokens += len(answer)
    return total / num_tokens


def run_side(options: argparse.Namespace) -> Result:
    folder = Path(options.folder)
    if options.side == SCORE:
        rows = read_rows(options.dev, options.dev_rows)
        return {"loss": held_out_loss(base_folder(options.base), options.adapter, rows)}
    run: Callable[[argparse.Namespace, Path], Result] = run_trl if options.side in VARIANTS else run_lorica
    found = run(options, folder)
    return {**found, "peak": resident_bytes("VmHWM")}


def child(plan: dict[str, int], side: str, folder: Path, adapter: str = "") -> Result:
    """What a process of this side tells, with the seconds that it took from start to end."""
    given = {"batch-tokens": plan["batch_tokens"], "mean-tokens": plan["mean_tokens"], "num-steps": plan["num_steps"]}
    given |= {"side": side, "folder": folder, "adapter": adapter}
    # The first is what `lorica` sets for itself; it helps all where the machine has other work.
    environment = {"GOMP_SPINCOUNT": "20000", "HF_HUB_OFFLINE": "1", **os.environ}
    environment |= {"HF_DATASETS_CACHE": str(folder / "cache"), **(KEEP_MEMORY if side == "trl-tuned" else {})}
    command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], *(f"--{k}={v}" for k, v in given.items())]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    whole = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "whole": whole}


def measure(options: argparse.Namespace, folder: Path) -> list[Result]:
    """A row of figures for each side: medians over the rounds, the largest peak."""
    for name, path, limit in (("train", options.train, options.rows), ("dev", options.dev, options.dev_rows)):
        rows = read_rows(path, limit)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plan = lay_out(options, folder)
    print(
        f"{plan['num_steps']} steps of at most {plan['batch_tokens']:,} tokens beside {BATCH_ROWS} rows of "
        f"{plan['mean_tokens']:,} tokens; {options.dtype}",
        flush=True,
    )
    runs: dict[str, list[Result]] = {side: [] for side in options.sides}
    for number in range(options.rounds):
        for side in options.sides:
            place = folder / f"{side}-{number}"
            place.mkdir()
            for name in ("train.jsonl", "dev.jsonl"):
                (place / name).symlink_to(folder / name)
            found = child(plan, side, place)
            runs[side].append({"computed": plan["computed"], "targets": plan["targets"], **found})
            print(
                f"{side:14} {found['seconds']:8.1f} s training ({found['cpu']:.1f} s of processor time), "
                f"{found['whole']:8.1f} s in all",
                flush=True,
            )
    rows, floor = [], plan["flops"] / ceiling(options)
    for side, each in runs.items():
        first = each[0]
        seconds, cpu, whole = (statistics.median(run[key] for run in each) for key in ("seconds", "cpu", "whole"))
        rows.append(
            {
                "side": side,
                "dtype": options.dtype,
                "rows": options.rows,
                "epochs": options.epochs,
                "threads": options.threads or "",
                "steps": first["steps"],
                "tokens": first["tokens"],
                "fill": round(first["tokens"] / first["computed"], 4),
                "seconds": round(seconds, 2),
                "cpu_seconds": round(cpu, 2),
                "whole_seconds": round(whole, 2),
                "useful_tokens_per_second": round(first["tokens"] / seconds, 1),
                "trained_tokens_per_second": round(first["targets"] / seconds, 1),
                "peak_bytes": max(run["peak"] for run in each),
                "held_out_loss": round(child(plan, SCORE, folder, first["adapter"])["loss"], 4),
                "floor_seconds": round(floor, 2),
                "lorica_reaches_after_seconds": "",
            }
        )
    if "lorica" in runs and len(runs) > 1:
        watch(plan, folder, runs["lorica"], rows)
    return rows


def ceiling(options: argparse.Namespace) -> float:
    """Floating-point operations a second on as many threads as the sides have."""
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    return measure_ceiling(options.dtype)


def watch(plan: dict[str, int], folder: Path, ours: list[Result], rows: list[Result]) -> None:
    """Add to each peer's row after how many seconds in steps Lorica is as good as this peer at its end."""
    place = folder / WATCHED
    place.mkdir()
    for name in ("train.jsonl", "dev.jsonl"):
        (place / name).symlink_to(folder / name)
    watched = child(plan, WATCHED, place)
    found = next(row["held_out_loss"] for row in rows if row["side"] == "lorica")
    print(f"Lorica's own evaluation: {watched['losses'][-1][1]:.4f}, the independent one: {found:.4f}")
    for row in rows:
        if row["side"] != "lorica":
            good = (step for step, loss in watched["losses"] if step and loss <= row["held_out_loss"] + TOLERANCE)
            step = next(good, None)
            reached = None if step is None else statistics.median(run["ends"][step - 1] for run in ours)
            row["lorica_reaches_after_seconds"] = "" if reached is None else round(reached, 2)


def report(options: argparse.Namespace, rows: list[Result]) -> None:
    for row in rows:
        print(
            f"{row['side']:14} {row['useful_tokens_per_second']:8,.0f} useful tokens/s, "
            f"{row['trained_tokens_per_second']:6,.0f} trained, {row['fill']:.1%} of all; {row['steps']} steps, "
            f"{row['seconds']:.1f} s of {row['whole_seconds']:.1f} s, {row['cpu_seconds']:.1f} s of processor time; "
            f"{row['floor_seconds'] / row['seconds']:.0%} of the floor; "
            f"peak {row['peak_bytes'] / 1e9:.2f} GB; held-out loss {row['held_out_loss']:.4f}"
        )
    ours = next((row for row in rows if row["side"] == "lorica"), None)
    for row in rows if ours else []:
        if row is ours:
            continue
        # The same rows on both sides, so times and speeds have the same ratio.
        training, cpu, whole = (row[key] / ours[key] for key in ("seconds", "cpu_seconds", "whole_seconds"))
        after = row["lorica_reaches_after_seconds"]
        sooner = f"reached {row['seconds'] / after:.2f} x sooner" if after else "not reached"
        print(
            f"lorica beside {row['side']}: {training:.2f} x the useful tokens/s, {cpu:.2f} x by processor time, "
            f"{whole:.2f} x end to end, {ours['peak_bytes'] / row['peak_bytes']:.0%} of the memory, its loss {sooner}"
        )
        speeds = [side["useful_tokens_per_second"] for side in (ours, row)]
        announce(
            Comparison(
                f"tuning on {options.rows} rows, {Path(options.base).name}, {options.dtype}",
                "useful tokens a second",
                *speeds,
                row["side"],
                ours["peak_bytes"],
                row["peak_bytes"],
                ours["tokens"] / ours["floor_seconds"],
                f"held-out loss {ours['held_out_loss']}, the peer's {row['held_out_loss']}, {sooner}; "
                f"{whole:.2f} x end to end",
            )
        )
    append_rows("sft.csv", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--base", default="embedded", help="a folder with a chat template")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--dev-rows", type=int, default=200)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=2, help="how often the sides take turns")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["lorica", "trl-padded", "trl-packed"])
    for name, kind in (("side", str), ("folder", str), ("adapter", str)):
        parser.add_argument(f"--{name}", type=kind, default="", help=argparse.SUPPRESS)
    for name in ("batch-tokens", "mean-tokens", "num-steps"):
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options)))
        return
    missing = [name for name in ("trl", "datasets", "peft") if importlib.util.find_spec(name) is None]
    if missing and set(options.sides) != {"lorica"}:
        print(f"skipped: {' and '.join(missing)} not installed; pip install {PEER} peft==0.21.2")
        return
    with tempfile.TemporaryDirectory() as folder:
        report(options, measure(options, Path(folder)))


if __name__ == "__main__":
    main()
