"""Building at first use: once, beside others, and not at all where there is no compiler."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from lorica.kernels import build

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
SOURCE = "int answer(void) { return %d; }\n"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "answer.c").write_text(SOURCE % 42)
    monkeypatch.setattr(build, "_SOURCES", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("LORICA_KERNELS", raising=False)
    for cached in (build.library, build._warn):
        cached.cache_clear()
    yield folder
    for cached in (build.library, build._warn):
        cached.cache_clear()


def test_a_source_is_built_once_and_again_when_it_changes(sources: Path) -> None:
    assert build.library("answer.c").answer() == 42
    (first,) = build.cache_folder().iterdir()
    stamp = first.stat().st_mtime_ns
    build.library.cache_clear()
    assert build.library("answer.c").answer() == 42 and first.stat().st_mtime_ns == stamp
    (sources / "answer.c").write_text(SOURCE % 43)
    build.library.cache_clear()
    assert build.library("answer.c").answer() == 43
    assert len(list(build.cache_folder().iterdir())) == 2


def test_a_header_that_changes_makes_another_library(sources: Path) -> None:
    (sources / "answer.c").write_text('#include "answer.h"\nint answer(void) { return X; }\n')
    for number in (1, 2):
        (sources / "answer.h").write_text(f"#define X {number}\n")
        build.library.cache_clear()
        assert build.library("answer.c").answer() == number


def test_flags_make_another_library(sources: Path) -> None:
    (sources / "answer.c").write_text("int answer(void) { return X; }\n")
    assert [build.library("answer.c", (f"-DX={n}",)).answer() for n in (1, 2)] == [1, 2]


@pytest.mark.parametrize("fault", ["no compiler", "no C"])
def test_without_a_library_there_is_one_warning(sources: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    if fault == "no compiler":
        monkeypatch.setenv("CC", "no-such-compiler")
    else:
        (sources / "answer.c").write_text("this is no C\n")
    with pytest.warns(RuntimeWarning, match=r"cannot be built: .*(no no-such-compiler|error).*goes on without"):
        assert build.library("answer.c") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert build.library("answer.c") is None


def test_all_sources_together_miss_a_compiler(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.warns(RuntimeWarning, match=r"cc or c\+\+ is missing") as caught:
        assert build.library("answer.c") is build.library("answer.cpp") is None
    assert len(caught) == 1


def test_the_environment_turns_it_off_without_a_word(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORICA_KERNELS", "reference")
    assert build.library("answer.c") is None
    assert not build.cache_folder().exists()


def test_two_processes_may_build_at_once(sources: Path) -> None:
    code = f"from pathlib import Path; from lorica.kernels import build; build._SOURCES = Path({str(sources)!r}); "
    code += "print(build.library('answer.c').answer())"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [child.communicate()[0].strip() for child in running] == ["42", "42"]
    assert len(list(build.cache_folder().iterdir())) == 1


def test_a_library_is_a_ctypes_library(sources: Path) -> None:
    assert isinstance(build.library("answer.c"), ctypes.CDLL)
