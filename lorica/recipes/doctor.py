"""`lorica doctor`: what this machine offers, what is missing, and what to do about it.

Every line is looked up, not guessed: packages in the installation's metadata, CPU features from torch, memory under the
container's limit, the compilers by compiling. It gives up importing the packages (transformers alone takes seconds):
one that is installed and broken shows only when it is used.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from lorica import __version__
from lorica.recipes import console
from lorica.training.energy import meter_of

# The lower bounds of pyproject.toml, by distribution; a test compares the two.
REQUIRED = {
    "torch": "2.9",
    "transformers": "5.23",
    "safetensors": "0.5",
    "tokenizers": "0.21",
    "pydantic": "2.7",
    "PyYAML": "6.0",
    "typer": "0.15",
    "rich": "13",
    "numpy": "1.26",
    "sacrebleu": "2.4",
    "rouge-score": "0.1.2",
    "matplotlib": "3.8",
    "jinja2": "3.1.6",
    "scikit-learn": "1.6",
}
OPTIONAL = {
    "pyarrow": "reads Parquet files: pip install 'lorica[hub]'",
    "datasets": "reads data sets by their hub id: pip install 'lorica[hub]'",
    "tensorboard": "training curves in TensorBoard, beside metrics.jsonl: pip install tensorboard",
}

LITTLE_MEMORY_BYTES = 2 << 30
LITTLE_DISK_BYTES = 5 << 30

_PROGRAM = "#include <omp.h>\nint threads(void) { return omp_get_max_threads(); }\n"

Status = Literal["ok", "warn", "missing"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `advice` is empty where nothing needs doing."""

    name: str
    status: Status
    value: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """`ok` is False when something required is missing."""

    ok: bool
    checks: list[Check]


def doctor() -> Diagnosis:
    """Look at the machine and print what is there."""
    checks = [_python(), Check("lorica", "ok", __version__), *_packages()]
    has_torch = not any(check.name == "torch" and check.status == "missing" for check in checks)
    if has_torch:
        checks += [_cpu(), _gpu(), _energy()]
    checks += [_memory(), _disk(), compiler()]
    if has_torch:
        checks.append(_pool())
    diagnosis = Diagnosis(not any(check.status == "missing" for check in checks), checks)
    # Plain lines, so that this works where rich is what is missing.
    for check in checks:
        print(f"{check.status:8} {check.name:13} {check.value}{f' -> {check.advice}' if check.advice else ''}")
    print("Everything required is here." if diagnosis.ok else "Something required is missing, see above.")
    return diagnosis


def _python() -> Check:
    return Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _packages() -> list[Check]:
    checks = []
    for name, least in REQUIRED.items():
        version = installed_version(name)
        if version is None:
            checks.append(Check(name, "missing", "not installed", f"pip install '{name}>={least}'"))
        elif release(version) < release(least):
            advice = f"{least} or newer is required: pip install -U '{name}>={least}'"
            checks.append(Check(name, "missing", version, advice))
        else:
            checks.append(Check(name, "ok", version))
    for name, use in OPTIONAL.items():
        version = installed_version(name)
        checks.append(Check(name, "ok" if version else "warn", version or "not installed", "" if version else use))
    return checks


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _cpu() -> Check:
    import torch

    features = {
        "AVX2": torch.cpu._is_avx2_supported(),
        "AVX-512": torch.cpu._is_avx512_supported(),
        "AVX-512 bf16": torch.cpu._is_avx512_bf16_supported(),
        "AMX": torch.cpu._is_amx_tile_supported(),
    }
    fast_bfloat16 = bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    found = [name for name, there in features.items() if there] or [torch.backends.cpu.get_cpu_capability()]
    value = f"{', '.join(found)}; torch uses {torch.get_num_threads()} of {os.cpu_count()} CPUs"
    if not fast_bfloat16:
        value += "; no bfloat16 arithmetic, so products of bfloat16 are computed in float32"
    return Check("cpu", "ok", value)


def _gpu() -> Check:
    import torch

    if not torch.cuda.is_available():
        return Check("gpu", "ok", "none that torch can use; the CPU will compute")
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name} ({console.human_bytes(properties.total_memory)})")
    return Check("gpu", "ok", ", ".join(names))


def _energy() -> Check:
    """Whether a run here can say what it draws, on the device that it would take."""
    import torch

    meter = meter_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if meter.total.joules is None:
        return Check("energy", "warn", f"not readable: {meter.source}", "runs report time and tokens, and no joules")
    return Check("energy", "ok", meter.source)


def _pool() -> Check:
    """The C++ part, `kernels/pool.py`: built here, once a machine."""
    from lorica.kernels.pool import has_pool

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if has_pool():
            return Check("memory pool", "ok", "built for this machine")
    reason = str(caught[-1].message) if caught else "not on this system, or LORICA_KERNELS turns it off"
    advice = "training runs without it, slower and with more memory"
    return Check("memory pool", "warn", reason.splitlines()[0], advice)


def _memory() -> Check:
    available = available_memory_bytes()
    if available is None:
        return Check("memory", "warn", "unknown on this system", "`lorica plan` still predicts what a run needs")
    advice = (
        "little is free; `lorica plan run.yaml --memory ...` says what fits" if available < LITTLE_MEMORY_BYTES else ""
    )
    return Check("memory", "warn" if advice else "ok", f"{console.human_bytes(available)} available", advice)


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Main memory this process may still take: the kernel's estimate or what its control group leaves, the smaller.

    `root` is where proc/ and sys/ are. None where the system says neither.
    """
    kernel = _numbers(root / "proc/meminfo").get("MemAvailable:")
    group = root / "sys/fs/cgroup"
    rooms = [] if kernel is None else [kernel * 1024]
    for folder, limit_name, usage_name, cache in (
        (group, "memory.max", "memory.current", "inactive_file"),
        (group / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None:
            # The kernel takes cached file pages back before it refuses memory.
            rooms.append(max(0, limit - usage + _numbers(folder / "memory.stat").get(cache, 0)))
    return min(rooms, default=None)


def _number(file: Path) -> int | None:
    return next((int(word) for word in _words(file) if word.isdigit()), None)


def _numbers(file: Path) -> dict[str, int]:
    words = _words(file)
    return {name: int(value) for name, value in itertools.pairwise(words) if value.isdigit()}


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    advice = "checkpoints and a merged model may not fit here; set train.output" if free < LITTLE_DISK_BYTES else ""
    return Check("disk", "warn" if advice else "ok", f"{console.human_bytes(free)} free in {Path.cwd()}", advice)


def compiler() -> Check:
    """The C compiler, proved by building a library with OpenMP. Without one the PyTorch reference serves."""
    advice = "kernels run as plain PyTorch, slower; install one, as in: apt install gcc"
    name = next(
        (name for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name and shutil.which(name)), None
    )
    if name is None:
        return Check("c compiler", "warn", "none", advice)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(_PROGRAM)
        command = [name, "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-o", str(source.with_suffix(".so"))]
        try:
            result = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Check("c compiler", "warn", f"{name} cannot run: {error}", advice)
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[0]
        return Check("c compiler", "warn", f"{name} cannot build with OpenMP: {reason}", advice)
    return Check("c compiler", "ok", f"{shutil.which(name)}, builds with OpenMP")
