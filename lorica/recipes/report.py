"""The report of a run: a page of markdown and a picture of its curves, made from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorica.recipes.console import human_bytes, human_count, human_joules, human_seconds
from lorica.training.metrics import read_metrics

_BLUE, _ORANGE, _GREY = "#2563a8", "#d97706", "#6b7280"


def write_run_report(folder: Path, result: Mapping[str, Any], sections: Sequence[str] = ()) -> Path:
    """Write report.md and curves.png for the training run in `folder`; `sections` are paragraphs for its end."""
    rows = read_metrics(folder / "metrics.jsonl")
    draw_curves(rows, folder / "curves.png")
    file = folder / "report.md"
    file.write_text("\n\n".join([*run_sections(result), *sections]) + "\n", encoding="utf-8")
    return file


def run_sections(result: Mapping[str, Any]) -> list[str]:
    """The report's paragraphs for one training run."""
    share = result["trainable_parameters"] / result["total_parameters"]
    facts = [
        ("status", f"{result['status']} after {result['steps']:,} steps"),
        ("training samples", f"{result['train_samples']:,}"),
        ("evaluation samples", f"{result['eval_samples']:,}"),
        ("trainable parameters", f"{human_count(result['trainable_parameters'])} ({share:.2%} of the model)"),
        ("training loss, last step", _number(result["train_loss"])),
        ("evaluation loss, best", _number(result["eval_loss"])),
        ("adapter taken from step", f"{result['adapter_step']:,}"),
        ("tokens seen", f"{result['tokens']:,}"),
        ("time in steps", human_seconds(result["seconds"])),
        ("energy in steps", energy_text(result["energy_joules"], result["energy_source"])),
        ("tokens a second", f"{result['tokens_per_second']:,.0f}"),
        ("peak memory of the process", human_bytes(result["peak_memory_bytes"])),
        ("adapter read back: largest logit difference", _number(result["read_back_difference"])),
    ]
    return ["# Training report", markdown_table(("what", "value"), facts), "![Loss and learning rate](curves.png)"]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table; pipes and line breaks inside cells are escaped."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def draw_curves(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Training and evaluation loss over the steps, and the learning rate below."""
    from matplotlib.figure import Figure

    steps = [row for row in rows if row.get("loss") is not None]
    evaluations = [row for row in rows if row.get("eval_loss") is not None]
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    if steps:
        x, losses = [row["step"] for row in steps], [row["loss"] for row in steps]
        upper.plot(x, losses, color=_BLUE, alpha=0.25, linewidth=1)
        upper.plot(x, smooth(losses), color=_BLUE, linewidth=1.8, label="training loss (smoothed)")
        lower.plot(x, [row["lr"] for row in steps], color=_GREY, linewidth=1.5)
    if evaluations:
        x, losses = [row["step"] for row in evaluations], [row["eval_loss"] for row in evaluations]
        upper.plot(x, losses, color=_ORANGE, marker="o", markersize=4, linewidth=1.5, label="evaluation loss")
    upper.set_ylabel("loss (nats a token)")
    upper.set_ylim(bottom=0)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("optimizer step")
    lower.set_ylim(bottom=0)
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if steps or evaluations:
        upper.legend(frameon=False)
    figure.savefig(file, dpi=130)


def smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a fiftieth of the run, without the bias of its start."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    average, weight, result = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(average / weight)
    return result


def energy_text(joules: float | None, source: str) -> str:
    """What a run drew and what was read, or why nothing could be."""
    return f"not readable here: {source}" if joules is None else f"{human_joules(joules)} ({source})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _cell(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\n", "<br>")
