"""Compile a source file of this package at its first use, with the compiler that the system has.

The library lands in the user's cache under a name made of all that it depends on: source, compiler, flags, processor
and torch. So it is built once a machine, and never used where it does not belong. Without a compiler, or where the
build fails, there is one warning and the caller goes on without: nothing in Lorica needs a compiler to be right.

`LORICA_KERNELS=reference` turns every compiled part off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent / "csrc"

FLAGS = ("-march=native", "-fopenmp", "-ffp-contract=fast", "-lm")
"""For kernels whose roundings nobody compares bit by bit."""
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""As csrc/numbers.h numbers them."""

_COMPILERS = {".c": ("CC", "cc"), ".cpp": ("CXX", "c++")}


@cache
def library(source: str, flags: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """The shared library of `csrc/<source>`, built if it is not in the cache; None where that cannot be."""
    if os.environ.get("LORICA_KERNELS") == "reference":
        return None
    path = _SOURCES / source
    try:
        return ctypes.CDLL(str(_built(path, flags)))
    except FileNotFoundError as error:
        _warn(f"the compiled parts cannot be built: {error}")
    except (OSError, subprocess.SubprocessError) as error:
        _warn(f"{source} cannot be built: {_first_line(error)}")
    return None


@cache
def _warn(fault: str) -> None:
    """Once for each fault: without a compiler, for all sources together."""
    warnings.warn(
        f"{fault}. Lorica goes on without: right as ever, but slower and with more memory. A C and C++ compiler "
        "(Debian: apt install gcc g++) is all it needs.",
        RuntimeWarning,
        stacklevel=3,
    )


def cache_folder() -> Path:
    """Where compiled libraries are kept: `lorica/kernels` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "lorica" / "kernels"


def _built(path: Path, flags: Sequence[str]) -> Path:
    variable, default = _COMPILERS[path.suffix]
    compiler = shlex.split(os.environ.get(variable, "")) or [default]
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError("cc or c++ is missing" if compiler == [default] else f"there is no {compiler[0]}")
    command = [*compiler, "-O3", "-fPIC", "-shared", str(path), *flags]
    texts = [file.read_text() for file in (path, *sorted(path.parent.glob("*.h")))]
    key = hashlib.sha256("\0".join([*texts, _version(*compiler), *command[:-1], *flags, _processor()]).encode())
    target = cache_folder() / f"{path.stem}-{key.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        # Another process may build the same: each writes its own file, and the last rename wins.
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=True, timeout=300)
            os.replace(made, target)
    return target


@cache
def _version(*compiler: str) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout


@cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _first_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    return next((line for line in text.splitlines() if "error" in line), text.splitlines()[0] if text else repr(error))
