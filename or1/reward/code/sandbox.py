"""Processes that see no network, no file of the host beyond Python itself, no other process and no secret.

Ways to make one, best first; `find_sandbox` takes the first that works on this machine:
  bwrap       bubblewrap; started by root it drops to a user id of its own, else it maps the user to nobody
  namespaces  the same kinds of namespaces and mounts made by `or1.reward.code.inside.launcher`
  none        nothing but resource limits; only if the configuration says so
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import marshal
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from or1.core.errors import ScorerError
from or1.reward.code.inside import wire
from or1.reward.code.protections import PROBE, failures, is_required
from or1.reward.code.usage import children_of, resident_bytes, scratch_files

START_LIMIT_S = 20.0
"""For a sandbox to come up on a busy machine, and for a program to compile."""
GRACE_S = 2.0
"""The runner ends a test at its limit by itself; this much later the whole sandbox is killed."""
SCRATCH_BYTES = 64 << 20
"""Size of the private /tmp and of /dev/shm."""
SCRATCH_FILES = 16384
"""How many files and folders the two may hold. Each costs about 1 KiB of the kernel's memory."""

_INSIDE = Path(__file__).with_name("inside")
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/alternatives", "/nix/store")
_POLL_S = 0.05
_END_S = 1.0


class SandboxStartError(Exception):
    """The sandbox did not come up, or could not start a test: the machine's doing, never the program's."""


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


def missing_protections(kind: str) -> dict[str, str]:
    """Try a kind of sandbox; returns each of PROTECTIONS that does not hold here, and why. Raises SandboxStartError."""
    limits = Limits(test_s=10, cpu_s=10, memory_bytes=1 << 30, processes=16, output_bytes=1 << 20)
    try:
        with Inside(kind, "runner", {"program": PROBE, "setup": ""}, limits) as runner:
            return failures(runner.ask({"stdin": ""}, limits.test_s), runner.opening.get("alone") is True)
    except (OSError, SandboxDiedError, SandboxTimeoutError) as error:
        raise SandboxStartError(str(error) or "it takes too long") from error


def _problem(kind: str) -> str | None:
    """Why a kind of sandbox does not work here."""
    try:
        missing = missing_protections(kind)
    except SandboxStartError as error:
        return str(error)
    return next((why for name, why in missing.items() if is_required(name)), None)


class Inside:
    """One sandboxed process, "runner" or "checker", and the pipe to it.

    opening  what the process said of itself once it was up
    answer   what it said of `order`

    Raises SandboxStartError if it does not come up; SandboxDiedError or SandboxTimeoutError if `order` ends it.
    """

    def __init__(self, kind: str, role: str, order: Mapping[str, Any], limits: Limits):
        _reap()
        self._limits = limits
        self._scratch = tempfile.TemporaryDirectory(prefix="or1-code-") if kind == "none" else None
        uid = _free_uid() if kind in _DROPS_ROOT and os.geteuid() == 0 else 0
        command = [*_wrapper(kind, uid), _python(), *_FLAGS, "-c", _START.format(size=len(_script(role)))]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=_ENVIRONMENT,
                cwd=self._scratch.name if self._scratch else "/",
                start_new_session=kind == "none",
            )
        except OSError as error:
            raise SandboxStartError(f"{command[0]} cannot be started: {error}") from error
        os.set_blocking(self._process.stdin.fileno(), False)
        self._counts_files = False
        self.opening = self._open(kind, role, uid)
        # Not before: until its root is in place, a sandbox shows the host's /tmp. The launcher's mounts have a limit.
        self._counts_files = kind.startswith("bwrap")
        try:
            self.answer = self.ask(order, START_LIMIT_S - GRACE_S)
        except (SandboxDiedError, SandboxTimeoutError):
            self.close()
            raise

    def _open(self, kind: str, role: str, uid: int) -> dict[str, Any]:
        """Tell the process its user, paths and limits, before it knows of any program."""
        opening = {
            # The launcher of "namespaces" has dropped to the user already.
            "uid": uid if kind == "bwrap-root" else 0,
            "path": [entry for entry in sys.path if _is_packages(entry)],
            "limits": asdict(self._limits),
            "outside": _process_namespace(),
            "shown": _visible(),
        }
        try:
            self._write(_script(role), time.monotonic() + START_LIMIT_S)
            return self.ask(opening, START_LIMIT_S - GRACE_S)
        except (SandboxDiedError, SandboxTimeoutError) as error:
            self.close()
            raise SandboxStartError(f"the sandbox did not come up: {str(error) or 'it takes too long'}") from error

    def ask(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send one message and return the answer. Raises SandboxTimeoutError or SandboxDiedError."""
        deadline = time.monotonic() + seconds + GRACE_S
        self._write(wire.framed(message), deadline)
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
        if self._scratch and process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, 9)
        if self._scratch or not self._end_inner():
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()
        if self._scratch:
            with contextlib.suppress(OSError):
                self._scratch.cleanup()

    def _end_inner(self) -> bool:
        """Kill process 1 of the sandbox, so that the outer process reaps it and ends; returns whether there is one.

        Killed the other way round, process 1 would be left to the machine's, which in many containers never reaps.
        """
        if self._process.poll() is not None:
            return True
        inner = children_of(self._process.pid)
        for child in inner:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, 9)
        # A process that the program has stopped reaps nobody until it goes on.
        self._process.send_signal(signal.SIGCONT)
        _ending.append((time.monotonic() + _END_S, self._process))
        _reap()
        return bool(inner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, data: bytes, deadline: float) -> None:
        """Send bytes. A sandbox that the program has stopped must not hold the grader, so there is a deadline."""
        stdin, view = self._process.stdin.fileno(), memoryview(data)
        while view:
            left = deadline - time.monotonic()
            if left <= 0:
                self.close()
                raise SandboxTimeoutError
            try:
                if select.select([], [stdin], [], min(left, _POLL_S))[1]:
                    view = view[os.write(stdin, view[: 1 << 16]) :]
                else:
                    self._check_use()
            except BlockingIOError:
                continue
            except OSError:
                raise self._death("closed") from None

    def _read(self, size: int, deadline: float) -> bytes:
        parts = []
        stdout = self._process.stdout.fileno()
        while size:
            left = deadline - time.monotonic()
            if left <= 0:
                self.close()
                raise SandboxTimeoutError
            if not select.select([stdout], [], [], min(left, _POLL_S))[0]:
                self._check_use()
                continue
            part = os.read(stdout, min(size, 1 << 20))
            if not part:
                raise self._death("ended")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _check_use(self) -> None:
        """Raise SandboxDiedError if the sandbox holds more memory or files than it may."""
        limit, outer = self._limits.memory_bytes, self._process.pid
        # Shares of pages cost more to read, so only where the plain sum, which counts a shared page often, is too much.
        if resident_bytes(outer) > limit and resident_bytes(outer, shares=True) > limit:
            raise self._death(f"took more than {self._limits.memory_bytes >> 20} MiB of memory")
        if self._counts_files and (files := scratch_files(self._process.pid)) > SCRATCH_FILES:
            raise self._death(f"made {files} files, of which {SCRATCH_FILES} are allowed")

    def _death(self, why: str) -> SandboxDiedError:
        self._end_inner()
        last = ""
        with contextlib.suppress(OSError, ValueError):
            os.set_blocking(self._process.stderr.fileno(), False)
            last = (self._process.stderr.read(2000) or b"").decode("utf-8", "replace").strip()
        self.close()
        return SandboxDiedError(f"{why}: {last}" if last else why)


def _reap() -> None:
    """Take leave of outer processes that have ended, without a wait for the others; kill those that do not end."""
    for _ in range(len(_ending)):
        try:
            deadline, process = _ending.popleft()
        except IndexError:  # another thread was faster
            return
        if process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
            _ending.append((deadline, process))


def _process_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@functools.cache
def _script(role: str) -> bytes:
    prelude = (_INSIDE / "prelude.py").read_text(encoding="utf-8")
    names = ("wire", "guard", "cleaning", role) if role == "runner" else ("wire", "guard", role)
    parts = [(_INSIDE / f"{name}.py").read_text(encoding="utf-8") for name in names]
    future = "from __future__ import annotations\n"
    source = "\n".join([future, f"PRELUDE = {prelude!r}", *(part.replace(future, "") for part in parts)])
    # Compiled once here: to compile it in every sandbox takes as long as to start the sandbox.
    return marshal.dumps(compile(source, f"{role}.py", "exec"))


def _wrapper(kind: str, uid: int) -> list[str]:
    if kind == "none":
        return []
    if kind == "namespaces":
        launcher = (_INSIDE / "launcher.py").read_text(encoding="utf-8")
        scratch = f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES}"
        return [_python(), *_FLAGS, "-c", launcher, str(uid), scratch, os.pathsep.join(_visible())]
    command = [shutil.which("bwrap") or "bwrap", "--die-with-parent", "--new-session", "--hostname", "sandbox"]
    command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--cap-drop", "ALL"]
    if kind == "bwrap-root":
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        # The program has the user of process 1. bubblewrap's own can be looked into, that of guard.py cannot.
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--as-pid-1"]
    # A shared mapping of /dev/zero is memory that no process is charged with.
    command += ["--dev", "/dev", "--ro-bind", "/dev/null", "/dev/zero", "--proc", "/proc"]
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
    """A user id that no other sandbox has at this time, so that limits count for one sandbox alone."""
    number = next(_started)
    if _maps_all_users():
        # Process ids end at 2^22: no two living processes share a range of 128 numbers.
        return (1 << 30) + (os.getpid() << 7) + number % 128
    # Where a container has few ids: the range that systemd keeps for such uses.
    return 61184 + (os.getpid() * 7 + number) % 4336


def _maps_all_users() -> bool:
    with contextlib.suppress(OSError, ValueError):
        return any(int(line.split()[2]) >= (1 << 32) - 1 for line in Path("/proc/self/uid_map").open())
    return False


_started = itertools.count()
_ending: deque[tuple[float, subprocess.Popen]] = deque()
"""Outer processes whose sandbox is dead, and until when they may take to end by themselves."""
# The code comes through the pipe, since an argument may have 128 KiB at most.
_START = """import marshal, os
code = b""
while len(code) < {size}:
    code += os.read(0, {size} - len(code)) or exit("closed")
exec(marshal.loads(code))
"""
# Not -I, which would ignore PYTHONHASHSEED: sets of text must have the same order in every run.
_FLAGS = ("-P", "-s", "-S", "-B")
# As root, "bwrap-user" would map its user to the host's root.
_KINDS = ("bwrap-root", "namespaces") if os.geteuid() == 0 else ("bwrap-user", "namespaces")
_DROPS_ROOT = ("bwrap-root", "namespaces")
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONHASHSEED": "0",
}
