"""`make bench`: every comparison that Lorica's speed is judged by, in one table.

    python benchmarks/bench.py                                  # hours on two cores: the shapes of up to 1B parameters
    python benchmarks/bench.py --quick                          # some rows, cut down: about three minutes, for a look
    python benchmarks/bench.py --only step,decode
    python benchmarks/bench.py --mixture MIXTURE --sst2 SST2    # with the rows that read data: sft, classification

Each row is a script of this folder in a process of its own, which measures ours and its peer in turns, with floor.py's
floor beside them. A ratio above 1 is in our favour. Where a peer or its data is missing the row says what to do. Goals
are those for two cores with AMX, also on another processor. The dtype is what `model.dtype: auto` takes here for a
checkpoint in bfloat16: where the processor has no bfloat16 arithmetic, float32 for both sides. All is appended to
results/bench.csv, and each script's own figures to its file there.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from floor import Comparison, announced, append_rows, auto_dtype, is_announcement, processor, rounded


@dataclass(frozen=True)
class Goal:
    """What to reach.

    Attributes:
        ratio: at least so many times as fast as the peer.
        memory: at most this part of the peer's peak.
        seconds: at most; of the peer's and these together where `above_peer`.
    """

    ratio: float | None = None
    memory: float | None = None
    seconds: float | None = None
    above_peer: bool = False

    def __str__(self) -> str:
        parts = [] if self.ratio is None else [f"{self.ratio:g} x"]
        parts += [] if self.memory is None else [f"memory {self.memory:.0%}"]
        parts += [] if self.seconds is None else [f"{'peer + ' if self.above_peer else ''}{self.seconds:g} s"]
        return ", ".join(parts)

    def is_met(self, found: Comparison) -> bool:
        if self.ratio is not None and (found.ratio is None or found.ratio < self.ratio):
            return False
        part = found.peak / found.peer_peak if found.peak and found.peer_peak else math.inf
        if self.memory is not None and part > self.memory:
            return False
        allowed = None if self.seconds is None else self.seconds + (found.peer or 0.0) * self.above_peer
        return allowed is None or found.ours <= allowed


@dataclass(frozen=True)
class Row:
    """One call of a script.

    Attributes:
        goals: by the peer's name, or by how the work's name begins; "" is for all others.
        quick: what is added to `arguments`, or stands against them, with --quick.
        needs: options of bench.py without which it cannot run.
        is_long: left out with --quick, unless it is named.
    """

    script: str
    arguments: Sequence[str]
    quick: Sequence[str] = ()
    goals: dict[str, Goal] = field(default_factory=dict)
    needs: Sequence[str] = ()
    is_long: bool = False


FOUR = {"": Goal(ratio=4.0)}
CUT = ("--layers", "2", "--samples", "1", "--length", "128", "--steps", "3", "--rounds", "1")
LONG = ("--steps", "3", "--rounds", "1")

ROWS = {
    "step-135m": Row(
        "train_step.py",
        ("--steps", "5", "--cold", "--sides", "lorica", "peft", "peft-compiled"),
        (*CUT, "--sides", "lorica", "peft"),
        {"peft": Goal(ratio=5.0, memory=0.4), "peft-compiled": Goal(ratio=2.5)},
    ),
    "step-360m": Row("train_step.py", ("--shape", "360m", *LONG), CUT, FOUR, is_long=True),
    "step-360m-checkpointing": Row("train_step.py", ("--shape", "360m", "--checkpointing", *LONG), CUT, FOUR),
    "step-1b": Row("train_step.py", ("--shape", "1b", *LONG), CUT, FOUR, is_long=True),
    "step-1b-checkpointing": Row("train_step.py", ("--shape", "1b", "--checkpointing", *LONG), CUT, FOUR, is_long=True),
    "step-qwen3": Row("train_step.py", ("--shape", "qwen3", *LONG), CUT, is_long=True),
    "step-gemma": Row("train_step.py", ("--shape", "gemma", *LONG), CUT, is_long=True),
    "step-gemma2": Row("train_step.py", ("--shape", "gemma2", *LONG), CUT),
    "step-gpt2": Row("train_step.py", ("--shape", "gpt2", *LONG), CUT),
    "sft": Row(
        "sft.py", ("--train", "{mixture}/math.train.jsonl", "--dev", "{mixture}/math.dev.jsonl", "--dtype", "{dtype}"),
        ("--rows", "24", "--dev-rows", "8", "--rounds", "1", "--sides", "lorica", "trl-padded"),
        {"": Goal(ratio=10.0)}, ("mixture",),
    ),
    "classification": Row(
        "classification.py", ("--train", "{sst2}/train.jsonl"), ("--shape", "small", "--steps", "4", "--rounds", "1"),
        {"": Goal(ratio=3.0)}, ("sst2",),
    ),
    "decode-1": Row(
        "decode.py", ("--dtype", "{dtype}"), ("--tokens", "8", "--repeats", "1", "--rounds", "1"),
        {"": Goal(ratio=2.0)}, is_long=True,
    ),
    "decode-16": Row(
        "decode.py", ("--batch", "16", "--dtype", "{dtype}"), ("--tokens", "8", "--repeats", "1", "--rounds", "1"),
        {"": Goal(ratio=2.0)},
    ),
    "start": Row(
        "start.py", (), ("--rounds", "1"),
        {"lorica --help": Goal(seconds=0.3), "lorica train": Goal(seconds=1.5, above_peer=True)},
    ),
}  # fmt: skip
HEAD = ("work", "ours", "peer", "ratio", "goal", "memory", "floor", "of the floor")


def run(name: str, row: Row, arguments: argparse.Namespace, dtype: str) -> tuple[list[Comparison], str]:
    """What the row's script found, and why it found nothing, if so."""
    missing = [f"--{option}" for option in row.needs if getattr(arguments, option) is None]
    if missing:
        return [], f"not measured: give {' and '.join(missing)}"
    script = Path(__file__).with_name(row.script)
    if not script.exists():
        return [], f"not measured: there is no {row.script}"
    values = {**vars(arguments), "dtype": dtype}
    words = [word.format(**values) for word in (*row.arguments, *(row.quick if arguments.quick else ()))]
    print(f"\n{name}: {row.script} {' '.join(words)}", flush=True)
    lines: list[str] = []
    command = [sys.executable, "-W", "ignore", str(script), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            lines.append(line.rstrip())
            if not is_announcement(line):
                print(f"  {line}", end="", flush=True)
    found = announced(lines)
    if child.returncode:
        return found, f"failed with exit code {child.returncode}"
    return found, "" if found else next(reversed(lines), "it said nothing")


def goal_for(row: Row, found: Comparison) -> Goal:
    named = (goal for key, goal in row.goals.items() if key and (key == found.peer_name or found.work.startswith(key)))
    return next(named, row.goals.get("", Goal()))


def cells(row: Row, found: Comparison) -> tuple[str, ...]:
    """The line of the table."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g} {found.unit}"

    goal, memory = goal_for(row, found), "-"
    if found.peak:
        memory = f"{found.peak / 1e9:.2f} GB"
        if found.peer_peak:
            memory += f" of {found.peer_peak / 1e9:.2f}, {found.peak / found.peer_peak:.0%}"
    aim = f"{goal}: {'met' if goal.is_met(found) else 'not met'}" if str(goal) else "-"
    peer = "-" if found.peer is None else f"{found.peer_name} {number(found.peer)}".strip()
    ratio = "-" if found.ratio is None or goal.above_peer else f"{found.ratio:.2f} x"
    fraction = "-" if found.fraction is None else f"{found.fraction:.0%}"
    return (found.work, number(found.ours), peer, ratio, aim, memory, number(found.floor), fraction)


def for_file(name: str, row: Row, found: Comparison, is_quick: bool) -> dict[str, object]:
    """The row of bench.csv."""
    goal = goal_for(row, found)
    given = {key: "" if value is None else value for key, value in vars(found).items()}
    more = {"ratio": found.ratio, "fraction_of_floor": found.fraction}
    return {
        "row": name, "quick": is_quick, **given, **{k: "" if v is None else rounded(v) for k, v in more.items()},
        "goal": str(goal), "met": goal.is_met(found) if str(goal) else "",
    }  # fmt: skip


def show(lines: Sequence[Sequence[str]]) -> None:
    """A Markdown table, its columns aligned."""
    table = [HEAD, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEAD))]
    table.insert(1, tuple("-" * width for width in widths))
    print()
    for line in table:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")


def names(text: str) -> list[str]:
    """Rows by name; a name stands for all that begin with it, too."""
    chosen = [name for name in ROWS if any(name == part or name.startswith(f"{part}-") for part in text.split(","))]
    if not chosen:
        raise argparse.ArgumentTypeError(f"no such row; there are {', '.join(ROWS)}")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version of each row, to see that it works")
    parser.add_argument("--only", type=names, metavar="ROWS", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--mixture", help="folder with math.train.jsonl and math.dev.jsonl: prompts and responses")
    parser.add_argument("--sst2", help="folder with train.jsonl: texts and labels")
    arguments = parser.parse_args()
    dtype = auto_dtype()
    print(f"{processor()}, {os.cpu_count()} cores; dtype auto is {dtype}")
    if os.getloadavg()[0] > 0.5:
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): believe the ratios only")
    table: list[tuple[str, ...]] = []
    rows: list[dict[str, object]] = []
    has_failed = False
    for name in arguments.only or [name for name, row in ROWS.items() if not (arguments.quick and row.is_long)]:
        found, fault = run(name, ROWS[name], arguments, dtype)
        table += [cells(ROWS[name], each) for each in found]
        rows += [for_file(name, ROWS[name], each, arguments.quick) for each in found]
        if fault:
            table.append((f"{name}: {fault}", *[""] * (len(HEAD) - 1)))
            has_failed |= fault.startswith("failed")
    show(table)
    if rows:
        append_rows("bench.csv", rows)
    if has_failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
