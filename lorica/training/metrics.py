"""metrics.jsonl, one JSON object a line, and the same numbers for TensorBoard where it is installed.

A line is written whole and flushed at once, so a run can be watched by `tail -f` and loses nothing when it is killed.
On resume the rows beyond the checkpoint are dropped, so that the file reads like one uninterrupted run.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch


class MetricsLog:
    """Appends rows to `folder/metrics.jsonl` and, where TensorBoard is installed, scalars to `folder/tensorboard`."""

    def __init__(self, folder: Path, *, step: int = 0, evaluated_step: int = 0) -> None:
        """Open for a run that stands at `step`, last evaluated at `evaluated_step`; later rows are dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        truncate_after(path, step, evaluated_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._board = _tensorboard_writer(folder / "tensorboard", step)

    def write(self, row: Mapping[str, Any]) -> None:
        """One row; `row["step"]` counts the optimizer steps done. NaN and infinity, which JSON lacks, become null."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in plain.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, row["step"])

    def sync(self) -> None:
        """Down to the disk: a checkpoint must not survive a power cut that its rows do not."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every whole row of a metrics.jsonl; a line that a kill left half-written is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]


def truncate_after(path: Path, step: int, evaluated_step: int) -> None:
    """Drop training rows beyond `step`, evaluation rows beyond `evaluated_step`, and broken lines. No file is fine."""
    if not path.exists():
        return
    rows = [row for row in read_metrics(path) if row["step"] <= (evaluated_step if "eval_loss" in row else step)]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if text.encode() != path.read_bytes():
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: allocated by torch on a GPU, resident in the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        # Linux without VmHWM (some containers) counts in KiB here, macOS in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _tensorboard_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # purge_step hides what an interrupted run wrote beyond the checkpoint.
    return SummaryWriter(str(folder), purge_step=step + 1)
