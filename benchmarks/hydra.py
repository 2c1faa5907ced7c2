"""Is HydraLoRA better than LoRA of as many parameters? Losses on five domains, seed by seed, and what the routers do.

    python benchmarks/hydra.py --data MIXTURE --jobs 2                       # about half an hour on 2 idle cores
    python benchmarks/hydra.py --data MIXTURE --steps 600 --rows 1500 --seeds 5 --rates 1e-3,3e-3,1e-2,3e-2
    python benchmarks/hydra.py --data MIXTURE --steps 2 --seeds 1 --rows 40 --held-out 4     # to see that it works

    lora               as many parameters as hydra
    lora-same-rank     hydra's rank, so fewer parameters
    lora-by-domain     a LoRA a domain, as many parameters in all, each on its domain's share of the tokens
    hydra              heads at zero, router at random: the authors' way
    hydra-random       heads at random that cancel, router at zero
    hydra-components   heads from the first gradients of the components that are found in the data
    hydra-uniform      equal gates, no router
    hydra-frozen       the router stays as drawn
    hydra-ax           the router reads A x instead of x

All but lora-same-rank train as many parameters, the router's among them, to within 2 %: where whole ranks do not meet,
the first layers have a rank more than the others. alpha / rank is 2 everywhere. The arms of a seed see the same rows in
the same order, lora-by-domain as many tokens of each domain to within a step. A learning rate is chosen for each arm
with seed 0, by the mean over domains on rows that nothing is measured on; then the seeds from 1 to `--seeds` are
trained, and the last step's weights are measured. All arms take their turn seed by seed, so a benchmark that is stopped
leaves whole seeds.

A finished run is in the table at once and is not repeated: a second start goes on. Results: results/hydra.csv (a row a
run and domain), hydra-layers.csv (a row a run and layer with heads), hydra-alike.csv (how far A and B of two domains'
and of two seeds' LoRAs lie apart) and hydra.png. What they say of the paper's claims: `hydra_claims.py`.

What it does not show: anything about other bases and longer training. The LoRA of a domain takes its share of the steps
alone, and hydra-components looks at some batches before the first step, which are not among the tokens counted.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from hydra_claims import draw, show
from hydra_run import BASE, BY_DOMAIN, DEV, TUNE, Method, Row, Setup, Task, distances, make_options, mean_loss, run
from methods import append, read_rows
from mixture import DOMAINS, add_options, write_mixture

from lorica.methods.attach import attach, detach, trainable_parameters
from lorica.models.load import load_model

_HYDRA = {"name": "hydra"}
SAME_RANK = "lora-same-rank"
ARMS: dict[str, Method] = {
    "lora": {"name": "lora"},
    SAME_RANK: {"name": "lora"},
    BY_DOMAIN: {"name": "lora"},
    "hydra": _HYDRA,
    "hydra-random": {**_HYDRA, "init": "random"},
    "hydra-components": {**_HYDRA, "init": "components"},
    "hydra-uniform": {**_HYDRA, "gate": "uniform"},
    "hydra-frozen": {**_HYDRA, "gate": "frozen"},
    "hydra-ax": {**_HYDRA, "router_input": "ax"},
}
SCALE = 2
TOLERANCE = 0.02
RUN = ("date", "commit", "machine", "setup", "stage", "arm", "lr", "seed")
COLUMNS = (*RUN, "domain", "loss", "tokens", "parameters", "seconds", "joules")
LAYER_COLUMNS = (*RUN, "layer", "nmi", "soft_nmi", "adjusted_nmi", "row_entropy", "load_entropy", "head_cosine")
ALIKE_COLUMNS = ("date", "commit", "machine", "setup", "seeds", "domains", "matrix", "cosine", "subspace", "chance")


def equal_methods(base: str, rank: int, num_heads: int) -> dict[str, Method]:
    """Each arm's method, with ranks such that it trains as many parameters as hydra does; the counts are printed."""
    model = load_model(base)
    num_layers = model.config.get_text_config().num_hidden_layers

    def count(method: Method) -> int:
        attach(model, make_options(method))
        number = sum(p.numel() for p in trainable_parameters(model).values())
        detach(model)
        return number

    heads = {"num_heads": num_heads}
    methods = {arm: {**method, **(heads if method["name"] == "hydra" else {})} for arm, method in ARMS.items()}
    wanted = count({**methods["hydra"], "rank": rank})
    print("| arm | rank | trained parameters | against hydra |\n|---|---|---:|---:|")
    for arm, method in methods.items():
        copies = len(DOMAINS) if arm == BY_DOMAIN else 1
        real = rank if arm == SAME_RANK else _real_rank(method, wanted / copies, count)
        methods[arm] = _with_rank(method, real, num_layers)
        found = copies * count(methods[arm])
        assert arm == SAME_RANK or abs(found / wanted - 1) <= TOLERANCE, f"{arm} trains {found:,}, hydra {wanted:,}"
        said = f"{copies} x " if copies > 1 else ""
        print(f"| {arm} | {said}{_ranks(methods[arm])} | {found:,} | {found / wanted - 1:+.2%} |")
    return methods


def _real_rank(method: Method, wanted: float, count: Callable[[Method], int]) -> float:
    """The rank at which `method` would train `wanted` parameters, which are linear in it."""
    one, two = (count({**method, "rank": rank}) for rank in (1, 2))
    return 1 + (wanted - one) / (two - one)


def _with_rank(method: Method, rank: float, num_layers: int) -> Method:
    """The whole rank below `rank`, and one more in as many of the first layers as comes nearest to it."""
    low, more = divmod(round(rank * num_layers), num_layers)
    assert low > 0, "hydra's rank is too low for arms with as many parameters"
    first = rf"layers\.({'|'.join(map(str, range(more)))})\..*"
    patterns = {"rank_pattern": {first: low + 1}, "alpha_pattern": {first: SCALE * (low + 1)}} if more else {}
    return {**method, "rank": low, "alpha": SCALE * low, **patterns}


def _ranks(method: Method) -> str:
    low, pattern = method["rank"], next(iter(method.get("rank_pattern", {})), None)
    return f"{low}" if pattern is None else f"{low}, {low + 1} in the first {pattern.count('|') + 1} layers"


class Experiment:
    """The tables of one setup, and what fills them."""

    def __init__(self, setup: Setup, table: Path, jobs: int) -> None:
        self.setup, self.jobs = setup, jobs
        self.table = table
        self.layers_table, self.alike_table = (table.with_stem(f"{table.stem}-{x}") for x in ("layers", "alike"))

    def rows(self, stage: str) -> list[Row]:
        return [row for row in _of_setup(self.table, self.setup) if row["stage"] == stage]

    def do(self, tasks: Sequence[Task]) -> None:
        """Run what the table lacks, in this order, each with its rows written as it ends; SystemExit if one failed."""
        done = {Task(r["stage"], r["arm"], float(r["lr"]), int(r["seed"])) for r in _of_setup(self.table, self.setup)}
        missing = [task for task in tasks if task not in done]
        failed = 0
        for number, (task, outcome) in enumerate(self._outcomes(missing), start=1):
            if isinstance(outcome, Exception):
                failed += 1
                print(f"[{number}/{len(missing)}] {task} failed: {outcome!r}", flush=True)
                continue
            rows, layers = outcome
            if task.stage == DEV:
                append(self.layers_table, layers, LAYER_COLUMNS)
            append(self.table, rows, COLUMNS)
            print(f"[{number}/{len(missing)}] {task.arm}, {task.stage}, seed {task.seed}, lr {task.rate:g}: "
                  f"{mean_loss(rows):.4f}, {rows[0].get('seconds')} s in steps", flush=True)  # fmt: skip
        if failed:
            sys.exit(f"{failed} runs failed; a second start tries them again. --arms leaves an arm out.")

    def _outcomes(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, tuple[list[Row], list[Row]] | Exception]]:
        if self.jobs == 1:
            for task in tasks:
                try:
                    yield task, run(self.setup, task)
                except Exception as error:
                    yield task, error
            return
        # torch's threads do not survive a fork.
        with ProcessPoolExecutor(self.jobs, multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(run, self.setup, task): task for task in tasks}
            try:
                for future in as_completed(futures):
                    fault = future.exception()
                    if fault is not None and not isinstance(fault, Exception):
                        raise fault
                    yield futures[future], future.result() if fault is None else fault
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def choose_rates(self, arms: Sequence[str], rates: Sequence[float]) -> dict[str, float]:
        """By arm the rate with the lowest mean over domains; said aloud at the grid's edge."""
        if len(rates) == 1:
            return dict.fromkeys(arms, rates[0])
        self.do([Task(TUNE, arm, rate, 0) for arm in arms for rate in rates])
        chosen = {}
        print("\n| loss to choose by |", " | ".join(f"{rate:g}" for rate in rates), "|")
        print("|---" + "|---:" * len(rates) + "|")
        for arm in arms:
            rows = [row for row in self.rows(TUNE) if row["arm"] == arm]
            losses = {rate: mean_loss([row for row in rows if float(row["lr"]) == rate]) for rate in rates}
            chosen[arm] = min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
            edge = " (the grid's edge)" if chosen[arm] in (min(rates), max(rates)) else ""
            cells = [f"**{loss:.3f}**" if rate == chosen[arm] else f"{loss:.3f}" for rate, loss in losses.items()]
            print(f"| {arm}{edge} |", " | ".join(cells), "|")
        return chosen

    def compare_domains(self, rate: float, seeds: Sequence[int]) -> list[Row]:
        """How alike A and B of the LoRAs by domain are; from the table, where their folders are gone."""
        folders = {seed: self.setup.output(Task(DEV, BY_DOMAIN, rate, seed)) for seed in seeds}
        if all((folder / DOMAINS[-1] / "adapter").is_dir() for folder in folders.values()):
            known = {row["seeds"] for row in _of_setup(self.alike_table, self.setup)}
            fresh = [row for row in distances(folders) if row["seeds"] not in known]
            append(self.alike_table, [{"setup": self.setup.name, **row} for row in fresh], ALIKE_COLUMNS)
        wanted = [str(seed) for seed in seeds]
        rows = _of_setup(self.alike_table, self.setup)
        return [row for row in rows if set(row["seeds"].split("-")) <= set(wanted)]


def _of_setup(table: Path, setup: Setup) -> list[Row]:
    return [row for row in read_rows(table) if row["setup"] == setup.name]


def check_tokens(rows: Sequence[Row]) -> None:
    """Arms of one seed saw the same tokens; what is split by domain may differ by a step."""
    seen = {(row["seed"], row["tokens"]) for row in rows if row["arm"] not in (BASE, BY_DOMAIN)}
    assert len(seen) == len({seed for seed, _ in seen}), f"arms of one seed were trained on other tokens: {seen}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "hydra", steps=100)
    parser.set_defaults(rows=500, held_out=30, rates="3e-3,1e-2,3e-2")
    parser.add_argument("--arms", default=",".join(ARMS), help="arms, divided by commas")
    parser.add_argument("--rank", type=int, default=4, help="hydra's; the others follow")
    parser.add_argument("--heads", type=int, default=len(DOMAINS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    arguments = parser.parse_args()
    arms = arguments.arms.split(",")
    if unknown := set(arms) - ARMS.keys():
        parser.error(f"no such arm: {', '.join(sorted(unknown))}")
    a = arguments
    name = f"{Path(a.base).name}-{a.steps}x{a.batch_tokens}-{a.rows}+{a.held_out}-r{a.rank}n{a.heads}"
    folder = a.work / name
    write_mixture(a.data, folder, a.rows, a.held_out)
    threads = max(1, torch.get_num_threads() // a.jobs)
    methods = equal_methods(a.base, a.rank, a.heads)
    setup = Setup(name, a.base, folder.resolve(), a.steps, a.batch_tokens, threads, methods)
    experiment = Experiment(setup, a.table, a.jobs)
    rates = experiment.choose_rates(arms, [float(rate) for rate in a.rates.split(",")])
    seeds = range(1, a.seeds + 1)
    measured = [Task(DEV, arm, rates[arm], seed) for seed in seeds for arm in arms]
    experiment.do([Task(DEV, BASE, 0.0, 0), *measured])
    rows = [row for row in experiment.rows(DEV) if row["arm"] == BASE or _is_of(row, measured)]
    check_tokens(rows)
    layers = [row for row in _of_setup(experiment.layers_table, setup) if _is_of(row, measured)]
    alike = experiment.compare_domains(rates[BY_DOMAIN], seeds) if BY_DOMAIN in arms else []
    show(rows, layers, alike)
    title = f"{a.base}, {a.steps} steps of {a.batch_tokens:,} tokens, {a.seeds} seeds"
    draw(rows, title, a.table.with_suffix(".png"))


def _is_of(row: Row, tasks: Sequence[Task]) -> bool:
    return Task(row["stage"], row["arm"], float(row["lr"]), int(row["seed"])) in tasks


if __name__ == "__main__":
    main()
