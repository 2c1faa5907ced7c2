"""Joules from counters made of files and from a library in C that stands for NVIDIA's; expected values by hand."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.training import energy, step
from lorica.training.checkpoint import checkpoint_path, find_checkpoints, read_checkpoint
from lorica.training.energy import Counter, Energy, Meter, meter_of, nvml_counter, rapl_counters
from lorica.training.metrics import read_metrics

CPU = torch.device("cpu")
Zone = Callable[..., Path]


@pytest.fixture
def zone(tmp_path: Path) -> Zone:
    """zone("0:1", "dram", 500): one zone of a powercap tree under tmp_path; the file that holds its microjoules."""

    def make(number: str, name: str, microjoules: int = 0, range_uj: int | None = 1_000_000) -> Path:
        folder = tmp_path / "sys/class/powercap" / f"intel-rapl:{number}"
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "energy_uj").write_text(f"{microjoules}\n")
        if range_uj is not None:
            (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")
        return folder / "energy_uj"

    return make


def test_packages_and_their_memory_are_added_and_nothing_twice(zone: Zone, tmp_path: Path) -> None:
    packages = [zone("0", "package-0", 100), zone("1", "package-1", 200)]
    memory = zone("0:1", "dram", 300)
    for number, part in (("0:0", "core"), ("0:2", "uncore"), ("2", "psys")):
        zone(number, part, 7)
    (tmp_path / "sys/class/powercap/intel-rapl-mmio:0").mkdir()
    (tmp_path / "sys/class/powercap/intel-rapl-mmio:0/name").write_text("package-0")
    meter = meter_of(CPU, tmp_path)
    assert meter.source == "RAPL package 0, dram 0, package 1"
    meter.begin()
    for file, now in zip((*packages, memory), (500_100, 400_200, 100_300), strict=True):
        file.write_text(str(now))
    meter.settle()
    # 0.5 J + 0.4 J + 0.1 J
    assert meter.total.joules == pytest.approx(1.0) and meter.total.source == meter.source


def test_a_counter_that_begins_again_goes_on(zone: Zone, tmp_path: Path) -> None:
    file = zone("0", "package-0", 900_000)
    meter = meter_of(CPU, tmp_path)
    meter.begin()
    file.write_text("150000")
    meter.settle()
    # From 900,000 to the range of 1,000,000, and 150,000 from there.
    assert meter.total == Energy(0.25, "RAPL package 0")


def test_a_counter_that_goes_back_without_a_range_is_no_measurement(zone: Zone, tmp_path: Path) -> None:
    file = zone("0", "package-0", 900_000, range_uj=None)
    meter = meter_of(CPU, tmp_path)
    meter.begin()
    file.write_text("150000")
    assert meter.result() == Energy(None, "RAPL package 0 was lost in the run: it went backwards")


def test_only_what_lies_between_begin_and_settle_counts(zone: Zone, tmp_path: Path) -> None:
    file = zone("0", "package-0", 0)
    meter = meter_of(CPU, tmp_path)
    for begin, end in ((100, 300), (5_000, 5_050)):
        file.write_text(str(begin))
        meter.begin()
        meter.begin()
        file.write_text(str(end))
        meter.settle()
        file.write_text(str(end + 1_000))
        meter.settle()
        meter.note()
    assert meter.total.joules == pytest.approx(250e-6)


def test_a_counter_is_read_once_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, readings = [0.0], iter([0, 1_000_000, 3_000_000])
    monkeypatch.setattr(energy.time, "monotonic", lambda: clock[0])
    meter = Meter([Counter("c", lambda: next(readings))], "c")
    meter.begin()
    totals = []
    for now in (0.3, 0.9, 1.0, 1.5, 1.99):
        clock[0] = now
        meter.note()
        totals.append(meter.total.joules)
    meter.settle()
    assert totals == [0.0, 0.0, 1.0, 1.0, 1.0] and meter.total.joules == 3.0
    assert next(readings, None) is None


@pytest.mark.parametrize(
    ("cpuinfo", "reason"),
    [
        ("processor : 0\nflags : fpu vme hypervisor lahf_lm\n", "this is a virtual machine, which is shown no RAPL"),
        ("processor : 0\nflags : fpu vme\n", "there are no RAPL counters under /sys/class/powercap"),
        (None, "there are no RAPL counters under /sys/class/powercap"),
    ],
)
def test_without_counters_there_is_a_reason_and_no_figure(tmp_path: Path, cpuinfo: str | None, reason: str) -> None:
    if cpuinfo is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    meter = meter_of(CPU, tmp_path)
    meter.begin()
    meter.note()
    found = meter.result()
    assert found.joules is None and found.source.startswith(reason)


def test_what_may_not_be_read_is_said_with_what_to_do(
    zone: Zone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denied = [zone("0", "package-0", 5), zone("0:0", "dram", 5)]
    read = energy.read_number

    def refuse(file: Path) -> int:
        if file in denied:
            raise PermissionError(13, "Permission denied", str(file))
        return read(file)

    # Root may read what others may not, so the refusal is made here.
    monkeypatch.setattr(energy, "read_number", refuse)
    counters, missing = rapl_counters(tmp_path)
    assert counters == []
    assert missing == "; ".join(
        f"RAPL {name} may not be read; as root: {energy.ALLOW}" for name in ("package 0", "dram 0")
    )
    assert meter_of(CPU, tmp_path).total == Energy(None, missing)
    denied.pop(0)
    assert meter_of(CPU, tmp_path).source.startswith("RAPL package 0 (RAPL dram 0 may not be read; as root: chmod")


@pytest.mark.parametrize("content", ["", "many\n"])
def test_a_counter_that_holds_no_number_is_none(zone: Zone, tmp_path: Path, content: str) -> None:
    zone("0", "package-0").write_text(content)
    counters, missing = rapl_counters(tmp_path)
    assert counters == [] and "RAPL package 0 cannot be read: it holds" in missing


def test_hidden_zones_are_no_zones(zone: Zone, tmp_path: Path) -> None:
    """A container shows links that lead nowhere."""
    folder = zone("0", "package-0").parent
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path / "nowhere")
    assert "containers hide them" in rapl_counters(tmp_path)[1]


def test_a_counter_lost_in_the_run_takes_the_figure_with_it(zone: Zone, tmp_path: Path) -> None:
    file = zone("0", "package-0")
    meter = meter_of(CPU, tmp_path)
    meter.begin()
    file.write_text("1000000")
    meter.settle()
    file.unlink()
    meter.begin()
    found = meter.result()
    assert found.joules is None and "RAPL package 0 was lost in the run: No such file" in found.source


def test_counters_that_stand_still_are_none(zone: Zone, tmp_path: Path) -> None:
    zone("0", "package-0", 5)
    meter = meter_of(CPU, tmp_path)
    meter.begin()
    assert meter.result() == Energy(None, "RAPL package 0 stood still")


def test_sums_keep_their_sources_and_what_is_missing_stays_missing() -> None:
    a, b, none = Energy(1.0, "a"), Energy(2.0, "b"), Energy(None, "why")
    assert a.plus(a) == Energy(2.0, "a") and a.plus(b) == Energy(3.0, "a; then b")
    assert a.plus(b).plus(b) == Energy(5.0, "a; then b")
    assert a.plus(none) == none.plus(a) == none == none.plus(Energy(None, "later"))


NVML = r"""
#include <string.h>
unsigned long long millijoules = 41; int broken = 0;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    if (strcmp(uuid, "GPU-1234")) return 6;
    *handle = (void *)0x7fffdeadbeef1234; return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *energy) {
    if (handle != (void *)0x7fffdeadbeef1234) return 2;
    if (broken) return 3;
    *energy = millijoules; return 0;
}
const char *nvmlErrorString(int code) { return code == 3 ? "Not Supported" : code == 6 ? "Not Found" : "Unknown"; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source = tmp_path_factory.mktemp("nvml") / "nvml.c"
    source.write_text(NVML)
    target = source.with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture
def millijoules(library: ctypes.CDLL) -> Iterator[Callable[[int], None]]:
    cell = ctypes.c_ulonglong.in_dll(library, "millijoules")

    def put(value: int) -> None:
        cell.value = value

    yield put
    ctypes.c_int.in_dll(library, "broken").value = 0


def test_nvml_counts_millijoules_in_64_bits(library: ctypes.CDLL, millijoules: Callable[[int], None]) -> None:
    millijoules(2**40)
    counter = nvml_counter(library, "GPU-1234", "NVIDIA H200")
    assert counter.name == "NVML NVIDIA H200"
    meter = Meter([counter], counter.name)
    meter.begin()
    millijoules(2**40 + 12_345)
    assert meter.result() == Energy(12.345, "NVML NVIDIA H200")


def test_a_board_that_cannot_be_read_says_why(library: ctypes.CDLL, millijoules: Callable[[int], None]) -> None:
    with pytest.raises(OSError, match="nvmlDeviceGetHandleByUUID: Not Found"):
        nvml_counter(library, "GPU-9", "x")
    ctypes.c_int.in_dll(library, "broken").value = 1
    with pytest.raises(OSError, match="nvmlDeviceGetTotalEnergyConsumption: Not Supported"):
        nvml_counter(library, "GPU-1234", "x")
    with pytest.raises(OSError, match="this driver has no nvmlInit_v2"):
        nvml_counter(ctypes.CDLL(None), "GPU-1234", "x")


def test_a_gpu_is_the_board_and_the_packages_or_nothing(
    zone: Zone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    library: ctypes.CDLL,
    millijoules: Callable[[int], None],
) -> None:
    board = nvml_counter(library, "GPU-1234", "H200")
    monkeypatch.setattr(energy, "_gpu_counter", lambda device: board)
    gpu = torch.device("cuda", 0)
    assert meter_of(gpu, tmp_path).source == "NVML H200, without the CPU"
    package = zone("0", "package-0")
    meter = meter_of(gpu, tmp_path)
    millijoules(1_000)
    meter.begin()
    millijoules(3_500)
    package.write_text("250000")
    assert meter.result() == Energy(2.75, "NVML H200 and RAPL package 0")

    def fails(device: torch.device) -> Counter:
        raise OSError("NVML: no")

    monkeypatch.setattr(energy, "_gpu_counter", fails)
    assert meter_of(gpu, tmp_path).result() == Energy(None, "NVML: no")
    assert meter_of(torch.device("meta"), tmp_path).result().joules is None


# In a run.


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine that draws 1 J between one reading and the next; the list counts the readings."""
    readings = [0]

    def read() -> int:
        readings[0] += 1
        return readings[0] * 1_000_000

    monkeypatch.setattr(step, "meter_of", lambda device: Meter([Counter("clockwork", read)], "clockwork"))
    monkeypatch.setattr(energy, "SECONDS_BETWEEN_READINGS", 0.0)
    return readings


def test_a_run_adds_up_its_steps(train: Any, ticking: list[int], tmp_path: Path) -> None:
    _, result = train(save_every=100)
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    # One reading before the first step and one after each; one more before the checkpoint at the end.
    assert [row["joules"] for row in rows] == [float(n) for n in range(1, result.step + 1)]
    assert result.energy == Energy(result.step + 1.0, "clockwork")


def test_evaluating_and_saving_are_left_out(train: Any, ticking: list[int]) -> None:
    def evaluate() -> dict[str, float]:
        ticking[0] += 1_000
        return {"loss": 1.0}

    _, result = train(evaluate=evaluate)
    assert result.energy.joules is not None and result.step < result.energy.joules < 3 * result.step


def test_a_resumed_run_goes_on_from_what_it_had_drawn(train: Any, ticking: list[int], tmp_path: Path) -> None:
    once = train(folder=tmp_path / "whole")[1]
    whole = once.energy
    folder = tmp_path / "run/checkpoints"
    train()
    for path in find_checkpoints(folder):
        if path != find_checkpoints(folder)[0]:
            shutil.rmtree(path)
    checkpoint = read_checkpoint(find_checkpoints(folder)[0])
    saved = checkpoint.state["energy"]
    assert saved["source"] == "clockwork" and 0 < saved["joules"] < whole.joules
    before = checkpoint.state["counters"]
    resumed = train(resume=checkpoint)[1]
    assert resumed.energy == whole and resumed.tokens == once.tokens > before["tokens"] > 0
    assert resumed.seconds > before["seconds"] > 0


def test_a_checkpoint_that_says_nothing_of_energy_leaves_the_run_without(
    train: Any, ticking: list[int], tmp_path: Path
) -> None:
    train(keep_checkpoints=9)
    checkpoint = read_checkpoint(checkpoint_path(tmp_path / "run/checkpoints", 2))
    del checkpoint.state["energy"]
    assert train(resume=checkpoint)[1].energy == energy.UNMEASURED


def test_a_run_on_a_machine_without_counters_says_so(
    train: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(step, "meter_of", lambda device: Meter([], "no counter here"))
    _, result = train()
    assert result.energy == Energy(None, "no counter here")
    assert not any("joules" in json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
