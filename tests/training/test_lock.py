from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

import pytest

from lorica.errors import ConfigError, RunLockedError
from lorica.training.lock import RunLock

from .conftest import in_child, kill_self


def test_a_second_process_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(RunLockedError, match=f"process {os.getppid()} on "), RunLock(tmp_path):
            pass

    with RunLock(tmp_path):
        assert in_child(second) == 0
    with RunLock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    def holder() -> None:
        RunLock(tmp_path).__enter__()
        kill_self()

    assert in_child(holder) == -9
    assert "pid" in (tmp_path / "lock").read_text()
    with RunLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_the_lock_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLock(tmp_path):
        raise KeyError
    with RunLock(tmp_path):
        pass


def test_what_the_lock_created_goes_if_nothing_came_of_it(tmp_path: Path) -> None:
    with RunLock(tmp_path / "runs" / "first"):
        assert (tmp_path / "runs" / "first" / "lock").exists()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    with pytest.raises(KeyError), RunLock(tmp_path / "runs" / "first"):
        raise KeyError
    assert [path.name for path in tmp_path.rglob("*")] == ["runs"]
    with RunLock(tmp_path / "runs"):
        (tmp_path / "runs" / "metrics.jsonl").touch()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["lock", "metrics.jsonl"]
    assert (tmp_path / "runs" / "lock").read_text() == ""
    (tmp_path / "runs" / "metrics.jsonl").unlink()
    with RunLock(tmp_path / "runs"):
        pass
    assert (tmp_path / "runs" / "lock").exists(), "it was there before"


def test_a_lock_whose_file_is_removed_while_it_is_taken_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its holder has left, and taken the folder along, between the opening of the file and its locking."""
    lock_file, calls = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            shutil.rmtree(tmp_path / "run")
        lock_file(descriptor, how)

    def second() -> None:
        with pytest.raises(RunLockedError), RunLock(tmp_path / "run"):
            pass

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(tmp_path / "run"):
        assert len(calls) == 2 and in_child(second) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run.*train\.output"), RunLock(tmp_path / "file" / "run"):
        pass


def test_a_file_system_without_locks_is_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError, match="cannot be locked: No locks available"), RunLock(tmp_path):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"), RunLock(tmp_path):
        pass
