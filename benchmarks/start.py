"""How long it takes until something happens: `lorica --help`, and `lorica train` to its first step and that step's end.

    python benchmarks/start.py
    python benchmarks/start.py --rounds 9

The start of `lorica train` is seen from outside: from starting the process to the first step's row in metrics.jsonl,
on the embedded base and the quickstart's rows, with every default and nothing compiled. The step began as long before
that as the row itself says (`seconds`); data, model and adapter are ready then. It takes turns (A B A B) with two
processes that only import:

    the bare import      torch, and AutoModelForCausalLM and AutoTokenizer from transformers, which load nothing yet
    the model's import   the same and the base's own class, as the first `from_pretrained` does it: with it come
                         torch._dynamo, torch.distributed.tensor, sympy and, where installed, scipy and accelerate

The goal is set by the first; nobody who loads a model can do without the second. The first round does not count, for it
brings the files into memory; nor does what a machine does once: the C kernels that are built at first use are told
apart, by a start with an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from floor import Comparison, announce, append_rows, rounded

HELP_GOAL, OVER_IMPORT_GOAL = 0.3, 1.5
"""Seconds: of `lorica --help`, and of the start of training beyond the bare import."""
SIDES = ("help", "import", "import model", "train begins", "train")

LORICA = [sys.executable, "-m", "lorica"]
_BARE = "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer"
IMPORT = [sys.executable, "-c", _BARE]
IMPORT_MODEL = [sys.executable, "-c", f"{_BARE}; from transformers import LlamaForCausalLM"]
_POLL_SECONDS = 0.002
_PATIENCE = 600


def run_seconds(command: list[str]) -> float:
    """From starting a process to its end."""
    begin = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, timeout=_PATIENCE)
    return time.perf_counter() - begin


def first_step_seconds(rows: Path, cache: Path | None = None) -> tuple[float, float]:
    """From starting `lorica train` to the beginning of its first step, and to its row in metrics.jsonl.

    cache: of compiled kernels, if not the user's.
    """
    environment = os.environ if cache is None else {**os.environ, "XDG_CACHE_HOME": str(cache)}
    run = rows.with_name("run")
    shutil.rmtree(run, ignore_errors=True)
    config = rows.with_name("run.yaml")
    config.write_text(f"model: {{base: embedded}}\ndata: {{train: {rows}}}\ntrain: {{output: {run}, max_steps: 1}}\n")
    begin = time.perf_counter()
    with (rows.with_name("log")).open("w") as log:
        command = [*LORICA, "train", str(config)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while (step := _first_step(run / "metrics.jsonl")) is None:
            if process.poll() is not None or time.perf_counter() - begin > _PATIENCE:
                process.kill()
                raise SystemExit(f"no step was taken:\n{rows.with_name('log').read_text()}")
            time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - begin
        process.wait(_PATIENCE)
    return seconds - step, seconds


def _first_step(metrics: Path) -> float | None:
    """Seconds of the first step, once its row stands whole; rows of evaluation have a loss of another name."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return next((row["seconds"] for row in rows if "loss" in row), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each side, after one that does not count")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        from lorica.assets.handbook import write_handbook

        rows = write_handbook(Path(folder), seed=0).train
        for number in range(arguments.rounds + 1):
            imports = (run_seconds(IMPORT), run_seconds(IMPORT_MODEL))
            seconds = (run_seconds([*LORICA, "--help"]), *imports, *first_step_seconds(rows))
            print("warm-up" if not number else f"{number:7}", *(f"{s:8.2f} s" for s in seconds), flush=True)
            for name, taken in zip(found, seconds, strict=True):
                found[name] += [taken] if number else []
        cold = first_step_seconds(rows, Path(folder) / "cache")[1]
    report({name: statistics.median(each) for name, each in found.items()}, cold, arguments.rounds)


def report(median: dict[str, float], cold: float, num_runs: int) -> None:
    bare = median["import"]
    goals = {"help": HELP_GOAL, "train begins": bare + OVER_IMPORT_GOAL}
    beyond = {side: f", {seconds - bare:.2f} s beyond the bare import" for side, seconds in median.items()}
    print(f"lorica --help                           {median['help']:.2f} s (goal {HELP_GOAL} s)")
    print(f"bare import of torch and transformers   {bare:.2f} s")
    print(f"the same and the model's class          {median['import model']:.2f} s{beyond['import model']}")
    goal = f" (goal {OVER_IMPORT_GOAL} s)"
    print(f"lorica train to its first step          {median['train begins']:.2f} s{beyond['train begins']}{goal}")
    print(f"lorica train to that step's end         {median['train']:.2f} s{beyond['train']}")
    print(f"once a machine, the C kernels           {cold - median['train']:.1f} s")
    append_rows(
        "start.csv",
        [
            {"work": side, "runs": num_runs, "seconds": rounded(median[side]), "goal": goal and rounded(goal)}
            for side, goal in ((side, goals.get(side)) for side in SIDES)
        ],
    )
    announce(Comparison("lorica --help", "seconds", median["help"], note=f"goal {HELP_GOAL} s"))
    announce(
        Comparison(
            "lorica train to its first step, embedded base",
            "seconds",
            median["train begins"],
            bare,
            "the bare import",
            note=f"{median['train begins'] - bare:.2f} s beyond it; goal {OVER_IMPORT_GOAL} s",
        )
    )


if __name__ == "__main__":
    main()
