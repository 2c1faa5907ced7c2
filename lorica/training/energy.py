"""The joules that a run's training steps drew, where the hardware counts them; else the reason why there is no figure.

    RAPL   /sys/class/powercap/intel-rapl:*       the CPU packages and their memory (AMD's stand under the same name)
    NVML   nvmlDeviceGetTotalEnergyConsumption    the GPU that computes: NVIDIA's, from Volta on

Both are counters that only grow, so a figure is the difference of two readings, and nothing is sampled or estimated. A
counter is read once a second at most, or once a step where a step is longer; loading, evaluating and saving are left
out. It counts its whole package or board: what an idle machine and other programs draw is in it. The device that
computes must be readable, or there is no figure; what else is readable is added, and all of it is named.

What it gives up: disks, fans and the losses of the power supply, and a step so long that a RAPL counter passes its
range twice (65 or 262 kJ, minutes at full load), which leaves no trace.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SECONDS_BETWEEN_READINGS = 1.0
ALLOW = "chmod a+r /sys/class/powercap/*/energy_uj"
"""What root does once after each start of the machine: Linux 5.10 took the right from the others (CVE-2020-8694)."""
_THEN = "; then "


@dataclass(frozen=True)
class Energy:
    """joules: None where they cannot be read. source: the counters that were read, or why there are none."""

    joules: float | None
    source: str

    def plus(self, more: Energy) -> Energy:
        """The sum, with all sources; the first part without a figure leaves the whole without."""
        if self.joules is None:
            return self
        if more.joules is None:
            return more
        known = more.source in self.source.split(_THEN)
        return Energy(self.joules + more.joules, self.source if known else f"{self.source}{_THEN}{more.source}")


UNMEASURED = Energy(None, "the first steps were taken by a version that did not measure")
"""What a checkpoint stands for that says nothing of energy."""


@dataclass(frozen=True)
class Counter:
    """One counter of microjoules. range_uj: where it begins again at 0; None where that is unknown or never."""

    name: str
    read: Callable[[], int]
    range_uj: int | None = None

    def between(self, before: int, after: int) -> int:
        """Microjoules from one reading to the next; OSError where the counter went back and has no known range."""
        if after < before and self.range_uj is None:
            raise OSError("it went backwards")
        return after - before if after >= before else after - before + (self.range_uj or 0)


class Meter:
    """Adds up what `counters` count between `begin` and `settle`.

    Attributes:
        source: names the counters, or says why there are none.
        total: so far, up to the last reading.
    """

    def __init__(self, counters: Sequence[Counter], source: str) -> None:
        self.source = source
        self.total = Energy(0.0 if counters else None, source)
        self._counters = counters
        self._last: list[int] = []
        self._read_at = 0.0

    def restore(self, earlier: Energy) -> None:
        """Go on from what a run had drawn when it was interrupted."""
        self.total = earlier.plus(self.total)

    def begin(self) -> None:
        """Count from now on, if that is not so already."""
        if self.total.joules is not None and not self._last:
            self._last = self._readings()

    def note(self) -> None:
        """Bring `total` up to date, if it is a second old."""
        if time.monotonic() - self._read_at >= SECONDS_BETWEEN_READINGS:
            self._count()

    def settle(self) -> None:
        """Bring `total` up to date and count no more until `begin`."""
        self._count()
        self._last = []

    def result(self) -> Energy:
        """All that was drawn. Counters that never moved, as some virtual machines have them, are none."""
        self.settle()
        return Energy(None, f"{self.total.source} stood still") if self.total.joules == 0 else self.total

    def _count(self) -> None:
        if not self._last:
            return
        before, self._last = self._last, self._readings()
        for counter, old, new in zip(self._counters, before, self._last, strict=False):
            try:
                drawn = Energy(counter.between(old, new) / 1e6, self.source)
            except OSError as error:
                drawn = _lost(counter, error)
            self.total = self.total.plus(drawn)

    def _readings(self) -> list[int]:
        """One a counter; none, and no total from here on, where one of them fails."""
        self._read_at = time.monotonic()
        readings = []
        for counter in self._counters:
            try:
                readings.append(counter.read())
            except OSError as error:
                self.total = self.total.plus(_lost(counter, error))
                return []
        return readings


def _lost(counter: Counter, error: OSError) -> Energy:
    return Energy(None, f"{counter.name} was lost in the run: {error.strerror or error}")


def meter_of(device: torch.device, root: Path = Path("/")) -> Meter:
    """What can be read of a run on `device`. root: where proc/ and sys/ are."""
    packages, missing = rapl_counters(root)
    names = _source("RAPL", packages, missing)
    if device.type == "cpu":
        return Meter(packages, names if packages else missing)
    if device.type != "cuda":
        return Meter([], f"no counter is known for a device of the type {device.type}")
    try:
        board = _gpu_counter(device)
    except OSError as error:
        return Meter([], str(error))
    return Meter([board, *packages], f"{board.name} and {names}" if packages else f"{board.name}, without the CPU")


def _source(kind: str, counters: Sequence[Counter], missing: str) -> str:
    names = ", ".join(counter.name.removeprefix(f"{kind} ") for counter in counters)
    return f"{kind} {names}" + (f" ({missing})" if missing else "")


def rapl_counters(root: Path = Path("/")) -> tuple[list[Counter], str]:
    """The counters of the CPU packages and their memory, and as a clause what is missing; "" where nothing is.

    Cores and graphics are parts of a package, and `psys` holds the packages again: none of them is added.
    """
    counters: list[Counter] = []
    faults: list[str] = []
    folder = root / "sys/class/powercap"
    for zone in sorted(folder.glob("intel-rapl:*")):
        try:
            kind = (zone / "name").read_text(encoding="ascii").strip()
        except OSError:
            continue
        if kind != "dram" and not kind.startswith("package"):
            continue
        name = f"RAPL dram {zone.name.split(':')[1]}" if kind == "dram" else f"RAPL {kind.replace('-', ' ')}"
        try:
            read_number(zone / "energy_uj")
        except PermissionError:
            faults.append(f"{name} may not be read; as root: {ALLOW}")
        except OSError as error:
            faults.append(f"{name} cannot be read: {error}")
        else:
            counters.append(Counter(name, _reader(zone / "energy_uj"), _range(zone)))
    if not counters and not faults:
        faults.append(_why_none(root))
    return counters, "; ".join(faults)


def read_number(file: Path) -> int:
    """The number that a file of the kernel holds now."""
    with open(file, "rb", buffering=0) as content:
        text = content.read(32)
    try:
        return int(text)
    except ValueError:
        raise OSError(f"it holds {text!r} instead of a number") from None


def _reader(file: Path) -> Callable[[], int]:
    return lambda: read_number(file)


def _range(zone: Path) -> int | None:
    try:
        return read_number(zone / "max_energy_range_uj")
    except OSError:
        return None


def _why_none(root: Path) -> str:
    try:
        words = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        words = []
    if "hypervisor" in words:
        return "this is a virtual machine, which is shown no RAPL counters"
    return "there are no RAPL counters under /sys/class/powercap: containers hide them, and not every machine has them"


def _gpu_counter(device: torch.device) -> Counter:
    """The board's counter; OSError with the reason where it cannot be read."""
    import torch

    if torch.version.hip is not None:
        raise OSError("of AMD's GPUs no counter is read")
    properties = torch.cuda.get_device_properties(device)
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError as error:
        raise OSError(f"NVML cannot be loaded: {error}") from None
    # By its own id: NVML numbers all boards, torch those that CUDA_VISIBLE_DEVICES leaves.
    return nvml_counter(library, f"GPU-{properties.uuid}", properties.name)


def nvml_counter(library: ctypes.CDLL, uuid: str, name: str) -> Counter:
    """The counter of the board with this id, which NVML keeps in millijoules in 64 bits.

    Raises:
        OSError: NVML cannot read it, with NVML's reason.
    """

    def call(function: str, *arguments: object) -> None:
        try:
            code = getattr(library, function)(*arguments)
        except AttributeError:
            raise OSError(f"NVML: this driver has no {function}") from None
        if code != 0:
            library.nvmlErrorString.restype = ctypes.c_char_p
            raise OSError(f"NVML: {function}: {library.nvmlErrorString(code).decode()}")

    handle, total = ctypes.c_void_p(), ctypes.c_ulonglong()
    call("nvmlInit_v2")
    call("nvmlDeviceGetHandleByUUID", uuid.encode(), ctypes.byref(handle))

    def read() -> int:
        call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(total))
        return total.value * 1000

    read()
    return Counter(f"NVML {name}", read)
