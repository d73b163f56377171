"""Processes that see no network, no file of the host beyond Python itself, no other process and no secret.

Ways to make one, best first; `find_sandbox` takes the first that works on this machine:
  bwrap       bubblewrap; started by root it drops to a user id of its own, else it maps the user to nobody
  namespaces  the same kinds of namespaces and mounts made by `or1.reward.code.inside.launcher`
  none        nothing but resource limits; only if the configuration says so
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from or1.reward.base import ScorerError
from or1.reward.code.inside import wire

START_LIMIT_S = 20.0
"""For a sandbox to come up on a busy machine."""
GRACE_S = 2.0
"""The runner ends a test at its limit by itself; this much later the whole sandbox is killed."""
SCRATCH_BYTES = 64 << 20
"""Size of the private /tmp and of /dev/shm."""

_INSIDE = Path(__file__).with_name("inside")
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/alternatives", "/nix/store")
_POLL_S = 0.05


class SandboxTimeoutError(Exception):
    """No answer within the limit; the sandbox is dead."""


class SandboxDiedError(Exception):
    """The sandbox ended, was ended for its memory, or answered nonsense; it is dead."""


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds of a test, resident memory of all its processes, how many, and size of each output."""

    test_s: float
    cpu_s: float
    memory_bytes: int
    processes: int
    output_bytes: int


def find_sandbox(choice: str) -> str:
    """The kind of sandbox to use for a choice of auto, bwrap, namespaces or none. Raises ScorerError if none works."""
    if choice == "none":
        return choice
    tried = []
    for kind in _KINDS:
        if choice in ("auto", kind.partition("-")[0]):
            problem = _problem(kind)
            if problem is None:
                return kind
            tried.append(f"{kind}: {problem}")
    raise ScorerError(
        f"no sandbox works here, so programs of the policy would run with your rights ({'; '.join(tried)}). Install "
        "bubblewrap (apt-get install bubblewrap), allow unprivileged user namespaces, or, on a machine with nothing "
        'to lose, set reward.code.sandbox = "none"'
    )


def _problem(kind: str) -> str | None:
    """Why a kind of sandbox does not work here."""
    limits = Limits(test_s=10, cpu_s=10, memory_bytes=1 << 30, processes=16, output_bytes=1 << 20)
    try:
        with Inside(kind, "runner", {"program": _PROBE, "setup": ""}, limits) as runner:
            answer = runner.ask({"stdin": str(os.getuid())}, limits.test_s)
    except (OSError, SandboxDiedError, SandboxTimeoutError) as error:
        return str(error)
    return None if answer.get("stdout") == "isolated\n" else answer.get("stderr") or str(answer)


# Fails, saying why, unless what a sandbox promises holds.
_PROBE = """
import os, socket
assert os.getuid() != 0, "runs as root"
for path in ("/root", "/home", "/etc/passwd", "/var"):
    assert not os.path.exists(path) or not os.access(path, os.W_OK), path + " is writable"
assert not os.path.exists("/etc/passwd"), "sees the files of the host"
try:
    open("/usr/or1-probe", "w")
except OSError:
    pass
else:
    raise AssertionError("can write to /usr")
assert len(socket.if_nameindex()) <= 1, "sees the network"
pids = [name for name in os.listdir("/proc") if name.isdigit()]
assert len(pids) < 6, "sees other processes"
open("/tmp/probe", "w").write("x")
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
assert len(children) < 40, "can start any number of processes"
print("isolated")
"""


class Inside:
    """One sandboxed process, "runner" or "checker", and the pipe to it.

    Raises SandboxDiedError or SandboxTimeoutError if it does not come up.
    """

    def __init__(self, kind: str, role: str, order: Mapping[str, Any], limits: Limits):
        self._limits = limits
        self._scratch = tempfile.TemporaryDirectory(prefix="or1-code-") if kind == "none" else None
        uid = _free_uid() if kind in _DROPS_ROOT and os.geteuid() == 0 else 0
        command = [*_wrapper(kind, uid), _python(), "-I", "-S", "-B", "-c", _script(role)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_ENVIRONMENT,
            cwd=self._scratch.name if self._scratch else "/",
            start_new_session=kind == "none",
        )
        # The launcher of "namespaces" has dropped to the user already.
        become = uid if kind == "bwrap-root" else 0
        paths = [entry for entry in sys.path if _is_packages(entry)]
        try:
            self.answer = self.ask(
                {**order, "uid": become, "path": paths, "limits": asdict(limits)}, START_LIMIT_S - GRACE_S
            )
        except (SandboxDiedError, SandboxTimeoutError):
            self.close()
            raise

    def ask(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send one message and return the answer. Raises SandboxTimeoutError or SandboxDiedError."""
        self.tell(message)
        return self.hear(seconds)

    def tell(self, message: Mapping[str, Any]) -> None:
        """Send one message."""
        try:
            wire.send(self._process.stdin.fileno(), message)
        except OSError:
            raise self._death("closed") from None

    def hear(self, seconds: float) -> dict[str, Any]:
        """The next message."""
        deadline = time.monotonic() + seconds + GRACE_S
        size = int.from_bytes(self._read(4, deadline), "big")
        # JSON may write one byte as six.
        if size > 6 * self._limits.output_bytes + 4096:
            raise self._death(f"answered with {size} bytes")
        data = self._read(size, deadline)
        try:
            answer = wire.json.loads(data)
        except (ValueError, RecursionError):
            raise self._death("answered no JSON") from None
        if not isinstance(answer, dict):
            raise self._death("answered no object")
        return answer

    def close(self) -> None:
        """Kill everything in the sandbox. May be called twice."""
        process = self._process
        if process.poll() is None:
            if self._scratch:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, 9)
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()
        if self._scratch:
            with contextlib.suppress(OSError):
                self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, size: int, deadline: float) -> bytes:
        parts = []
        stdout = self._process.stdout.fileno()
        while size:
            left = deadline - time.monotonic()
            if left <= 0:
                self.close()
                raise SandboxTimeoutError
            if not select.select([stdout], [], [], min(left, _POLL_S))[0]:
                if resident_bytes(self._process.pid) > self._limits.memory_bytes:
                    raise self._death(f"took more than {self._limits.memory_bytes >> 20} MiB of memory")
                continue
            part = os.read(stdout, min(size, 1 << 20))
            if not part:
                raise self._death("ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _death(self, why: str) -> SandboxDiedError:
        self._process.kill()
        last = ""
        with contextlib.suppress(OSError, ValueError):
            os.set_blocking(self._process.stderr.fileno(), False)
            last = (self._process.stderr.read(2000) or b"").decode("utf-8", "replace").strip()
        self.close()
        return SandboxDiedError(f"{why}: {last}" if last else why)


def resident_bytes(pid: int) -> int:
    """Memory held by a process and all its descendants, as far as /proc tells."""
    total, waiting = 0, [pid]
    while waiting:
        process = waiting.pop()
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1])
            for task in Path(f"/proc/{process}/task").iterdir():
                waiting += map(int, (task / "children").read_text().split())
        except (OSError, ValueError, IndexError):  # it ended, or this kernel does not list children
            continue
    return total * os.sysconf("SC_PAGE_SIZE")


def _script(role: str) -> str:
    prelude = (_INSIDE / "prelude.py").read_text(encoding="utf-8")
    parts = [(_INSIDE / f"{name}.py").read_text(encoding="utf-8") for name in ("wire", role)]
    future = "from __future__ import annotations\n"
    return "\n".join([future, f"PRELUDE = {prelude!r}", *(part.replace(future, "") for part in parts)])


def _wrapper(kind: str, uid: int) -> list[str]:
    if kind == "none":
        return []
    if kind == "namespaces":
        launcher = (_INSIDE / "launcher.py").read_text(encoding="utf-8")
        return [_python(), "-I", "-S", "-B", "-c", launcher, str(uid), str(SCRATCH_BYTES), os.pathsep.join(_visible())]
    command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session", "--hostname", "sandbox"]
    command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--cap-drop", "ALL"]
    if kind == "bwrap-root":
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    command += ["--dev", "/dev", "--proc", "/proc"]
    for folder in ("/tmp", "/dev/shm"):
        command += ["--perms", "1777", "--size", str(SCRATCH_BYTES), "--tmpfs", folder]
    for path in _visible():
        for parent in reversed(Path(path).parents[:-1]):  # made without being asked to, they would be closed to nobody
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", path, path]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]


def _visible() -> list[str]:
    """What a sandbox sees of the host, read-only: the system's programs and libraries, this Python, its packages."""
    found: list[str] = []
    packages = [entry for entry in sys.path if _is_packages(entry)]
    python = [sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.path.dirname(_python()))]
    for path in [*_SYSTEM, *python, *packages]:
        if os.path.exists(path) and not any(Path(path).is_relative_to(seen) for seen in found):
            found.append(path)
    return found


def _is_packages(entry: str) -> bool:
    return os.path.basename(entry) in ("site-packages", "dist-packages") and os.path.isdir(entry)


def _python() -> str:
    """The interpreter itself, not the link to it in a virtual environment."""
    return os.path.realpath(sys.executable)


def _free_uid() -> int:
    """A user id nobody has, so that limits count for one sandbox alone (systemd keeps this range for such uses)."""
    return 61184 + os.getpid() % 4336


_KINDS = ("bwrap-root", "bwrap-user", "namespaces") if os.geteuid() == 0 else ("bwrap-user", "namespaces")
_DROPS_ROOT = ("bwrap-root", "namespaces")
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}
