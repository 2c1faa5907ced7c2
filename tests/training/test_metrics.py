from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lorica.training.metrics import MetricsLog, peak_memory_bytes, read_metrics, truncate_after


def test_rows_are_on_the_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run") as log:
        log.write({"step": 1, "loss": 0.1 + 0.2})
        assert read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 0.1 + 0.2}]
        log.sync()


def test_what_is_no_number_becomes_null_and_every_line_stays_strict_json(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "skipped": "损失 nan"})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    row = json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8"), parse_constant=refuse)
    assert row == {"step": 1, "loss": None, "grad_norm": None, "skipped": "损失 nan"}


def write_rows(path: Path) -> None:
    rows = [
        {"step": 1, "loss": 3.5},
        {"step": 2, "loss": 3.25},
        {"step": 2, "eval_loss": 3.0},
        {"step": 3, "loss": 3.0},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_beyond_the_checkpoint_and_a_half_line_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    with MetricsLog(tmp_path, step=2, evaluated_step=2) as log:
        log.write({"step": 3, "loss": 2.5})
    assert [(row["step"], row.get("loss")) for row in read_metrics(path)] == [(1, 3.5), (2, 3.25), (2, None), (3, 2.5)]


def test_an_evaluation_after_the_checkpoint_of_its_step_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path)
    truncate_after(path, 2, evaluated_step=0)
    assert read_metrics(path) == [{"step": 1, "loss": 3.5}, {"step": 2, "loss": 3.25}]


def test_a_file_with_nothing_to_drop_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_rows(path)
    before = path.stat()
    truncate_after(path, 3, evaluated_step=3)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    truncate_after(tmp_path / "missing.jsonl", 3, evaluated_step=3)


def test_peak_memory_covers_what_was_held_and_stays() -> None:
    # Written to: untouched pages are not resident.
    held = np.ones(64 << 20, dtype=np.uint8)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    del held
    # The kernel's counters of resident pages are exact to a batch of pages for each core only.
    assert peak_memory_bytes(torch.device("cpu")) >= resident - (4 << 20)


def test_tensorboard_gets_the_scalars_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path) as log:
        log.write({"step": 1, "loss": 2.0, "skipped": "text"})
        log.write({"step": 2, "loss": None})
        log.write({"step": 3, "loss": 1.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.0), (3, 1.5)]


def test_sync_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    with MetricsLog(tmp_path) as log:
        monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
        log.sync()
    assert flushed == [(tmp_path / "metrics.jsonl").stat().st_ino]
