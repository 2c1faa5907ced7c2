from __future__ import annotations

import os
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


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/run.*train\.output"), RunLock(tmp_path / "file" / "run"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"), RunLock(tmp_path):
        pass
