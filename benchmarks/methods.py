"""Every method on one base and one data set, each with a learning rate of its own.

    python benchmarks/methods.py                                  # the embedded base on the quickstart's handbook
    python benchmarks/methods.py --train e2e/train.jsonl --eval e2e/dev.jsonl --metric bleu --name e2e
    python benchmarks/methods.py --only lora,ia3 --seeds 2        # a part; what the table has already is kept

For each method `lorica sweep` tries the same learning rates, judged on rows held out of the training rows; the best one
is then trained with several seeds and measured on the evaluation rows, which nothing was chosen by. Steps are timed
apart, one method after another, in `--rounds` turns: that wants an idle machine. All is printed, and written to
results/methods-NAME.csv (a row a run), methods-NAME-time.csv and methods-NAME.png.

What it does not show: anything about bases and tasks of another size. Steps and batches are the same for all methods,
so one that would be better after ten times the steps is shown as it is after these.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from floor import commit, processor

import lorica
from lorica.assets.handbook import write_handbook
from lorica.config import load_config
from lorica.recipes.evaluate import evaluate
from lorica.recipes.sweep import sweep

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "lora, attention only": {"name": "lora", "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "lora, rslora": {"name": "lora", "rslora": True},
    "lora, pissa": {"name": "lora", "init": "pissa"},
    "lora, LoRA+": {"name": "lora", "lr_ratio": 16.0},
    "dora": {"name": "dora"},
    "adalora": {"name": "adalora"},
    "vera": {"name": "vera"},
    "ia3": {"name": "ia3"},
    "bottleneck houlsby": {"name": "bottleneck", "placement": "houlsby"},
    "bottleneck pfeiffer": {"name": "bottleneck", "placement": "pfeiffer"},
    "prompt": {"name": "prompt"},
    "ptuning": {"name": "ptuning"},
    "prefix": {"name": "prefix"},
    "ptuning_v2": {"name": "ptuning_v2"},
    "full": {"name": "full"},
    "full, norms only": {"name": "full", "targets": [".*norm"]},
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
BASE = "(base)"
TIMED_STEPS = 8
RESULTS = Path(__file__).parent / "results"
COLUMNS = ("date", "commit", "machine", "method", "seed", "lr", "steps", "parameters", "loss", "metric", "score")
TIME_COLUMNS = ("date", "commit", "machine", "method", "tokens", "step_seconds", "peak_bytes")


def configuration(arguments: argparse.Namespace, folder: Path, method: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": {"base": arguments.base},
        "method": method,
        "data": {"train": str(arguments.train), "eval": 0.02, "max_length": 256},
        "train": {"output": str(folder / "run"), "max_steps": arguments.steps, "epochs": 1000,
                  "batch_tokens": arguments.batch_tokens, "warmup": 0.05, "eval_every": max(1, arguments.steps // 4),
                  "save_every": arguments.steps},
        "eval": {"max_new_tokens": 64, "batch_size": 32, "max_samples": arguments.answers},
    }  # fmt: skip


def folder_of(arguments: argparse.Namespace, name: str) -> Path:
    folder: Path = arguments.work / name.replace(" ", "-").replace(",", "").replace("+", "-plus")
    return folder


def run_method(arguments: argparse.Namespace, name: str, seeds: list[int]) -> list[dict[str, Any]]:
    folder = folder_of(arguments, name)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.yaml"
    # JSON is YAML.
    file.write_text(json.dumps(configuration(arguments, folder, METHODS[name])))
    rates = ",".join(f"{rate:g}" for rate in RATES)
    found = sweep(file, [f"train.lr={rates}"], output=folder / "sweep")
    best = next(arm for arm in found.arms if arm.name == found.best)
    return [measure(arguments, name, file, folder / f"seed-{seed}", best.values["train.lr"], seed) for seed in seeds]


def measure(arguments: argparse.Namespace, name: str, file: Path, output: Path, lr: float, seed: int) -> dict[str, Any]:
    changes = [f"train.lr={lr:g}", f"train.seed={seed}", f"train.output={output}"]
    trained = lorica.train(load_config(file, changes), resume="auto")
    scores = evaluate(output, data=str(arguments.eval), base=False).all.adapter
    return {
        "method": name,
        "seed": seed,
        "lr": lr,
        "steps": trained.steps,
        "parameters": trained.trainable_parameters,
        "loss": scores.loss,
        "metric": getattr(scores, arguments.metric),
        "score": arguments.metric,
    }


def measure_base(arguments: argparse.Namespace, run: Path) -> dict[str, Any]:
    """The base's own scores, as `lorica eval` gives them beside those of any run."""
    scores = evaluate(run, data=str(arguments.eval)).all.base
    nothing = {"seed": 0, "lr": 0.0, "steps": 0, "parameters": 0}
    metric = getattr(scores, arguments.metric)
    return {"method": BASE, **nothing, "loss": scores.loss, "metric": metric, "score": arguments.metric}


def time_steps(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """The median step of a short run without evaluation, and the peak of its process."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "run.yaml").write_text(json.dumps(configuration(arguments, folder, METHODS[name])))
        changes = ["data.eval=null", f"train.max_steps={TIMED_STEPS + 1}"]
        # In a process of its own: peak memory is a property of a process.
        command = [sys.executable, "-m", "lorica", "train", str(folder / "run.yaml"), *changes, "--json"]
        trained = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        ends = [json.loads(line)["seconds"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    # The first step pays for what is made once.
    seconds = statistics.median(after - before for before, after in itertools.pairwise(ends))
    peak = trained["peak_memory_bytes"]
    return {"method": name, "tokens": arguments.batch_tokens, "step_seconds": seconds, "peak_bytes": peak}


def summary(rows: list[dict[str, Any]], times: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a method: means over the seeds, and standard deviations where there are several; medians of times."""
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        runs = [row for row in rows if row["method"] == name]
        line: dict[str, Any] = {"method": name, "seeds": len(runs), "lr": float(runs[0]["lr"])}
        for key in ("parameters", "loss", "metric"):
            values = [float(run[key]) for run in runs]
            line[key] = statistics.fmean(values)
            line[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else 0.0
        for key in ("step_seconds", "peak_bytes"):
            line[key] = statistics.median([float(row[key]) for row in times if row["method"] == name] or [math.nan])
        lines.append(line)
    return sorted(lines, key=lambda line: line["loss"])


def show(lines: list[dict[str, Any]], score: str) -> None:
    head = f"| method | lr | trained parameters | held-out loss | {score} | s a step | peak MB |"
    print(head, "|---|---:|---:|---:|---:|---:|---:|", sep="\n")
    for line in lines:
        if line["method"] == BASE:
            print(f"| {BASE} | | | {line['loss']:.3f} | {line['metric']:.1f} | | |")
            continue
        print(
            f"| {line['method']} | {line['lr']:g} | {line['parameters']:,.0f} "
            f"| {line['loss']:.3f} ± {line['loss_deviation']:.3f} "
            f"| {line['metric']:.1f} ± {line['metric_deviation']:.1f} "
            f"| {line['step_seconds']:.2f} | {line['peak_bytes'] / 1e6:,.0f} |"
        )


def draw(lines: list[dict[str, Any]], score: str, title: str, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 0.38 * len(lines) + 1.6), sharey=True, layout="constrained")
    lines = [line for line in lines if line["method"] != BASE]
    names = [f"{line['method']}  ({line['parameters']:,.0f})" for line in lines]
    columns = (
        ("loss", "held-out loss, nats a token"),
        ("metric", {"bleu": "BLEU", "exact_match": "exact match, %"}.get(score, score)),
        ("step_seconds", "seconds a step"),
    )
    for axis, (key, label) in zip(axes, columns, strict=True):
        values = [line[key] for line in lines]
        spread = [line.get(f"{key}_deviation", 0.0) for line in lines]
        axis.errorbar(values, range(len(lines)), xerr=spread, fmt="o", color="#20639b", capsize=3, markersize=5)
        axis.set_xlabel(label)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(lines)), names)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(file, dpi=120)


def read_rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def append(file: Path, rows: list[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    machine = f"{processor()}, {os.cpu_count()} cores"
    common = {"date": time.strftime("%Y-%m-%d"), "commit": commit(), "machine": machine}
    fresh = not file.exists()
    file.parent.mkdir(exist_ok=True)
    with file.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, columns)
        if fresh:
            writer.writeheader()
        writer.writerows({**common, **row} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--train", type=Path, help="training rows; the quickstart's handbook without")
    parser.add_argument("--eval", type=Path, help="evaluation rows")
    parser.add_argument("--metric", choices=("exact_match", "bleu", "rouge_l", "chrf"), default="exact_match")
    parser.add_argument("--name", default="handbook", help="of the results' files")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--answers", type=int, default=200, help="evaluation rows that are answered")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="times that each method's step is timed, in turns")
    parser.add_argument("--only", default=",".join(name for name in METHODS if "," not in name),
                        help="methods, divided by semicolons or commas; all: every row of the table")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("runs/methods"), help="where the runs stand")
    arguments = parser.parse_args()
    if arguments.train is None:
        handbook = write_handbook(arguments.work / "handbook", seed=0)
        arguments.train, arguments.eval = Path(handbook.train), Path(handbook.evaluation)
    arguments.work = arguments.work / arguments.name
    names = list(METHODS) if arguments.only == "all" else arguments.only.split(";" if ";" in arguments.only else ",")
    file = RESULTS / f"methods-{arguments.name}.csv"
    for name in names:
        known = {int(row["seed"]) for row in read_rows(file) if row["method"] == name}
        missing = [seed for seed in range(1, arguments.seeds + 1) if seed not in known]
        if missing:
            append(file, run_method(arguments, name, missing))
        if not any(row["method"] == BASE for row in read_rows(file)):
            append(file, [measure_base(arguments, folder_of(arguments, name) / f"seed-{missing[0]}")])
    clock = file.with_name(f"{file.stem}-time.csv")
    for _ in range(arguments.rounds):
        append(clock, [time_steps(arguments, name) for name in names], TIME_COLUMNS)
    lines = summary(read_rows(file), read_rows(clock))
    show(lines, arguments.metric)
    title = f"{arguments.base} on {arguments.name}, {arguments.steps} steps of {arguments.batch_tokens:,} tokens"
    draw(lines, arguments.metric, f"{title}, {arguments.seeds} seeds", file.with_suffix(".png"))


if __name__ == "__main__":
    main()
