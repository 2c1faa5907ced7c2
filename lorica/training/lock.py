"""One process a run folder: an advisory lock that dies with its holder.

`flock` belongs to the open file, so the kernel frees it however the process ends, SIGKILL included: no stale lock to
delete by hand. The file stays behind; what it says only helps the message. Gives up: file systems without flock.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from types import TracebackType

from lorica.errors import ConfigError, RunLockedError


class RunLock:
    """Context manager that holds `folder/lock`, creating the folder.

    Raises on entry:
        RunLockedError: a living process holds it; names its process id and host.
        ConfigError: the folder cannot be created or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self._descriptor = -1

    def __enter__(self) -> RunLock:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"Cannot write in the run folder {self.path.parent}: {error.strerror}. "
                "Free it or choose another train.output."
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder()
            os.close(self._descriptor)
            raise RunLockedError(
                f"{self.path.parent} is in use by {holder}. Wait for it, stop it, or choose another train.output."
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not unlinked: another process may already wait on this very file, and would lock a name that is gone.
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def _holder(self) -> str:
        try:
            saved = json.loads(os.pread(self._descriptor, 4096, 0))
            return f"process {saved['pid']} on {saved['host']}"
        except (ValueError, KeyError, TypeError):
            return "another process"
