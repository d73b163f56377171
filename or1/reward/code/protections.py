"""The protections of a sandbox, and a probe program that tests each of them from inside."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

PROTECTIONS = {
    "user": "programs run as a separate user, never as root",
    "files": "files of the host cannot be seen",
    "system": "the system's files cannot be written",
    "network": "there is no network",
    "processes": "other processes cannot be seen",
    "count": "the number of processes is limited",
    "runner": "the memory of the program's grader cannot be accessed",
    "settings": "settings of the kernel cannot be written",
    "calls": "system calls that bypass the sandbox are denied",
    "cleaning": "processes and files of one test are removed before the next one",
}
"""Name -> description for users. All of them hold in a sandbox that `find_sandbox` selects."""
FILTERED_MACHINES = ("x86_64", "aarch64")
"""Machine types whose system call numbers inside/guard.py contains. On others "calls" cannot hold and is optional."""


def failures(answer: Mapping[str, Any], alone: bool) -> dict[str, str]:
    """Return name -> cause for each missing protection.

    answer  the runner's answer to PROBE
    alone   whether the runner has its own process namespace, and so may clean up after each test
    """
    try:
        found = json.loads(answer["stdout"])
    except (KeyError, ValueError):
        return {"user": str(answer.get("stderr") or answer)[-300:]}
    missing = {name: why for name, why in found.items() if why}
    if not alone:
        missing["cleaning"] = "the sandbox has no process namespace of its own"
    return missing


def is_required(name: str) -> bool:
    """Return whether every usable sandbox must have this protection."""
    return name != "calls" or os.uname().machine in FILTERED_MACHINES


# Prints JSON: name of a protection -> "" if it holds, else the cause.
PROBE = r"""
import ctypes, errno, json, os, socket

libc = ctypes.CDLL(None, use_errno=True)
found = {}

def check(name):
    def run(function):
        try:
            found[name] = function() or ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return run

def writes(path):
    try:
        os.close(os.open(path, os.O_WRONLY))
    except OSError:
        return False
    return True

@check("user")
def _():
    if os.getuid() == 0 or os.geteuid() == 0:
        return "runs as root"

@check("files")
def _():
    if os.path.exists("/etc/passwd"):
        return "sees the files of the host"
    for path in ("/root", "/home", "/var"):
        if os.path.exists(path) and os.access(path, os.W_OK):
            return path + " is writable"

@check("system")
def _():
    for path in ("/usr/or1-probe", "/or1-probe", "/dev/or1-probe"):
        try:
            open(path, "w")
        except OSError:
            continue
        return "can write " + path

@check("network")
def _():
    if len(socket.if_nameindex()) > 1:
        return "sees the network"

@check("processes")
def _():
    if len([name for name in os.listdir("/proc") if name.isdigit()]) > 5:
        return "sees other processes"

@check("settings")
def _():
    for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/vm/overcommit_memory", "/proc/sysrq-trigger"):
        if writes(path):
            return "can write " + path

@check("runner")
def _():
    for path in (f"/proc/{os.getppid()}/mem", "/proc/1/mem"):
        if writes(path):
            return "can write " + path
    if os.path.exists(f"/proc/{os.getppid()}/fd/0"):
        return "sees the descriptors of its parent"

@check("calls")
def _():
    tried = {
        "memfd_create": lambda: os.memfd_create("x"),
        "vsock": lambda: socket.socket(40, socket.SOCK_STREAM),
        "shmget": lambda: libc.shmget(0, 4096, 0o1600),
        "unshare": lambda: libc.unshare(0x10000000),
        "ptrace": lambda: libc.ptrace(16, 1, None, None),
        "keyrings": lambda: libc.syscall({"x86_64": 250, "aarch64": 219}.get(os.uname().machine, -1), 0, -4, 1),
    }
    wanted = (errno.EPERM, errno.EAFNOSUPPORT)
    for name, call in tried.items():
        try:
            done, number = call() != -1, ctypes.get_errno()
        except OSError as error:
            done, number = False, error.errno
        if done or number not in wanted:
            return f"{name} is not refused"

@check("count")
def _():
    children = []
    try:
        while len(children) < 40:
            children.append(os.fork())
            if children[-1] == 0:
                os.read(os.pipe()[0], 1)
    except OSError:
        pass
    for child in children:
        os.kill(child, 9)
    if len(children) >= 40:
        return "can start any number of processes"

open("/tmp/probe", "w").write("x")
print(json.dumps(found))
"""
