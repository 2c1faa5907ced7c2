"""Five domains as one data set, and what the arms of an experiment come to on each: what experiments on it share.

The domains are DOMAIN.train.jsonl and DOMAIN.dev.jsonl in the folder `--data`: instructions, medicine, law in Chinese,
sums and code. They become three files in which a row's `task` is its domain, so `lorica eval` tells the losses apart:
training rows, rows held out of those to choose a learning rate by, and development rows that nothing is chosen by. An
arm is what it changes in run.yaml. All arms see the same rows in the same order, seed by seed.

`lorica sweep` chooses each arm's learning rate; then it is trained with several seeds to the last step, whose weights
are measured. Runs that the table has already are not repeated, so more arms and seeds can be added.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from methods import RESULTS, append, read_rows

import lorica
from lorica.config import load_config
from lorica.recipes.evaluate import EvaluationReport, evaluate
from lorica.recipes.preparing import PreparedRun, prepare
from lorica.recipes.sweep import sweep

DOMAINS = ("multitask", "medical", "law", "math", "code")
MAX_LENGTH = 768
COLUMNS = ("date", "commit", "machine", "arm", "lr", "seed", "domain", "loss",
           "steps", "batch_tokens", "tokens", "parameters")  # fmt: skip
DRAWS = 10_000

Arm = dict[str, dict[str, Any]]
"""What an arm changes in run.yaml: {section: {key: value}}."""

Losses = dict[tuple[int, str], float]
"""Nats a token, by seed and domain."""


@dataclass(frozen=True)
class Experiment:
    """What all arms share.

    Attributes:
        folder: holds the rows and the arms' runs; of these rows and steps alone.
        table: the CSV of all results, also of other steps.
        data, train: sections of run.yaml.
        rates: learning rates to choose among.
    """

    folder: Path
    table: Path
    data: dict[str, Any]
    train: dict[str, Any]
    base: str
    rates: tuple[float, ...]
    seeds: int

    def run(self, name: str, arm: Arm) -> list[dict[str, Any]]:
        """Tune and train an arm where the table lacks it; its rows, one for each seed and domain."""
        missing = sorted(set(range(1, self.seeds + 1)) - {int(row["seed"]) for row in self.rows(name)})
        if missing:
            folder = self.folder / "".join(c if c.isalnum() else "-" for c in name)
            run = {"model": {"base": self.base}, "method": {"name": "lora"}, "data": self.data, "train": self.train}
            run = copy.deepcopy(run)
            for section, changes in arm.items():
                run[section] |= changes
            folder.mkdir(parents=True, exist_ok=True)
            # JSON is YAML.
            (folder / "run.yaml").write_text(json.dumps(run))
            rate = choose_rate(folder, self.rates, int(run["train"]["max_steps"]))
            data = prepare(load_config(folder / "run.yaml").config)
            for seed in missing:
                append(self.table, self._measure(name, folder, data, rate, seed), COLUMNS)
        self._check_tokens()
        return self.rows(name)

    def _measure(self, name: str, folder: Path, data: PreparedRun, rate: float, seed: int) -> list[dict[str, Any]]:
        output = folder / f"seed-{seed}"
        changes = [f"train.lr={rate:g}", f"train.seed={seed}", f"train.output={output}"]
        trained = lorica.train(load_config(folder / "run.yaml", changes), resume="auto", data=data)
        common = {
            "arm": name,
            "lr": rate,
            "seed": seed,
            "steps": self.train["max_steps"],
            "batch_tokens": self.train["batch_tokens"],
            "tokens": trained.tokens,
            "parameters": trained.trainable_parameters,
        }
        losses = domain_losses(output, self.folder / "dev.jsonl")
        return [{**common, "domain": domain, "loss": loss} for domain, loss in losses.items()]

    def rows(self, name: str | None = None) -> list[dict[str, Any]]:
        """What the table has of an arm, or of all, under this experiment's steps and seeds."""
        sizes = (str(self.train["max_steps"]), str(self.train["batch_tokens"]))
        found = [row for row in read_rows(self.table) if (row["steps"], row["batch_tokens"]) == sizes]
        return [row for row in found if name in (None, row["arm"]) and int(row["seed"]) <= self.seeds]

    def _check_tokens(self) -> None:
        seen = {(row["seed"], row["tokens"]) for row in self.rows()}
        assert len(seen) == len({seed for seed, _ in seen}), f"arms of one seed were trained on other tokens: {seen}"


def add_options(parser: argparse.ArgumentParser, name: str, steps: int) -> None:
    """The options of the experiment `name`, which are those of any on the mixture."""
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--data", type=Path, required=True, help="folder of DOMAIN.train.jsonl and DOMAIN.dev.jsonl")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=1000, help="training rows of a domain")
    parser.add_argument("--held-out", type=int, default=60, help="rows of a domain to choose by, and to measure on")
    parser.add_argument("--rates", default="1e-3,3e-3,1e-2", help="learning rates that each arm may have")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", type=Path, default=RESULTS / f"{name}.csv", help="of the results")
    parser.add_argument("--work", type=Path, default=Path("runs") / name, help="where the runs stand")


def make_experiment(arguments: argparse.Namespace) -> Experiment:
    """What the options say; the rows are drawn and written."""
    sizes = f"{arguments.steps}x{arguments.batch_tokens}-{arguments.rows}+{arguments.held_out}"
    folder = arguments.work / sizes
    write_mixture(arguments.data, folder, arguments.rows, arguments.held_out)
    data = {"train": str(folder / "train.jsonl"), "eval": str(folder / "tune.jsonl"), "max_length": MAX_LENGTH}
    train = {
        "epochs": 1000,
        "max_steps": arguments.steps,
        "batch_tokens": arguments.batch_tokens,
        "warmup": 0.05,
        # No best checkpoint to choose from: what is measured is the last step of every arm.
        "eval_every": arguments.steps,
        "save_every": arguments.steps,
    }
    rates = tuple(float(rate) for rate in arguments.rates.split(","))
    return Experiment(folder, arguments.table, data, train, arguments.base, rates, arguments.seeds)


def write_mixture(source: Path, folder: Path, num_rows: int, num_held_out: int, seed: int = 0) -> None:
    """train.jsonl, tune.jsonl and dev.jsonl in `folder`: as many rows of each domain, drawn with `seed`, fewer where
    there are no more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "tune": [], "dev": []}
    for domain in DOMAINS:
        rows = read_domain(source / f"{domain}.train.jsonl", domain, seed)
        parts["tune"] += rows[:num_held_out]
        parts["train"] += rows[num_held_out : num_held_out + num_rows]
        parts["dev"] += read_domain(source / f"{domain}.dev.jsonl", domain, seed)[:num_held_out]
    for name, rows in parts.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def read_domain(file: Path, domain: str, seed: int) -> list[dict[str, Any]]:
    """The rows of a file in a drawn order, each with its domain as `task`."""
    with file.open(encoding="utf-8") as lines:
        rows = [{**json.loads(line), "task": domain} for line in lines]
    random.Random(seed).shuffle(rows)
    return rows


def choose_rate(folder: Path, rates: Sequence[float], steps: int) -> float:
    """The learning rate with the lowest loss on the rows to choose by, with seed 0; said aloud at the grid's edge."""
    if len(rates) == 1:
        return rates[0]
    axes = ["train.lr=" + ",".join(f"{rate:g}" for rate in rates), f"train.eval_every={max(1, steps // 3)}"]
    found = sweep(folder / "run.yaml", axes, output=folder / "sweep")
    best = float(next(arm for arm in found.arms if arm.name == found.best).values["train.lr"])
    if best in (min(rates), max(rates)):
        print(f"{folder.name}: the best learning rate, {best:g}, is at the edge of those tried.")
    return best


def domain_losses(run: Path, data: Path) -> dict[str, float]:
    """Nats a token of a finished run on each domain of `data`, a file as `write_mixture` makes it."""
    report = evaluate(run, data=str(data), base=False, generate=False)
    assert isinstance(report, EvaluationReport)
    return {domain: report.tasks[domain].adapter.loss for domain in DOMAINS if domain in report.tasks}


def losses_of(rows: Iterable[Mapping[str, Any]]) -> Losses:
    """Rows of a table as losses."""
    return {(int(row["seed"]), row["domain"]): float(row["loss"]) for row in rows}


class Spread(NamedTuple):
    """A mean over domains and seeds, and the standard deviation over seeds of the mean over domains."""

    mean: float
    deviation: float


def summarize(losses: Losses, domain: str | None = None) -> Spread:
    """Of one domain, or of all."""
    seeds = sorted({seed for seed, _ in losses})
    means = [np.mean([loss for (s, d), loss in losses.items() if s == seed and domain in (None, d)]) for seed in seeds]
    return Spread(float(np.mean(means)), float(np.std(means, ddof=1)) if len(means) > 1 else 0.0)


class Difference(NamedTuple):
    """A mean paired difference and its 95 % interval."""

    mean: float
    low: float
    high: float


def paired_difference(losses: Losses, reference: Losses, seed: int = 0) -> Difference:
    """How much higher `losses` are than `reference`, of the seeds and domains that both have.

    The interval is that of a bootstrap which draws seeds and domains apart (Owen 2007, arXiv:0712.1111): domains of one
    run are not independent, nor are runs on one domain, so drawing pairs would give too narrow an interval.
    """
    shared = losses.keys() & reference.keys()
    seeds, domains = sorted({s for s, _ in shared}), sorted({d for _, d in shared})
    assert len(shared) == len(seeds) * len(domains) > 0, "a seed lacks a domain"
    pairs = itertools.product(seeds, domains)
    # [seeds, domains]
    difference = np.array([losses[p] - reference[p] for p in pairs]).reshape(len(seeds), len(domains))
    generator = np.random.default_rng(seed)
    rows = generator.integers(len(seeds), size=(DRAWS, len(seeds), 1))
    columns = generator.integers(len(domains), size=(DRAWS, 1, len(domains)))
    means = difference[rows, columns].mean(axis=(1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(difference.mean()), float(low), float(high))
