"""SST-2 sentences on a BERT-base shape, beside transformers' Trainer with PEFT, in the same run.

    python benchmarks/classification.py --train sst2/train.jsonl --dropout 0       # equal losses
    python benchmarks/classification.py --train sst2/train.jsonl                   # with the 0.1 of BERT
    python benchmarks/classification.py --train ... --sides lorica trainer trainer-grouped
    python benchmarks/classification.py --train ... --base bert-base-uncased-folder

Rows are `{"text", "label"}`. Both sides train LoRA of rank 16 on every linear layer, and the head, in float32, with 32
rows a step, the same learning rate, clipping and fused AdamW. Rows come in the same order, and A, the head and the base
are the same numbers at the start, so with the base's dropout off the losses of a step are equal but for rounding.

    trainer           DataCollatorWithPadding: 32 random rows, padded to the longest
    trainer-grouped   rows of like length share a batch (`train_sampling_strategy`), so batches and losses are others

Without `--base` the weights are random, and the tokenizer is a WordPiece vocabulary made of the rows. Each run is a
process of its own, and the sides take turns. A step is all that lies between two updates: making the batch, too.
Seconds are medians over the steps; `cpu` is processor time in all threads, to compare by on a busy machine. The floor
counts the products and attention of the real tokens over the fastest product measured here.

It skips, and says so, where the rows or PEFT are missing; PEFT and accelerate are needed for this script only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

from floor import Comparison, announce, append_rows, measure_ceiling, resident_bytes, rounded, step_flops

SHAPES = {"base": (768, 12, 12), "small": (256, 4, 4)}
SIDES = ("lorica", "trainer", "trainer-grouped")
RANK, ALPHA, LR = 16, 32.0, 5e-4


def make_base(folder: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """A classifier with random weights and a tokenizer, or a copy of `--base` as a classifier of these rows."""
    import torch
    from tokenizers import BertWordPieceTokenizer
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertTokenizer

    classes = sorted({str(row["label"]) for row in rows})
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    torch.manual_seed(0)
    if options.base:
        tokenizer = AutoTokenizer.from_pretrained(options.base)
        config = AutoConfig.from_pretrained(options.base, **names)
    else:
        pieces = BertWordPieceTokenizer()
        pieces.train_from_iterator([row["text"] for row in rows], vocab_size=30522, show_progress=False)
        pieces.save_model(str(folder))
        tokenizer = BertTokenizer(str(folder / "vocab.txt"))
        size, layers, heads = SHAPES[options.shape]
        config = BertConfig(
            hidden_size=size, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * size, **names
        )
    if options.dropout is not None:
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            setattr(config, name, options.dropout)
    make = AutoModelForSequenceClassification
    model = make.from_pretrained(options.base, config=config) if options.base else make.from_config(config)
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def start_of(name: str, shape: Any) -> Any:
    """The same A on every side: uniform, as LoRA starts, and drawn by the module's name."""
    import torch

    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return (torch.rand(tuple(shape), generator=generator) * 2 - 1) / shape[1] ** 0.5


def run_lorica(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The run's own step on batches of 32 rows, where a run takes as many as a budget of tokens holds."""
    import numpy as np
    import torch

    from lorica import LoRA
    from lorica.config import DataConfig, ModelConfig, RunConfig
    from lorica.kernels.pool import install_pool
    from lorica.methods.attach import adapters, attach, with_whole
    from lorica.models.load import load_with_head
    from lorica.models.loss import make_loss
    from lorica.recipes.preparing import prepare
    from lorica.training.step import LoopOptions, Run, take_step

    class Batches:
        num_steps = options.steps

        def batch(self, step: int) -> Any:
            return np.arange(step * options.batch, (step + 1) * options.batch)

        def epoch(self, step: int) -> float:
            return step / self.num_steps

    install_pool()
    method = LoRA(rank=RANK, alpha=ALPHA)
    config = RunConfig(
        model=ModelConfig(base=str(folder / "base"), dtype="float32", device="cpu", task="classification"),
        data=DataConfig(train=str(folder / "rows.jsonl"), max_length=128, eval=None),
        method=method,
    )
    data = prepare(config)
    model, head = load_with_head(
        config.model.base, dtype="float32", device="cpu", task="classification", labels=data.labels
    )
    loss_fn = make_loss(model)
    attach(model, with_whole(method, head))
    with torch.no_grad():
        for name, adapter in adapters(model).items():
            if not adapter.is_beside:
                adapter.lora_a.copy_(start_of(name, adapter.lora_a.shape))
    how = LoopOptions(lr=LR, micro_batch_tokens=10**9, schedule="constant", warmup=0.0, layout=data.layout)
    run = Run(model.train(), loss_fn, None, data.train, Batches(), how, {}, folder / "checkpoints")
    rows, ends, cpu = [], [time.perf_counter()], [time.process_time()]
    for _ in range(options.steps):
        rows.append(take_step(run))
        ends.append(time.perf_counter())
        cpu.append(time.process_time())
    trained = sum(p.numel() for p in run.parameters.values())
    return {"ends": ends, "cpu": cpu, "losses": [row["loss"] for row in rows], "trained": trained}


def run_trainer(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import peft
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="SEQ_CLS")
    model = peft.get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(start_of(name.split(".", 2)[2].partition(".lora_A.")[0], parameter.shape))
    labels = base.config.label2id
    rows = [
        {**tokenizer(row["text"], truncation=True, max_length=128), "labels": labels[str(row["label"])]}
        for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines())
    ]
    ends, cpu = [time.perf_counter()], [time.process_time()]

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())
            cpu.append(time.process_time())

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder / "trainer"), per_device_train_batch_size=options.batch, max_steps=options.steps,
            learning_rate=LR, lr_scheduler_type="constant", optim="adamw_torch_fused", max_grad_norm=1.0,
            weight_decay=0.0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
            train_sampling_strategy="group_by_length" if options.side.endswith("grouped") else "sequential",
        ),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"ends": ends, "cpu": cpu, "losses": losses, "trained": trained}


def run_side(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(options.threads)
    found = (run_lorica if options.side == "lorica" else run_trainer)(options, Path(options.folder))
    clocks = {key: [b - a for a, b in pairwise(found.pop(key))][1:] for key in ("ends", "cpu")}
    return {**found, "seconds": clocks["ends"], "cpu": clocks["cpu"], "peak": resident_bytes("VmHWM")}


def floor_seconds(options: argparse.Namespace, folder: Path) -> tuple[float, float, float]:
    """Seconds of a step at the fastest product's rate; and real tokens a step, and those that padding makes of them."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    torch.set_num_threads(options.threads)
    tokenizer, config = AutoTokenizer.from_pretrained(folder / "base"), AutoConfig.from_pretrained(folder / "base")
    texts = [json.loads(line)["text"] for line in (folder / "rows.jsonl").read_text().splitlines()]
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=128).input_ids]
    # All samples count as one row, whose positions must have a place.
    config.max_position_embeddings = max(config.max_position_embeddings, 128 * options.batch)
    batches = [lengths[at : at + options.batch] for at in range(0, options.steps * options.batch, options.batch)]
    flops = statistics.median(step_flops(config, batch, rank=RANK, trained=0).total for batch in batches[1:])
    padded = statistics.mean(max(batch) * len(batch) for batch in batches)
    return flops / measure_ceiling("float32"), statistics.mean(map(sum, batches)), padded


def measure(options: argparse.Namespace, folder: Path) -> dict[str, dict[str, Any]]:
    """Medians over all steps of all rounds, the highest peak and the losses, by side."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in options.sides}
    # What `lorica` sets for itself; both sides get it, since it helps both where the machine has other work.
    environment = {"GOMP_SPINCOUNT": "20000", **os.environ}
    for _ in range(options.rounds):
        for side in options.sides:
            command = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--side", side, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{done.stderr[-4000:]}")
            runs[side].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{side:16} {statistics.median(runs[side][-1]['seconds']):7.3f} s a step", flush=True)
    return {
        side: {
            "seconds": statistics.median(second for run in found for second in run["seconds"]),
            "cpu": statistics.median(second for run in found for second in run["cpu"]),
            "peak": max(run["peak"] for run in found),
            "losses": found[0]["losses"],
            "trained": found[0]["trained"],
        }
        for side, found in runs.items()
    }


def report(options: argparse.Namespace, found: dict[str, dict[str, Any]], folder: Path) -> None:
    floor, tokens, padded = floor_seconds(options, folder)
    shape = Path(options.base).name if options.base else f"BERT {options.shape} shape"
    work = f"classification, {shape}, SST-2, batch {options.batch}, float32"
    work += "" if options.dropout is None else f", dropout {options.dropout:g}"
    print(f"{work}: {tokens:,.0f} tokens a step, {padded:,.0f} with padding; the floor is {floor:.3f} s a step")
    for side, row in found.items():
        print(
            f"{side:16} {options.batch / row['seconds']:7.2f} examples/s, {row['seconds']:.3f} s a step "
            f"({row['cpu']:.3f} s of processor time), {floor / row['seconds']:.0%} of the floor, peak "
            f"{row['peak'] / 1e9:.2f} GB, {row['trained']:,} trained parameters"
        )
    ours = found.get("lorica")
    for side, row in found.items():
        if ours is None or row is ours:
            continue
        gap = max(abs(a - b) for a, b in zip(ours["losses"], row["losses"], strict=True))
        print(
            f"lorica beside {side}: {row['seconds'] / ours['seconds']:.2f} x as fast, {row['cpu'] / ours['cpu']:.2f} x "
            f"by processor time, {ours['peak'] / row['peak']:.0%} of the memory; losses of a step differ by at most "
            f"{gap:.1e}"
        )
        per_second = [options.batch / seconds for seconds in (ours["seconds"], row["seconds"], floor)]
        announce(
            Comparison(
                work, "examples a second", per_second[0], per_second[1], side, ours["peak"], row["peak"], per_second[2],
                f"losses differ by at most {gap:.1e}",
            )
        )  # fmt: skip
    append_rows(
        "classification.csv",
        [
            {
                "work": work, "threads": options.threads, "tokens": round(tokens), "padded_tokens": round(padded),
                "side": side, "seconds": rounded(row["seconds"]), "cpu_seconds": rounded(row["cpu"]),
                "examples_per_second": rounded(options.batch / row["seconds"]), "floor_seconds": rounded(floor),
                "peak_bytes": row["peak"], "first_loss": rounded(row["losses"][0], 6),
                "last_loss": rounded(row["losses"][-1], 6),
            }
            for side, row in found.items()
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--base", default="", help="a folder with an encoder; without it the weights are random")
    parser.add_argument("--shape", choices=SHAPES, default="base", help="of random weights")
    parser.add_argument("--dropout", type=float, default=None, help="of the base, instead of what its config says")
    parser.add_argument("--steps", type=int, default=12, help="steps in a process; the first is a warm-up")
    parser.add_argument("--batch", type=int, default=32, help="rows a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="how often the sides take turns")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES[:2]))
    for name in ("side", "folder"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options)))
        return
    if not Path(options.train).is_file():
        print(f"skipped: there are no rows in {options.train}")
        return
    try:
        import accelerate  # noqa: F401
        import peft  # noqa: F401
    except ImportError as error:
        print(f"skipped: {error.name} is not installed; pip install peft==0.21.2 accelerate")
        return
    import random

    rows = [json.loads(line) for line in Path(options.train).read_text(encoding="utf-8").strip("\n").split("\n")]
    random.Random(0).shuffle(rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").mkdir()
        make_base(folder / "base", rows, options)
        # Both classes stand among them: they name the classes.
        used = rows[: options.steps * options.batch]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in used), encoding="utf-8")
        report(options, measure(options, folder), folder)


if __name__ == "__main__":
    main()
