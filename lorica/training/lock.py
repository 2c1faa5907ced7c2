"""One process a run folder: an advisory lock that dies with its holder.

`flock` belongs to the open file, so the kernel frees it however the process ends, SIGKILL included: no stale lock to
delete by hand. The file stays behind in a folder that holds a run; what it says only helps the message. A folder in
which nothing came of the run is left as it was found. Gives up: file systems without flock.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from itertools import takewhile
from pathlib import Path
from types import TracebackType

from lorica.errors import ConfigError, RunLockedError


class RunLock:
    """Context manager that holds `folder/lock`, creating the folder.

    On exit, what it has created itself goes again if nothing else was put there.

    Raises on entry:
        RunLockedError: a living process holds it; names its process id and host.
        ConfigError: the folder cannot be created, written or locked.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self._descriptor = -1
        self._created: list[Path] = []

    def __enter__(self) -> RunLock:
        while True:
            self._open()
            if self._is_named():
                break
            # Its holder removed the file, and perhaps the folder, between our opening it and locking it.
            os.close(self._descriptor)
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.ftruncate(self._descriptor, 0)
        # It fails where another process has put something there meanwhile, or nothing is there any more.
        with contextlib.suppress(OSError):
            self._leave_as_found()
        os.close(self._descriptor)

    def _open(self) -> None:
        """Create and lock the file; whether it still bears its name is for the caller to see."""
        folder = self.path.parent
        try:
            # The deepest first, as they are removed.
            self._created = list(takewhile(lambda path: not path.exists(), (self.path, folder, *folder.parents)))
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"Cannot write in the run folder {folder}: {error.strerror}. Free it or choose another train.output."
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = self._holder()
            os.close(self._descriptor)
            raise RunLockedError(
                f"{folder} is in use by {holder}. Wait for it, stop it, or choose another train.output."
            ) from error
        except OSError as error:
            os.close(self._descriptor)
            raise ConfigError(
                f"{folder} cannot be locked: {error.strerror}. Choose a train.output on a file system with locks."
            ) from error

    def _is_named(self) -> bool:
        """Whether the locked file is the one at `path`."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _leave_as_found(self) -> None:
        if self._created and os.listdir(self.path.parent) == [self.path.name]:
            # While it is locked: whoever has opened it by now finds it locked, or without its name.
            self.path.unlink()
            for folder in self._created[1:]:
                folder.rmdir()

    def _holder(self) -> str:
        try:
            saved = json.loads(os.pread(self._descriptor, 4096, 0))
            return f"process {saved['pid']} on {saved['host']}"
        except (ValueError, KeyError, TypeError):
            return "another process"
