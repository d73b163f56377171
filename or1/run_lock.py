"""One `or1 train` per run directory: two would overwrite each other's metrics and checkpoints."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pwd
import socket
import tempfile
from pathlib import Path
from typing import TextIO

from or1.files import without_links
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

        Raises RunError if another process has it, the file may not be written, or the folder belongs to another user;
        OSError if the disk is full.
        """
        self.close()
        _require_own_folder(self._path.parent)
        if not make and not self._path.exists():
            return
        try:
            file = open(self._path, "a+", encoding="utf-8", opener=without_links)  # noqa: SIM115 - kept open
        except PermissionError as error:
            raise RunError(f"{self._path} cannot be written ({error}); start as the user who began the run, or choose "
                           "another folder with --set run_dir=...") from error
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise RunError(str(error)) from error
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


def _require_own_folder(folder: Path) -> None:
    """Raise RunError for a folder of another user, who could put links there to files of yours, or change the run.

    A folder of root's passes: root needs no tricks, and containers and shared disks have many such. Root itself gets no
    exception, since it has the most to lose; `chown` says that a folder may be used.
    """
    try:
        if not folder.is_dir():
            return
        owner = folder.stat().st_uid
        if owner in (os.geteuid(), 0):
            return
        # Some network file systems show all files as those of one user: then a new one has that owner as well.
        with tempfile.TemporaryFile(dir=folder) as made:
            if os.fstat(made.fileno()).st_uid == owner:
                return
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"{folder} cannot be written ({error}); start as the user who began the run, or choose another "
                       "folder with --set run_dir=...") from error
    raise RunError(f"{folder} belongs to another user ({_name_of(owner)}), who could change the run or lead its files "
                   "elsewhere; choose a folder of your own with --set run_dir=..., make one inside this one, or make "
                   "this one yours with chown")


def _name_of(user: int) -> str:
    try:
        return f"{pwd.getpwuid(user).pw_name}, id {user}"
    except KeyError:
        return f"id {user}"
