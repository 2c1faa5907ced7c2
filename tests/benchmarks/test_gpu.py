"""The benchmark for GPUs, run whole at a tiny size on the CPU: it must not fail on the day when there is a GPU."""

from __future__ import annotations

import csv
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gpu")
    for name in ("gpu", "gpu_kernels", "gpu_sides", "train_step"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore")
def test_all_of_it_runs_and_the_sides_do_the_same(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, losses = tmp_path / "gpu.csv", {}
    run_side = gpu.run_side

    def watched(side: str, case: Any, *arguments: Any) -> dict[str, Any]:
        found = run_side(side, case, *arguments)
        losses.setdefault(case.name, {})[side] = found["losses"]
        return found

    monkeypatch.setattr(gpu, "run_side", watched)
    gpu.main(["--device", "cpu", "--tiny", "--results", str(results)])
    with results.open() as file:
        rows = list(csv.DictReader(file))
    steps = [row for row in rows if int(row["tokens"])]
    assert {row["side"] for row in steps} == {"lorica", "peft"} and len(steps) == 2 * len(losses) == 4
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert all((int(row["predicted_bytes"]) > 0) == (row["side"] == "lorica") for row in steps)
    assert {row["work"] for row in rows} - losses.keys() == {"cross-entropy", "packed attention", "NF4 product"}
    # Same weights, same tokens, adapters that start at zero: the first loss is the same, to what bfloat16 rounds off.
    for sides in losses.values():
        assert sides["lorica"][0] == pytest.approx(sides["peft"][0], rel=5e-3)
    assert "x as fast as peft" in capsys.readouterr().out


def test_a_side_that_fails_is_named_and_the_others_go_on(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(command: list[str], **_: Any) -> Any:
        if '"side": "peft"' in command[-1]:
            return subprocess.CompletedProcess(command, 1, "", "Traceback\nOutOfMemoryError: no memory\n")
        return subprocess.CompletedProcess(command, 0, 'noise\n{"seconds": [2.0, 4.0], "losses": [1], "peak": 5}\n', "")

    arguments = gpu.parse(["--device", "cpu", "--rounds", "1"])
    case = gpu.Case("1b", "nf4", True, (10, 20))
    monkeypatch.setattr(gpu.subprocess, "run", failing)
    monkeypatch.setattr(gpu, "predicted_bytes", lambda *_: 7)
    monkeypatch.setattr(gpu, "commit", lambda: "abc")
    (row,) = gpu.measure(arguments, case)
    assert (row.side, row.seconds, row.tokens_per_second, row.predicted_bytes) == ("lorica", 3.0, 10.0, 7)
    assert "peft failed: Traceback | OutOfMemoryError: no memory" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_script_says_what_it_needs(tmp_path: Path) -> None:
    bash = str(shutil.which("bash"))
    done = subprocess.run(
        [bash, str(BENCHMARKS / "gpu.sh")], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, check=False
    )
    if shutil.which("nvidia-smi") is None:
        assert done.returncode == 1 and "there is no NVIDIA GPU here" in done.stderr
