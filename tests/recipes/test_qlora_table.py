"""The QLoRA paper's table: its base and its trained parameters in closed form, and how the command is called."""

from __future__ import annotations

import json

import pytest

from lorica.cli import main
from lorica.recipes import qlora_table as recipe


def test_a_row_in_closed_form(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hidden, inner, layers = 128, 256, 14
    monkeypatch.setattr(recipe, "PAPER", {"tiny": ((hidden, inner, layers, 4), 0.1)})
    assert main(["plan", "--qlora-table", "--json"]) == 0
    captured = capsys.readouterr()
    (row,) = json.loads(captured.out)
    linear = layers * (4 * hidden**2 + 3 * hidden * inner)
    scales = linear // 64
    nested = layers * sum(4 * -(-size // (64 * 256)) for size in (*[hidden**2] * 4, *[hidden * inner] * 3))
    offsets = 4 * 7 * layers
    in_16_bits = 2 * (2 * 32000 * hidden + (2 * layers + 1) * hidden)
    weights, adapter, gradients, optimizer, *_ = row["parts"]
    rest = weights - (linear // 2 + scales + nested + offsets + in_16_bits)
    assert 0 <= rest <= 4 * hidden // 4 * 2, "the frequencies of the rotary embedding"
    trained = 64 * layers * (4 * 2 * hidden + 3 * (hidden + inner))
    assert row["trained_parameters"] == trained and adapter == 4 * trained
    assert optimizer == pytest.approx(8 * trained, rel=1e-3) and gradients <= 4 * trained
    assert row["peak_bytes"] == sum(row["parts"]) and row["paper_bytes"] == 100_000_000
    assert row["peak_bytes"] >= row["paged_bytes"] - (64 << 20)
    assert "tiny" in captured.err and "0.1" in captured.err


@pytest.mark.parametrize(
    "arguments", [["plan"], ["plan", "run.yaml", "--qlora-table"], ["plan", "--qlora-table", "--measure"]]
)
def test_it_takes_no_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "CONFIG" in capsys.readouterr().err
