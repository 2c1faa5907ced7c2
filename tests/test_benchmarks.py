"""The benchmarks: each script says what it does, and floors are what a hand counts. They measure nothing here."""

from __future__ import annotations

import csv
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if '__name__ == "__main__"' in path.read_text())


@pytest.fixture(autouse=True)
def path_of_scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As Python sets it for a script; their modules go again, since some add to the tables of others."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(sys.modules[name].__file__ or "").parent == FOLDER:
            del sys.modules[name]


def help_of(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_says_what_it_does(script: str, monkeypatch: Any, capsys: Any) -> None:
    told = help_of(script, monkeypatch, capsys)
    assert f"python benchmarks/{script}" in told


def test_the_table_gives_each_script_options_that_it_has(monkeypatch: Any, capsys: Any) -> None:
    import bench

    options: dict[str, set[str]] = {}
    for row in bench.ROWS.values():
        options.setdefault(row.script, set()).update(w for w in (*row.arguments, *row.quick) if w.startswith("--"))
    for script, given in options.items():
        words = set(help_of(script, monkeypatch, capsys).replace(",", " ").replace("[", " ").replace("]", " ").split())
        assert given <= words, script


def test_flops_of_a_step_are_what_a_hand_counts() -> None:
    from floor import step_flops

    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, vocab_size=32,
    )  # fmt: skip
    tokens, rank, layers = 3 + 5, 2, 2
    reads_hidden = [(8, 8), (8, 4), (8, 4)]
    linears = [*reads_hidden, (8, 8), (8, 12), (8, 12), (12, 8)]
    forward = layers * 2 * tokens * sum(i * o for i, o in linears)
    # Nothing is trained below the first layer's queries, keys and values.
    gradients = forward - 2 * tokens * sum(i * o for i, o in reads_hidden)
    pairs = (1 + 2 + 3) + (1 + 2 + 3 + 4 + 5)
    seen = layers * 2 * 2 * pairs  # two heads, two operations
    adapters = layers * 2 * rank * tokens * sum(i + o for i, o in linears)

    found = step_flops(config, [3, 5], rank=rank)
    assert found.products == forward + gradients
    assert found.attention == seen * (4 + 4) + seen * 5 * 4
    assert found.adapters == 3 * adapters - 2 * rank * tokens * sum(i for i, _ in reads_hidden)
    assert found.head == 2 * 2 * (2 + 4) * 8 * 32
    assert found.again == 0
    again = step_flops(config, [3, 5], rank=rank, trained=1, checkpointing=True)
    assert again.head == 2 * 2 * 8 * 32
    assert again.again == forward + seen * (4 + 4) + adapters
    assert again.total == found.total - found.head + again.head + again.again


def test_flops_of_a_transposed_linear_layer() -> None:
    from floor import step_flops

    found = step_flops(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=32), [4], rank=2)
    sizes = 8 * 24 + 8 * 8 + 8 * 32 + 32 * 8
    assert found.products == 2 * 4 * (2 * sizes - 8 * 24)


@pytest.mark.parametrize("length", [1, 4, 7])
@pytest.mark.parametrize("window", [1, 4, 9])
def test_pairs_within_a_window(length: int, window: int) -> None:
    from floor import num_pairs

    assert num_pairs(length, window) == sum(0 <= i - j < window for i in range(length) for j in range(length))


@pytest.mark.parametrize("is_tied", [True, False])
def test_bytes_of_a_decoded_token(is_tied: bool) -> None:
    from floor import decode_bytes

    config = LlamaConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, vocab_size=32, tie_word_embeddings=is_tied,
    )  # fmt: skip
    linears = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
    weights = 2 * (linears + 2 * 8) + 8 + 32 * 8
    cache = 10 * 2 * 1 * 4 * 2
    assert decode_bytes(LlamaForCausalLM(config).to(torch.bfloat16), places=10) == 2 * (weights + cache)


def test_ratios_and_fractions_of_times_and_of_rates(capsys: pytest.CaptureFixture[str]) -> None:
    from bench import Goal
    from floor import Comparison, announce, announced

    time = Comparison("a", "s a step", ours=2.0, peer=6.0, peak=3.0, peer_peak=10.0, floor=1.0)
    rate = Comparison("b", "tokens a second", ours=30.0, peer=10.0, floor=60.0)
    assert (time.ratio, time.fraction) == (rate.ratio, rate.fraction) == (3.0, 0.5)
    announce(time)
    announce(rate)
    assert announced(["something else", *capsys.readouterr().out.splitlines()]) == [time, rate]

    assert Goal(ratio=3.0, memory=0.3).is_met(time)
    assert not Goal(ratio=3.1).is_met(time)
    assert not Goal(memory=0.29).is_met(time)
    assert not Goal(memory=0.5).is_met(rate)
    assert Goal(seconds=2.0).is_met(time) and not Goal(seconds=1.9).is_met(time)
    behind = Comparison("c", "s", ours=4.4, peer=3.0)
    assert Goal(seconds=1.5, above_peer=True).is_met(behind)
    assert not Goal(seconds=1.3, above_peer=True).is_met(behind)


def test_results_keep_their_rows_when_a_column_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import floor

    monkeypatch.setattr(floor, "RESULTS", tmp_path)
    floor.append_rows("some.csv", [{"seconds": 1.5}])
    floor.append_rows("some.csv", [{"seconds": 2.5, "peak": 3}])
    with (tmp_path / "some.csv").open() as handle:
        first, second = csv.DictReader(handle)
    assert (first["seconds"], first["peak"], second["seconds"], second["peak"]) == ("1.5", "", "2.5", "3")
    assert first["machine"] == floor.processor() != ""


def test_a_row_that_cannot_run_says_why() -> None:
    import argparse

    import bench

    nothing = argparse.Namespace(quick=True, mixture=None, sst2=None)
    found, fault = bench.run("classification", bench.ROWS["classification"], nothing, "float32")
    assert (found, fault) == ([], "not measured: give --sst2")
