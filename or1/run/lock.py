"""Lock of a run directory: two `or1 train` processes there would overwrite each other's metrics and checkpoints."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pwd
import socket
import tempfile
from pathlib import Path
from typing import TextIO

from or1.core.errors import RunError
from or1.core.files import without_links

LOCK = ".lock"


class RunLock:
    """Exclusive lock of a run directory. The kernel releases the lock when the process ends, however it ends."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / LOCK
        self._file: TextIO | None = None
        self.warnings: list[str] = []

    def take(self, make: bool) -> None:
        """Lock the folder as it is now, after releasing a lock taken before.

        make  create the lock file if it is missing. False: skip a folder without one, since no run can be at work there

        Raises RunError if another process holds the lock, the file cannot be written, or the folder belongs to another
        user; OSError if the disk is full. On a file system without locks, the holder recorded in the file decides, and
        `warnings` has a line about that.
        """
        self.close()
        _require_own_folder(self._path.parent)
        if not make and not self._path.exists():
            return
        try:
            file = open(self._path, "a+", encoding="utf-8", opener=without_links)  # noqa: SIM115 - kept open
        except PermissionError as error:
            raise RunError(
                f"{self._path} cannot be written ({error}); start as the user who began the run, or choose "
                "another folder with --set run_dir=..."
            ) from error
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.EISDIR):
                raise
            a_folder = f"{self._path} is a folder, and a run keeps a file there; remove or rename it"
            raise RunError(str(error) if error.errno == errno.ELOOP else a_folder) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise self._held(holder) from None
        except OSError as error:
            # For example a network file system that was mounted without locks.
            self._without_locks(file, error)
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        file.flush()
        self._file = file

    def _held(self, holder: str) -> RunError:
        return RunError(
            f"{self._path.parent} is the folder of a run that is at work ({holder}); wait for it, stop it, or "
            "choose another folder with --set run_dir=... If that process no longer exists, as after the loss of a "
            f"node, remove {self._path}; never remove it while a run is at work"
        )

    def _without_locks(self, file: TextIO, error: OSError) -> None:
        """Decide by the holder recorded in the file. Raises RunError if it is a living process of this machine."""
        file.seek(0)
        text = file.read().strip()
        try:
            holder = json.loads(text)
            host, pid = str(holder["host"]), int(holder["pid"])
        except (ValueError, TypeError, LookupError, RecursionError):
            host, pid = "", 0
        # A released lock file is empty. A process that was killed leaves its id, which a process younger than the file
        # may have by now.
        if host == socket.gethostname() and pid != os.getpid() and _lived_at(pid, os.fstat(file.fileno()).st_mtime):
            file.close()
            raise self._held(text)
        other = text and host != socket.gethostname()
        elsewhere = f"; {self._path} names a process of another machine ({text})" if other else ""
        warning = (
            f"the file system of {self._path.parent} has no locks ({error.strerror}), so a second `or1 train` in "
            f"that folder would go unnoticed{elsewhere}; start one at a time"
        )
        self.warnings = [warning]

    def close(self) -> None:
        """Release the lock; no-op if it is not held."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(0)
            self._file.close()
            self._file = None


def _lived_at(pid: int, when: float) -> bool:
    """Return True if process `pid` exists and started before `when` (seconds since 1970; ignored without /proc)."""
    if pid <= 0:
        return False
    try:
        about = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        # Field 22 is the start time. The program's name in field 2 may contain spaces and parentheses.
        ticks = int(about.rpartition(")")[2].split()[19])
        booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        # Two seconds of tolerance, since both clocks are rounded to the second.
        return int(booted.split()[1]) + ticks / os.sysconf("SC_CLK_TCK") < when + 2
    except FileNotFoundError:
        if Path("/proc/self").exists():
            return False
    except (OSError, ValueError, LookupError, StopIteration):
        pass
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def _require_own_folder(folder: Path) -> None:
    """Raise RunError for a folder of another user, who could place links there or change the run.

    A folder that root owns passes: root could do either anywhere, and containers and shared disks have many of these.
    For the user root there is no exception, since root has the most to lose; `chown` allows a folder explicitly.
    """
    try:
        if not folder.is_dir():
            return
        owner = folder.stat().st_uid
        if owner in (os.geteuid(), 0):
            return
        # Some network file systems show one owner for all files. A new file then has that owner too.
        with tempfile.TemporaryFile(dir=folder) as made:
            if os.fstat(made.fileno()).st_uid == owner:
                return
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"{folder} cannot be written ({error}); start as the user who began the run, or choose another "
            "folder with --set run_dir=..."
        ) from error
    raise RunError(
        f"{folder} belongs to another user ({_name_of(owner)}), who could change the run or redirect its files; "
        "choose a folder of your own with --set run_dir=..., make one inside this one, or make "
        "this one yours with chown"
    )


def _name_of(user: int) -> str:
    try:
        return f"{pwd.getpwuid(user).pw_name}, id {user}"
    except KeyError:
        return f"id {user}"
