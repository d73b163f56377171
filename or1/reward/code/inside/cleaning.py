"""Removal of all processes and files of one test before the next. Part of the runner's script, after wire.py."""

from __future__ import annotations

import os
import signal
import time

SCRATCH = ("/tmp", "/dev/shm")
END_LIMIT_S = 5.0


def own_processes(outside):
    """Return whether this process has its own process namespace. outside: the grader's process namespace."""
    try:
        return os.getpid() < 10 and os.readlink("/proc/self/ns/pid") != outside
    except OSError:
        return False


def end_all_others():
    """Kill every process of the sandbox except this one and process 1. Raises OSError if a process does not end.

    Call this only if `own_processes` is True: elsewhere kill(-1) reaches the whole machine.
    """
    deadline = time.monotonic() + END_LIMIT_S
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            return
        # Dead processes count until process 1 reaps them, and new ones may have been forked meanwhile.
        if time.monotonic() > deadline:
            raise OSError("processes of the program do not end")
        time.sleep(0.0005)


def empty_scratch(shown):
    """Remove all files of a test from the private folders, at any depth. Raises OSError.

    shown  paths of the host in the sandbox; these paths and their parent folders are kept
    """
    for top in SCRATCH:
        if os.stat(top).st_uid == os.getuid():  # the program may have removed its own permissions
            os.chmod(top, 0o1777)
        # A random name, so that no program can create it first.
        folders, count, prefix = [], 0, os.path.join(top, f".{os.urandom(16).hex()}-")
        waiting = [top]
        while waiting:
            folder = waiting.pop()
            for name in os.listdir(folder):
                path = os.path.join(folder, name)
                if path in shown:
                    continue
                if any(each.startswith(path + "/") for each in shown):
                    waiting.append(path)
                else:
                    _remove(path, folders)
        while folders:
            folder = folders.pop()
            os.chmod(folder, 0o700)
            for name in os.listdir(folder):
                path = os.path.join(folder, name)
                if os.path.isdir(path) and not os.path.islink(path):
                    # Moved to the top, since a chain of folders may exceed the longest possible path.
                    os.chmod(path, 0o700)
                    count += 1
                    os.rename(path, f"{prefix}{count}")
                    path = f"{prefix}{count}"
                _remove(path, folders)
            os.rmdir(folder)


def _remove(path, folders):
    if os.path.isdir(path) and not os.path.islink(path):
        folders.append(path)
    else:
        os.unlink(path)
