"""The report's numbers and its picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lorica.recipes.report import draw_curves, markdown_table, run_sections, smooth, write_run_report

RESULT: dict[str, Any] = {
    "status": "finished",
    "steps": 1200,
    "train_samples": 5000,
    "eval_samples": 0,
    "trainable_parameters": 1_000_000,
    "total_parameters": 50_000_000,
    "train_loss": 1.23456,
    "eval_loss": None,
    "adapter_step": 1200,
    "tokens": 987654,
    "seconds": 75.0,
    "energy_joules": 12345.0,
    "energy_source": "RAPL package 0",
    "tokens_per_second": 13168.7,
    "peak_memory_bytes": 3 << 30,
    "read_back_difference": 0.0,
}


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.0 / step, "lr": 1e-3, **more}


def test_the_page_says_what_came(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "lr": 0.001}\n{"step": 1, "eval_loss": 1.9}\n')
    page = write_run_report(tmp_path, RESULT).read_text(encoding="utf-8")
    for line in (
        "| status | finished after 1,200 steps |",
        "| trainable parameters | 1.00 M (2.00% of the model) |",
        "| training loss, last step | 1.235 |",
        "| evaluation loss, best | - |",
        "| time in steps | 1 min 15 s |",
        "| energy in steps | 12.3 kJ (RAPL package 0) |",
        "| tokens a second | 13,169 |",
        "| peak memory of the process | 3.0 GiB |",
        "| adapter read back: largest logit difference | 0 |",
    ):
        assert line in page.splitlines()
    assert "![Loss and learning rate](curves.png)" in page and (tmp_path / "curves.png").is_file()


def test_energy_that_cannot_be_read_has_its_reason() -> None:
    page = "\n".join(run_sections({**RESULT, "energy_joules": None, "energy_source": "a virtual machine"}))
    assert "| energy in steps | not readable here: a virtual machine |" in page.splitlines()


def test_a_cell_cannot_break_the_table() -> None:
    table = markdown_table(("a", "b"), [("x|y\nz", None)])
    assert table == "| a | b |\n|---|---|\n| x\\|y<br>z | None |"
    assert len(run_sections(RESULT)) == 3


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(1)],
        [{"step": 1, "eval_loss": 3.0}],
        [row(1), {"step": 2, "loss": None, "lr": 1e-3, "skipped": "loss nan"}, {"step": 2, "eval_loss": None}],
        [row(step) for step in range(1, 400)] + [{"step": 399, "eval_loss": 0.5}],
        [row(1, loss=1e30), row(2, loss=1e38)],
    ],
    ids=["nothing", "one step", "evaluation only", "skipped", "long", "huge"],
)
def test_any_run_can_be_drawn(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    draw_curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_smoothing_is_the_unbiased_average() -> None:
    """Adam's correction (arXiv 1412.6980, section 3): a constant stays itself from the first value on."""
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    values = [math.sin(n) for n in range(100)]
    keep = 1 - 1 / 2
    weights = [keep ** (99 - n) for n in range(100)]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    assert smooth(values)[-1] == pytest.approx(expected)
    assert smooth([1.0, 2.0]) == [1.0, 2.0] and smooth([]) == []
