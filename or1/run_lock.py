"""One `or1 train` per run directory: two would overwrite each other's metrics and checkpoints."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import TextIO

from or1.run_state import RunError

LOCK = ".lock"


class RunLock:
    """The lock of a run directory. The kernel drops it, however its process ends."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / LOCK
        self._file: TextIO | None = None

    def take(self, make: bool) -> None:
        """Take the lock of the folder as it is now, in place of one taken before.

        make  False: only if a run has locked the folder at some time, since nobody else can be at work in it

        Raises RunError if another process has it or the file may not be written, OSError if the disk is full.
        """
        self.close()
        if not make and not self._path.exists():
            return
        try:
            file = self._path.open("a+", encoding="utf-8")
        except PermissionError as error:
            raise RunError(f"{self._path} cannot be written ({error}); start as the user who began the run, or choose "
                           "another folder with --set run_dir=...") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise RunError(
                f"{self._path.parent} is the folder of a run that is at work ({holder}); wait for it, stop it, or "
                "choose another folder with --set run_dir=... Where there is no such process, as after a node was "
                f"lost, remove {self._path}"
            ) from None
        except OSError:
            pass  # A network file system that was mounted without locks.
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        file.flush()
        self._file = file

    def close(self) -> None:
        """Give it back."""
        if self._file is not None:
            self._file.close()
            self._file = None
