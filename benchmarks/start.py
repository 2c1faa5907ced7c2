"""How long it takes until something happens: `lorica --help`, and `lorica train` to the end of its first step.

    python benchmarks/start.py
    python benchmarks/start.py --rounds 9

The start of `lorica train` is seen from outside: from starting the process to the first step's row in metrics.jsonl,
on the embedded base and the quickstart's rows, with every default and nothing compiled. It takes turns (A B A B) with a
process that only imports torch and what training needs of transformers, which nobody can do without. The first round
does not count, for it brings the files into memory; nor does what a machine does once: the C kernels that are built at
first use are told apart, by a start with an empty cache.
"""

from __future__ import annotations

import argparse
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

LORICA = [sys.executable, "-m", "lorica"]
IMPORT = [sys.executable, "-c", "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer"]
_POLL_SECONDS = 0.002
_PATIENCE = 600


def run_seconds(command: list[str]) -> float:
    """From starting a process to its end."""
    begin = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, timeout=_PATIENCE)
    return time.perf_counter() - begin


def first_step_seconds(rows: Path, cache: Path | None = None) -> float:
    """From starting `lorica train` to the row of its first step. cache: of compiled kernels, if not the user's."""
    environment = os.environ if cache is None else {**os.environ, "XDG_CACHE_HOME": str(cache)}
    run = rows.with_name("run")
    shutil.rmtree(run, ignore_errors=True)
    config = rows.with_name("run.yaml")
    config.write_text(f"model: {{base: embedded}}\ndata: {{train: {rows}}}\ntrain: {{output: {run}, max_steps: 1}}\n")
    begin = time.perf_counter()
    with (rows.with_name("log")).open("w") as log:
        command = [*LORICA, "train", str(config)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        while not _has_stepped(run / "metrics.jsonl"):
            if process.poll() is not None or time.perf_counter() - begin > _PATIENCE:
                process.kill()
                raise SystemExit(f"no step was taken:\n{rows.with_name('log').read_text()}")
            time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - begin
        process.wait(_PATIENCE)
    return seconds


def _has_stepped(metrics: Path) -> bool:
    """Whether the row of the first step stands; rows of evaluation have a loss of another name."""
    return metrics.exists() and '"loss"' in metrics.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each side, after one that does not count")
    arguments = parser.parse_args()
    found: dict[str, list[float]] = {"help": [], "import": [], "train": []}
    with tempfile.TemporaryDirectory() as folder:
        from lorica.assets.handbook import write_handbook

        rows = write_handbook(Path(folder), seed=0).train
        for number in range(arguments.rounds + 1):
            seconds = (run_seconds([*LORICA, "--help"]), run_seconds(IMPORT), first_step_seconds(rows))
            print("warm-up" if not number else f"{number:7}", *(f"{s:8.2f} s" for s in seconds), flush=True)
            for name, taken in zip(found, seconds, strict=True):
                found[name] += [taken] if number else []
        cold = first_step_seconds(rows, Path(folder) / "cache")
    report({name: statistics.median(each) for name, each in found.items()}, cold, arguments.rounds)


def report(median: dict[str, float], cold: float, num_runs: int) -> None:
    over, building = median["train"] - median["import"], cold - median["train"]
    print(f"lorica --help                        {median['help']:.2f} s (goal {HELP_GOAL} s)")
    print(f"import of torch and transformers     {median['import']:.2f} s")
    print(
        f"lorica train to its first step       {median['train']:.2f} s, {over:.2f} s beyond (goal {OVER_IMPORT_GOAL} s)"
    )
    print(f"once a machine, the C kernels        {building:.1f} s")
    goals = {"help": HELP_GOAL, "import": None, "train": median["import"] + OVER_IMPORT_GOAL}
    append_rows(
        "start.csv",
        [
            {"work": name, "runs": num_runs, "seconds": rounded(seconds), "goal": goals[name] and rounded(goals[name])}
            for name, seconds in median.items()
        ],
    )
    announce(Comparison("lorica --help", "seconds", median["help"], note=f"goal {HELP_GOAL} s"))
    announce(
        Comparison(
            "lorica train to its first step, embedded base",
            "seconds",
            median["train"],
            median["import"],
            "the bare import",
            note=f"{over:.2f} s beyond it; goal {OVER_IMPORT_GOAL} s",
        )
    )


if __name__ == "__main__":
    main()
