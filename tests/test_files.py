"""Folders and files that are whole or not there, whenever the process is killed or the file system refuses."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica.files import MAX_JSON_BYTES, read_json_object, sha256, whole_folder, write_json, write_text


def fill(target: Path, text: str) -> None:
    with whole_folder(target) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "inside").mkdir()
        (folder / "inside" / "b.txt").write_text(text)


def content(target: Path) -> dict[str, str]:
    return {str(f.relative_to(target)): f.read_text() for f in sorted(target.rglob("*")) if f.is_file()}


def whole(text: str) -> dict[str, str]:
    return {"a.txt": text, "inside/b.txt": text}


def test_what_was_filled_is_there_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path / "deep" / "target", "new")
    assert content(tmp_path) == {f"deep/target/{name}": text for name, text in whole("new").items()}


def test_what_was_there_is_replaced_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "old.txt").write_text("old")
    fill(tmp_path / "target", "new")
    assert content(tmp_path / "target") == whole("new")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_relative_target_survives_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with whole_folder(Path("target")) as folder:
        (folder / "a.txt").write_text("new")
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert content(tmp_path / "target") == {"a.txt": "new"}


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("fault", [ValueError("mine"), KeyboardInterrupt()])
def test_an_exception_inside_changes_nothing(tmp_path: Path, before: str | None, fault: BaseException) -> None:
    target = tmp_path / "target"
    if before is not None:
        fill(target, before)
    with pytest.raises(type(fault)), whole_folder(target) as folder:
        (folder / "a.txt").write_text("half")
        raise fault
    assert content(tmp_path) == ({} if before is None else {f"target/{n}": t for n, t in whole(before).items()})


def each_call(patch: pytest.MonkeyPatch, act: Callable[[int], None]) -> None:
    """Call `act(n)` before the n-th operation that `whole_folder` does on the file system, counted from 0."""
    count = iter(range(10_000))

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            act(next(count))
            return original(*arguments, **options)

        patch.setattr(owner, name, wrapped)

    for owner, names in {os: ("rename", "fsync", "unlink", "rmdir"), Path: ("mkdir",)}.items():
        for name in names:
            wrap(owner, name)


def test_refused_at_any_operation_the_old_folder_or_the_new_one_is_there(tmp_path: Path) -> None:
    """Every rename, flush and deletion may fail: a full disk, a lost mount."""
    outcomes = []
    for fatal in range(10_000):
        target, calls = tmp_path / str(fatal) / "target", []
        fill(target, "old")

        def refuse(count: int, fatal: int = fatal, calls: list[int] = calls) -> None:
            calls.append(count)
            if count == fatal:
                raise OSError(5, "Input/output error")

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(OSError):
            each_call(patch, refuse)
            fill(target, "new")
        outcomes.append(content(target))
        # The next use is undisturbed by what was left.
        fill(target, "next")
        assert content(target.parent) == {f"target/{name}": text for name, text in whole("next").items()}
        if len(calls) <= fatal:
            break
    assert all(found in (whole("old"), whole("new")) for found in outcomes)
    # Refused before the second rename it is the old one; what comes after is only clean-up.
    first = outcomes.index(whole("new"))
    assert 5 < first < len(outcomes) and outcomes[first:] == [whole("new")] * (len(outcomes) - first)


def test_killed_at_any_operation_the_old_folder_or_the_new_one_is_there(tmp_path: Path) -> None:
    """A kill between the two renames leaves no folder of the name; the next use puts the old one back."""
    gaps = 0
    for fatal in range(10_000):
        target = tmp_path / str(fatal) / "target"
        fill(target, "old")

        pid = os.fork()
        if pid == 0:
            each_call(
                pytest.MonkeyPatch(),
                lambda count, fatal=fatal: os.kill(os.getpid(), signal.SIGKILL) if count == fatal else None,
            )
            fill(target, "new")
            os._exit(0)
        finished = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        if not target.exists():
            gaps += 1
            with pytest.raises(ValueError, match="not now"), whole_folder(target):
                raise ValueError("not now")
            assert content(target) == whole("old")
        assert content(target) in (whole("old"), whole("new"))
        fill(target, "next")
        assert content(target.parent) == {f"target/{name}": text for name, text in whole("next").items()}
        if finished:
            break
    assert gaps == 1


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "write_text")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(OSError, match="No space left"):
                write_text(file, "new")
        assert content(tmp_path) == {"a.txt": "old"}
    write_text(file, "新しい\n")
    assert file.read_bytes() == "新しい\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_json_round_trip_and_its_limits(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": [1, 2.5, None, "é"]})
    assert read_json_object(file) == {"a": [1, 2.5, None, "é"]} and "é" in file.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"a": float("nan")})
    assert read_json_object(file) == {"a": [1, 2.5, None, "é"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "expected a JSON object, found list"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("\udc80", ""),
    ],
)
def test_json_that_is_no_object_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"bad\.json.*{says}"):
        read_json_object(file)


def test_json_of_any_size_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "big.json"
    with file.open("wb") as stream:
        stream.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match=r"big\.json has 16,777,217 bytes; at most 16,777,216"):
        read_json_object(file)


def test_sha256_of_known_texts(tmp_path: Path) -> None:
    """The examples of FIPS 180-4: the empty message and "abc"."""
    for text, digest in (("", "e3b0c44298fc1c149afbf4c8996fb924"), ("abc", "ba7816bf8f01cfea414140de5dae2223")):
        (tmp_path / "file").write_text(text)
        assert sha256(tmp_path / "file").startswith(digest)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "target").symlink_to(tmp_path / "large disk")
    for text in ("old", "new"):
        fill(tmp_path / "target", text)
        assert content(tmp_path / "large disk") == whole(text)
    assert (tmp_path / "target").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large disk", "target"]
