"""One run of `hydra.py`: an arm is trained with a seed at a learning rate, and measured domain by domain.

The rows are read and tokenised once a process. A run goes through `lorica.train` as any other; its adapter is read back
onto the base for measuring, which also watches the routers. An arm split by domain is five runs that count as one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mixture import DOMAINS, MAX_LENGTH

import lorica
from lorica.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from lorica.data.tokenized import TokenizedDataset
from lorica.errors import DivergedError
from lorica.evaluate.likelihood import likelihood
from lorica.interop.folder import read_folder
from lorica.interop.peft import load_adapter
from lorica.methods.attach import adapters
from lorica.methods.gates import alikeness, head_cosines, watching
from lorica.methods.hydra_linear import HydraLinear
from lorica.methods.method import MethodOptions, method_options
from lorica.models.load import load_model
from lorica.models.loss import make_loss
from lorica.recipes.preparing import PreparedRun, load_rows, prepare
from lorica.recipes.train import TrainResult, make_order

BASE, BY_DOMAIN = "base", "lora-by-domain"
TUNE, DEV = "tune", "dev"
Row = dict[str, Any]
Method = dict[str, Any]


class Task(NamedTuple):
    """A run: trained with `seed` at `rate`, measured on the rows of `stage`. The arm `BASE` is not trained."""

    stage: str
    arm: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Setup:
    """What all runs share.

    Attributes:
        name: stands for all that the results depend on beside arm, rate and seed.
        folder: holds train.jsonl, tune.jsonl and dev.jsonl, and the runs.
        threads: of each process.
        methods: by arm, with its ranks.
    """

    name: str
    base: str
    folder: Path
    steps: int
    batch_tokens: int
    threads: int
    methods: dict[str, Method]

    def output(self, task: Task) -> Path:
        return self.folder / task.arm / f"{task.stage}-{task.seed}-{task.rate:g}"

    def configuration(self, task: Task, output: Path, steps: int) -> RunConfig:
        train = TrainConfig(
            output=str(output),
            lr=task.rate,
            seed=task.seed,
            max_steps=steps,
            epochs=1000,
            batch_tokens=self.batch_tokens,
            warmup=0.05,
            save_every=steps,
            log_every=max(1, steps // 3),
            threads=self.threads,
        )
        data = DataConfig(train=str(self.folder / "train.jsonl"), eval=None, max_length=MAX_LENGTH)
        return RunConfig(
            model=ModelConfig(base=self.base), method=make_options(self.methods[task.arm]), data=data, train=train
        )


@dataclass(frozen=True)
class Data:
    """train: all domains. domains: that of each training sample. held_out: by stage, then by domain."""

    train: PreparedRun
    domains: np.ndarray[Any, Any]
    held_out: dict[str, dict[str, TokenizedDataset]]

    def only(self, domain: str) -> PreparedRun:
        """The training rows of one domain."""
        kept = np.flatnonzero(self.domains == domain)
        examples = [self.train.train_examples[i] for i in kept]
        return PreparedRun(**{**vars(self.train), "train": self.train.train.subset(kept), "train_examples": examples})


class Part(NamedTuple):
    """What one adapter came to: losses by domain, and a row a routed layer."""

    trained: TrainResult | None
    losses: dict[str, float]
    layers: list[Row]


def make_options(method: Method) -> MethodOptions:
    """A method as run.yaml has it, as options."""
    return method_options(method["name"])(**{key: value for key, value in method.items() if key != "name"})


@cache
def open_data(base: str, folder: Path) -> Data:
    """Read and tokenise what `write_mixture` wrote."""
    rows = DataConfig(train=str(folder / "train.jsonl"), eval=None, max_length=MAX_LENGTH)
    config = RunConfig(model=ModelConfig(base=base), data=rows)
    train = prepare(config)
    held_out: dict[str, dict[str, TokenizedDataset]] = {}
    for stage in (TUNE, DEV):
        found = load_rows(config, train.task, train.renderer, str(folder / f"{stage}.jsonl"), None)
        domains = [example.task for example in found.examples]
        held_out[stage] = {
            domain: found.dataset.subset([i for i, own in enumerate(domains) if own == domain]) for domain in DOMAINS
        }
    return Data(train, np.array([example.task for example in train.train_examples]), held_out)


def run(setup: Setup, task: Task) -> tuple[list[Row], list[Row]]:
    """Train and measure: a row a domain, and a row a routed layer. Tuning at a rate that diverges costs infinity."""
    torch.set_num_threads(setup.threads)
    common = {"setup": setup.name, "stage": task.stage, "arm": task.arm, "lr": task.rate, "seed": task.seed}
    data = open_data(setup.base, setup.folder)
    try:
        parts = list(_parts(setup, task, data))
    except DivergedError as error:
        if task.stage != TUNE:
            raise
        print(f"{task.arm} at {task.rate:g}: {error}")
        return [{**common, "domain": domain, "loss": math.inf} for domain in DOMAINS], []
    trained = [part.trained for part in parts if part.trained is not None]
    joules = [result.energy_joules for result in trained]
    cost = {
        "tokens": sum(result.tokens for result in trained),
        "parameters": sum(result.trainable_parameters for result in trained),
        "seconds": round(sum(result.seconds for result in trained), 2),
        # Empty where they cannot be read.
        "joules": "" if None in joules else round(sum(j for j in joules if j is not None), 1),
    }
    losses = {domain: loss for part in parts for domain, loss in part.losses.items()}
    rows = [{**common, **cost, "domain": domain, "loss": losses[domain]} for domain in DOMAINS]
    return rows, [{**common, **layer} for part in parts for layer in part.layers]


def _parts(setup: Setup, task: Task, data: Data) -> Iterator[Part]:
    held_out = data.held_out[task.stage]
    if task.arm == BASE:
        yield _measured(setup, None, held_out, data)
    elif task.arm == BY_DOMAIN:
        for domain, steps in _steps_by_domain(setup, task, data).items():
            config = setup.configuration(task, setup.output(task) / domain, steps)
            trained = lorica.train(config, resume="auto", data=data.only(domain))
            yield _measured(setup, trained, {domain: held_out[domain]}, data)
    else:
        config = setup.configuration(task, setup.output(task), setup.steps)
        yield _measured(setup, lorica.train(config, resume="auto", data=data.train), held_out, data)


def _steps_by_domain(setup: Setup, task: Task, data: Data) -> dict[str, int]:
    """How many steps on one domain alone come nearest to the tokens of it that the other arms see."""
    config = setup.configuration(task, setup.folder, setup.steps)
    order, lengths = make_order(config, data.train.train, padded=False), data.train.train.lengths
    seen = np.concatenate([order.batch(step) for step in range(setup.steps)])
    found = {}
    for domain in DOMAINS:
        wanted = lengths[seen[data.domains[seen] == domain]].sum()
        alone = lengths[data.domains == domain]
        own = make_order(config, data.only(domain).train, padded=False)
        sums = np.cumsum([alone[own.batch(step)].sum() for step in range(setup.steps)])
        found[domain] = int(np.argmin(abs(sums - wanted))) + 1
    return found


def _measured(setup: Setup, trained: TrainResult | None, held_out: dict[str, TokenizedDataset], data: Data) -> Part:
    model = load_model(setup.base).requires_grad_(False)
    if trained is not None:
        load_adapter(model, trained.adapter)
    loss_fn, losses = make_loss(model), {}
    with watching(model, len(DOMAINS)) as watch:
        for domain, rows in held_out.items():
            batches = data.train.layout.batches(rows, np.arange(len(rows)), setup.batch_tokens)
            labels = [[DOMAINS.index(domain)] * batch.num_samples for batch in batches]
            losses[domain] = likelihood(model, loss_fn, watch.over(batches, labels)).loss
    summaries = watch.summaries()
    layers = [
        {
            "layer": name,
            "head_cosine": mean_cosine(layer),
            **({} if (summary := summaries.get(name)) is None else _agreement(summary)),
        }
        for name, layer in adapters(model).items()
        if isinstance(layer, HydraLinear)
    ]
    return Part(trained, losses, layers)


def _agreement(summary: Any) -> Row:
    names = ("nmi", "soft_nmi", "adjusted_nmi", "row_entropy", "load_entropy")
    return {name: getattr(summary, name) for name in names}


def mean_cosine(layer: HydraLinear) -> float:
    """Of each two heads of a layer."""
    cosines = head_cosines(layer.heads())
    num = len(cosines)
    return float((cosines.sum() - cosines.trace()) / (num * (num - 1)))


def distances(runs: dict[int, Path]) -> list[Row]:
    """How alike A and B are, mean over layers: of two domains of one seed, and of two seeds of one domain.

    Args:
        runs: by seed, the folder of a run that is split by domain.
    """
    tensors = {
        (seed, domain): read_folder(folder / domain / "adapter").tensors
        for seed, folder in runs.items()
        for domain in DOMAINS
    }
    pairs = [
        *((seed, seed, one, two) for seed in runs for one, two in itertools.combinations(DOMAINS, 2)),
        *((one, two, domain, domain) for one, two in itertools.combinations(runs, 2) for domain in DOMAINS),
    ]
    return [
        {"seeds": f"{s}-{t}", "domains": f"{d}-{e}", "matrix": matrix, **_alike(tensors[s, d], tensors[t, e], matrix)}
        for s, t, d, e in pairs
        for matrix in ("A", "B")
    ]


def _alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], matrix: str) -> Row:
    names = [name for name in one if f"lora_{matrix}." in name]
    found = [alikeness(one[name], other[name]) for name in names]
    return {
        name: round(float(np.mean([getattr(x, name) for x in found])), 5) for name in ("cosine", "subspace", "chance")
    }


def mean_loss(rows: Sequence[Row]) -> float:
    """Over domains."""
    return float(np.mean([float(row["loss"]) for row in rows]))
