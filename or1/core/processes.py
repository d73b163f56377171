"""Process control: adopt orphans, reap children, and kill every descendant.

A descendant that moved to another session or process group escapes `killpg`, so descendants are found in /proc. On
systems other than Linux the functions do as much as the system allows, without an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
_PAUSE_S = 0.002


def adopt_orphans() -> bool:
    """Become the parent of every descendant whose own parent ends. Return True if the system supports that.

    Without a subreaper, orphans go to process 1, which in a container without `--init` never reaps them.
    """
    return _prctl(_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """End this process, a child of `parent`, when `parent` ends.

    The kernel watches the THREAD that forked. Use this only where the parent has one thread.
    """
    # The parent may have ended before the prctl; getppid catches that, also on systems without prctl.
    _prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


def descendants(root: int) -> list[int]:
    """Return the ids of all living direct and indirect children of `root`; empty on systems without /proc."""
    children: dict[int, list[int]] = {}
    with contextlib.suppress(OSError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{name}/stat", "rb") as file:
                # The program's name, in parentheses, may itself contain spaces and parentheses.
                state, parent = file.read().rpartition(b")")[2].split()[:2]
                if state not in (b"Z", b"X"):
                    children.setdefault(int(parent), []).append(int(name))
    found, waiting = [], [root]
    while waiting:
        new = children.pop(waiting.pop(), [])
        found += new
        waiting += new
    return found


def kill_descendants(root: int, patience_s: float = 2.0) -> set[int]:
    """Kill every descendant of `root` and return their ids. Wait at most `patience_s` seconds until none is alive."""
    killed: set[int] = set()
    end = time.monotonic() + patience_s
    # Repeated, because a descendant may fork between the listing and the kill.
    while (living := descendants(root)) and time.monotonic() < end:
        for pid in living:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        killed.update(living)
        time.sleep(_PAUSE_S)
    return killed


def reap_orphans(but: int | None = None) -> None:
    """Reap children that have ended, except the child `but`, whose exit status its own waitpid needs."""
    if not hasattr(os, "waitid"):
        return
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and found.si_pid != but:
            os.waitpid(found.si_pid, os.WNOHANG)


def has_children() -> bool:
    """Return True if this process has a child, including a zombie. Always True on systems without waitid."""
    if not hasattr(os, "waitid"):
        return True
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
