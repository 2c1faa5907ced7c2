"""`lorica doctor` against the machine, the project's own requirements, and systems made up of files."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from lorica.cli import main
from lorica.recipes import doctor

REPOSITORY = Path(__file__).resolve().parents[2]


def test_required_packages_are_those_of_the_project() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", line).groups() for line in project["dependencies"])  # type: ignore[union-attr]
    assert wanted == doctor.REQUIRED


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    diagnosis = json.loads(capsys.readouterr().out)
    checks = {check["name"]: check for check in diagnosis["checks"]}
    assert diagnosis["ok"] and checks["torch"]["value"] == metadata.version("torch")
    assert {"python", "cpu", "gpu", "energy", "memory", "disk", "c compiler", "memory pool", "datasets"} <= set(checks)
    assert all(check["advice"] for check in checks.values() if check["status"] != "ok")


def test_a_missing_or_old_package_is_named_and_exits_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", {"surely-not-installed": "1.0", "numpy": "99.1"})
    monkeypatch.setattr(doctor, "_cpu", lambda: doctor.Check("cpu", "ok", ""))
    monkeypatch.setattr(doctor, "_gpu", lambda: doctor.Check("gpu", "ok", ""))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "pip install 'surely-not-installed>=1.0'" in out and "pip install -U 'numpy>=99.1'" in out


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.13.0+cpu", (2, 13, 0)), ("0.1.2", (0, 1, 2)), ("5.0.0rc1", (5, 0)), ("2024.1", (2024, 1))],
)
def test_release(version: str, numbers: tuple[int, ...]) -> None:
    assert doctor.release(version) == numbers


def test_memory_is_the_smaller_of_kernel_and_control_group(tmp_path: Path) -> None:
    assert doctor.available_memory_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:       16384 kB\nMemAvailable:    8192 kB\nBuffers: 1 kB\n")
    assert doctor.available_memory_bytes(tmp_path) == 8192 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.max").write_text("max\n")
    assert doctor.available_memory_bytes(tmp_path) == 8192 * 1024, "no limit"
    (group / "memory.max").write_text("4000000\n")
    (group / "memory.stat").write_text("anon 2000000\ninactive_file 500000\n")
    assert doctor.available_memory_bytes(tmp_path) == 4000000 - 3000000 + 500000


def test_a_pool_that_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorica.kernels import pool

    def fails() -> bool:
        warnings.warn("pool.cpp cannot be built (there is no c++), so Lorica goes on", RuntimeWarning, stacklevel=1)
        return False

    monkeypatch.setattr(pool, "has_pool", fails)
    check = doctor._pool()
    assert check.status == "warn" and "there is no c++" in check.value and check.advice
    monkeypatch.setattr(pool, "has_pool", lambda: False)
    assert "LORICA_KERNELS" in doctor._pool().value


def test_the_compiler_is_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if shutil.which("cc"):
        assert doctor.compiler().value.startswith(str(shutil.which("cc")))
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'no such header: omp.h' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CC", raising=False)
    check = doctor.compiler()
    assert check.status == "warn" and "no such header" in check.value and check.advice
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert doctor.compiler().value == "none"
