"""Sandboxes: processes without network, other processes and secrets, whose only host files are Python and libraries.

The kinds of sandbox, best first. `find_sandbox` selects the first that works on this machine:
  bwrap       bubblewrap; as root it drops to a user id of its own, else it maps the user to nobody
  namespaces  the same kinds of namespaces and mounts, made by `or1.reward.code.inside.launcher`
  none        resource limits only; the configuration must ask for it
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
from typing import IO, Any, Self

from or1.core.errors import ScorerError
from or1.reward.code.inside import wire
from or1.reward.code.protections import PROBE, failures, is_required
from or1.reward.code.usage import children_of, resident_bytes, scratch_files

START_LIMIT_S = 20.0
"""Seconds for a sandbox to start on a busy machine, and for a program to compile."""
GRACE_S = 2.0
"""Seconds after a test's limit at which the sandbox is killed. The runner should have ended the test itself."""
SCRATCH_BYTES = 64 << 20
"""Size of the private /tmp, and of /dev/shm."""
SCRATCH_FILES = 16384
"""Most files and folders in the two. Each takes about 1 KiB of kernel memory."""

_INSIDE = Path(__file__).with_name("inside")
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/alternatives", "/nix/store")
_POLL_S = 0.05
_END_S = 1.0


class SandboxStartError(Exception):
    """The sandbox did not start, or could not start a test. The machine is the cause, never the program."""


class SandboxTimeoutError(Exception):
    """The sandbox sent no answer within the limit and was killed."""


class SandboxDiedError(Exception):
    """The sandbox is dead: it ended, exceeded a limit, or sent an invalid answer."""


@dataclass(frozen=True)
class Limits:
    """Limits of one program. test_s: wall time of one test. cpu_s: CPU time of one process. memory_bytes and processes
    count all its processes together, with threads. output_bytes: size of one output or file.
    """

    test_s: float
    cpu_s: float
    memory_bytes: int
    processes: int
    output_bytes: int


def find_sandbox(choice: str) -> str:
    """Return the kind of sandbox for a choice of auto, bwrap, namespaces or none. Raises ScorerError if none works."""
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
    """Probe a kind of sandbox. Return name -> cause of each missing protection. Raises SandboxStartError."""
    limits = Limits(test_s=10, cpu_s=10, memory_bytes=1 << 30, processes=16, output_bytes=1 << 20)
    try:
        with Inside(kind, "runner", {"program": PROBE, "setup": ""}, limits) as runner:
            return failures(runner.ask({"stdin": ""}, limits.test_s), runner.opening.get("alone") is True)
    except (OSError, SandboxDiedError, SandboxTimeoutError) as error:
        raise SandboxStartError(str(error) or "it takes too long") from error


def _problem(kind: str) -> str | None:
    """Return why a kind of sandbox does not work here, or None if it works."""
    try:
        missing = missing_protections(kind)
    except SandboxStartError as error:
        return str(error)
    return next((why for name, why in missing.items() if is_required(name)), None)


class Inside:
    """One sandboxed process, "runner" or "checker", and the pipes to it.

    opening  first message of the process: its own properties
    answer   answer to `order`

    Raises SandboxStartError if the process does not start; SandboxDiedError or SandboxTimeoutError if `order` ends it.
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
        self._stdin, self._stdout, self._stderr = _pipes_of(self._process)
        os.set_blocking(self._stdin.fileno(), False)
        self._counts_files = False
        self.opening = self._open(kind, role, uid)
        # Not earlier: until its root is mounted, a sandbox shows the host's /tmp. The launcher's mounts have a limit.
        self._counts_files = kind.startswith("bwrap")
        try:
            self.answer = self.ask(order, START_LIMIT_S - GRACE_S)
        except (SandboxDiedError, SandboxTimeoutError):
            self.close()
            raise

    def _open(self, kind: str, role: str, uid: int) -> dict[str, Any]:
        """Send the process its code, user, paths and limits, before any program. Return its first message."""
        opening = {
            # The launcher of "namespaces" has already dropped to the user.
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
            raise SandboxStartError(f"the sandbox did not start: {str(error) or 'it takes too long'}") from error

    def ask(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Send one message and return the answer within `seconds`. Raises SandboxTimeoutError or SandboxDiedError."""
        deadline = time.monotonic() + seconds + GRACE_S
        self._write(wire.framed(message), deadline)
        size = int.from_bytes(self._read(4, deadline), "big")
        # JSON may write one byte as six characters.
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
        """Kill all processes of the sandbox. Idempotent."""
        process = self._process
        if self._scratch and process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, 9)
        if self._scratch or not self._end_inner():
            process.kill()
            process.wait()
        for pipe in (self._stdin, self._stdout, self._stderr):
            with contextlib.suppress(OSError):
                pipe.close()
        if self._scratch:
            with contextlib.suppress(OSError):
                self._scratch.cleanup()

    def _end_inner(self) -> bool:
        """Kill process 1 of the sandbox, so that the outer process reaps it and ends. Return False if it has no child.

        In the other order, process 1 would become an orphan of the machine's init, which many containers lack.
        """
        if self._process.poll() is not None:
            return True
        inner = children_of(self._process.pid)
        for child in inner:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, 9)
        # A process that the program has stopped reaps no child until it continues.
        self._process.send_signal(signal.SIGCONT)
        _ending.append((time.monotonic() + _END_S, self._process))
        _reap()
        return bool(inner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, data: bytes, deadline: float) -> None:
        """Send bytes before a deadline, since a sandbox that the program has stopped must not block the grader."""
        stdin, view = self._stdin.fileno(), memoryview(data)
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
        stdout = self._stdout.fileno()
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
        """Raise SandboxDiedError if the sandbox exceeds its limit of memory or files."""
        limit, outer = self._limits.memory_bytes, self._process.pid
        # The plain sum counts a shared page several times. The exact one is slow, so it is read only above the limit.
        if resident_bytes(outer) > limit and resident_bytes(outer, shares=True) > limit:
            raise self._death(f"took more than {self._limits.memory_bytes >> 20} MiB of memory")
        if self._counts_files and (files := scratch_files(self._process.pid)) > SCRATCH_FILES:
            raise self._death(f"made {files} files, of which {SCRATCH_FILES} are allowed")

    def _death(self, why: str) -> SandboxDiedError:
        self._end_inner()
        last = ""
        with contextlib.suppress(OSError, ValueError):
            os.set_blocking(self._stderr.fileno(), False)
            last = (self._stderr.read(2000) or b"").decode("utf-8", "replace").strip()
        self.close()
        return SandboxDiedError(f"{why}: {last}" if last else why)


def _pipes_of(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    """Return the pipes of a process that was started with three of them; their type says that they may be None."""
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise ValueError("the process was started without pipes")
    return process.stdin, process.stdout, process.stderr


def _reap() -> None:
    """Reap the outer processes that have ended, without waiting for the others. Kill those past their deadline."""
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
    # Compiled once here, since compiling takes as long as starting a sandbox.
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
        # The program has the user of process 1, and could read the memory of bubblewrap's own, but not of guard.py's.
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--as-pid-1"]
    # A shared mapping of /dev/zero is memory that counts for no process.
    command += ["--dev", "/dev", "--ro-bind", "/dev/null", "/dev/zero", "--proc", "/proc"]
    for folder in ("/tmp", "/dev/shm"):
        command += ["--perms", "1777", "--size", str(SCRATCH_BYTES), "--tmpfs", folder]
    for path in _visible():
        for parent in reversed(Path(path).parents[:-1]):  # bubblewrap's own default mode would deny access to nobody
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind", path, path]
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]


def _visible() -> list[str]:
    """Return the host's paths that a sandbox shows read-only: system programs, libraries, this Python, its packages."""
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
    """Return the path of the interpreter itself, not of its link in a virtual environment."""
    return os.path.realpath(sys.executable)


def _free_uid() -> int:
    """Return a user id that no other live sandbox has, so that limits per user apply to one sandbox only."""
    number = next(_started)
    if _maps_all_users():
        # Process ids end at 2^22: no two living processes share a range of 128 numbers.
        return (1 << 30) + (os.getpid() << 7) + number % 128
    # A container with few ids: use the range that systemd reserves for dynamic users.
    return 61184 + (os.getpid() * 7 + number) % 4336


def _maps_all_users() -> bool:
    with contextlib.suppress(OSError, ValueError):
        return any(int(line.split()[2]) >= (1 << 32) - 1 for line in Path("/proc/self/uid_map").open())
    return False


_started = itertools.count()
_ending: deque[tuple[float, subprocess.Popen[bytes]]] = deque()
"""Outer processes of dead sandboxes, each with the time at which it is killed if it has not ended."""
# The code comes through the pipe, since an argument is limited to 128 KiB.
_START = """import marshal, os
code = b""
while len(code) < {size}:
    code += os.read(0, {size} - len(code)) or exit("closed")
exec(marshal.loads(code))
"""
# Not -I, which ignores PYTHONHASHSEED: sets of text must have the same order in all runs.
_FLAGS = ("-P", "-s", "-S", "-B")
# As root, "bwrap-user" would map its user to root on the host.
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
