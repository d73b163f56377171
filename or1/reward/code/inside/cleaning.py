"""Leaves nothing of one test to the next: no process, no file. Joined behind wire.py, for the runner."""

from __future__ import annotations

import os
import signal
import time

SCRATCH = ("/tmp", "/dev/shm")
END_LIMIT_S = 5.0


def own_processes(outside):
    """Return whether this process sees only those of its sandbox. outside: the grader's process namespace."""
    try:
        return os.getpid() < 10 and os.readlink("/proc/self/ns/pid") != outside
    except OSError:
        return False


def end_all_others():
    """Kill every process of the sandbox but this one and process 1. Raises OSError if some do not end.

    Only for a process that `own_processes` holds for: elsewhere kill(-1) would reach the whole machine.
    """
    deadline = time.monotonic() + END_LIMIT_S
    while True:
        try:
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            return
        # Process 1 reaps them; until then they count, and so do those that were forked meanwhile.
        if time.monotonic() > deadline:
            raise OSError("processes of the program do not end")
        time.sleep(0.0005)


def empty_scratch(shown):
    """Remove all files that a test has left in the private folders, however deep. Raises OSError.

    shown  paths of the host in the sandbox; they and the folders that lead to them stay, wherever they are
    """
    for top in SCRATCH:
        if os.stat(top).st_uid == os.getuid():  # the program may have closed its own folder
            os.chmod(top, 0o1777)
        # A name that no program can have taken before.
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
                    # Moved up, since a chain of folders may be longer than any path.
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
