"""F21 and F22: programs that flood, hang or pry are stopped within their limits, see nothing, and leave nothing."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from or1.core.types import Score, Status
from or1.reward.code.sandbox import SandboxStartError, find_sandbox
from tests.helpers.sandboxes import MEMORY_MIB, census, kind_or_skip, output, score

pytestmark = pytest.mark.timeout(60)

THREE = {"inputs": ["1\n"] * 3, "outputs": ["1\n"] * 3}

FLOODS = {
    "fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", Status.TIMEOUT),
    "fork bomb that ends": ("import os\nfor _ in range(40): os.fork()\nprint(1)", Status.WRONG),
    "thread bomb": (
        "import threading, time\nfor _ in range(999): threading.Thread(target=time.sleep, args=(9,)).start()",
        None,
    ),
    "64 GB": ("x = bytearray(64 << 30)\nprint(1)", Status.WRONG),
    "memory bit by bit": ("x = []\nwhile True: x.append(bytearray(1 << 20))", None),
    "memory in many processes": (
        "import os, time\nfor _ in range(12):\n    if os.fork() == 0: break\nx = b'x' * (150 << 20)\ntime.sleep(9)",
        Status.WRONG,
    ),
    "10 GB of output": ("import sys\nfor _ in range(10 << 10): sys.stdout.write('x' * (1 << 20))", Status.WRONG),
    "10 GB of errors": (
        "import os\nprint(1, flush=True)\nfor _ in range(10 << 10): os.write(2, b'x' * (1 << 20))",
        Status.WRONG,
    ),
    "full disk": (
        "import itertools\nfor i in itertools.count(): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))",
        Status.WRONG,
    ),
    "infinite loop": ("while True: pass", Status.TIMEOUT),
    "sleep": ("import time\ntime.sleep(99)", Status.TIMEOUT),
    "loop in C": ("sum(range(10 ** 15))", Status.TIMEOUT),
    "blocks signals": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))\nwhile True: pass",
        Status.TIMEOUT,
    ),
    "stops its parent": ("import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nwhile True: pass", Status.TIMEOUT),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)", Status.WRONG),
    "kills everything": ("import os\nos.kill(-1, 9)", Status.WRONG),
    "segfault": ("import ctypes\nctypes.string_at(0)", Status.WRONG),
    "deep recursion": ("def f(): f()\nf()", Status.WRONG),
    "deep source": ("x = " + "(" * 100_000, Status.WRONG),
    "NUL in source": ("print(1)\0", Status.WRONG),
}

DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(99)
    os._exit(0)
print(1)
"""


@pytest.fixture(scope="module", params=["auto", pytest.param("namespaces", marks=pytest.mark.slow)])
def sandbox(request: pytest.FixtureRequest) -> str:
    return kind_or_skip(request.param)


@pytest.mark.parametrize("name", FLOODS)
def test_floods_and_hangs_end_within_their_limits(name: str, sandbox: str) -> None:
    program, status = FLOODS[name]
    start = time.monotonic()
    with census(os.getpid()) as watched:
        found = score(program, THREE, sandbox, test_timeout_s=3.0 if name.startswith("memory in") else 1.0)
    assert found.reward == 0
    assert status in (None, found.status)
    assert time.monotonic() - start < 8
    assert watched.peak_bytes < 3 * MEMORY_MIB << 20


def test_a_daemon_does_not_outlive_its_program(sandbox: str) -> None:
    with census(os.getpid()) as watched:
        assert score(DAEMON, THREE, sandbox) == Score(1.0, Status.OK)
    assert len(watched.seen) >= 3


def test_many_tests_share_one_limit(sandbox: str) -> None:
    many = {"inputs": ["1\n"] * 50, "outputs": ["1\n"] * 50}
    start = time.monotonic()
    found = score("import time\ntime.sleep(0.3)\nprint(1)", many, sandbox, total_timeout_s=1.5)
    assert found == Score(0.0, Status.TIMEOUT)
    assert time.monotonic() - start < 5


# --- F22


PRYING = {
    "environment": "import os; print(*os.environ)",
    "environment of process 1": "print(open('/proc/1/environ').read())",
    "home": "import os; print(os.listdir({home!r}))",
    "this file": "print(open({here!r}).read())",
    "passwords": "print(open('/etc/passwd').read())",
    "hostname": "print(open('/etc/hostname').read())",
    "write to the system": "open('/usr/or1-was-here', 'w')",
    "write to the root": "open('/or1-was-here', 'w')",
    "write to Python": "import os; open(os.path.dirname(os.__file__) + '/or1_was_here.py', 'w')",
    "loopback": "import socket; socket.create_connection(('127.0.0.1', {port}), 1); print('connected')",
    "internet": "import socket; socket.create_connection(('1.1.1.1', 53), 1); print('connected')",
    "name": "import socket; print(socket.gethostbyname('pypi.org'))",
    "trace process 1": (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.ptrace(16, 1, None, None) == 0; print('attached')"
    ),
    "memory of process 1": "open('/proc/1/mem', 'rb')",
    "the trainer": "import os; os.kill({pid}, 0); print('there')",
    "become root": "import os; os.setuid(0); print('root')",
    "mount": (
        "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
        "assert libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0; print('mounted')"
    ),
    "chroot": "import os; os.chroot('/tmp'); print('rooted')",
    "devices": "print([n for n in __import__('os').listdir('/dev') if n in ('mem', 'kmem', 'sda', 'vda', 'kvm')][0])",
}


ALLOWED = {"HOME", "LANG", "LC_CTYPE", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PATH", "PWD", "PYTHONHASHSEED"}


@pytest.fixture
def secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_TOKEN", "hf_geheim")
    (tmp_path / "token").write_text("hf_geheim")
    yield
    assert not Path("/usr/or1-was-here").exists()
    assert not Path("/or1-was-here").exists()


@pytest.mark.usefixtures("secrets")
@pytest.mark.parametrize("name", PRYING)
def test_programs_cannot_pry(name: str, sandbox: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        facts = {"home": str(tmp_path), "here": __file__, "port": server.getsockname()[1], "pid": os.getpid()}
        printed = output(PRYING[name].format(**facts), sandbox)
    assert "hf_geheim" not in printed
    if name == "environment":
        assert set(printed.split()) <= ALLOWED
    elif name == "environment of process 1" and "'code': 1" not in printed:
        assert not any(word in printed for word in ("TOKEN", "USER", "SHELL"))
    else:
        assert "'code': 1" in printed, printed
        assert any(word in printed for word in ("Error", "error")), printed


def test_each_program_has_a_tmp_of_its_own(sandbox: str) -> None:
    assert "none yet" in output("open('/tmp/x', 'w').write('x'); print('none yet')", sandbox)
    assert "'x'" not in output("import os; print(os.listdir('/tmp'))", sandbox)
    assert not Path("/tmp/x").exists()


def test_descriptors_of_the_trainer_are_closed(sandbox: str, tmp_path: Path) -> None:
    with open(tmp_path / "secret", "w+") as secret:
        secret.write("x")
        os.set_inheritable(secret.fileno(), True)
        printed = output(
            "import os\nfor fd in range(3, 256):\n    try: print(os.readlink(f'/proc/self/fd/{fd}'))\n"
            "    except OSError: pass\nprint('end')",
            sandbox,
        )
    assert "secret" not in printed and printed.endswith("end\n")


def test_a_killed_grader_takes_its_sandbox_along(sandbox: str) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            score("while True: pass", THREE, sandbox, test_timeout_s=30.0, total_timeout_s=60.0)
        finally:
            os._exit(0)
    with census(pid) as watched:
        time.sleep(0.8)
        assert len(watched.seen) >= 3
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_sandboxes_work_from_a_thread(sandbox: str) -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(score("print(1)", THREE, sandbox)))
    thread.start()
    thread.join()
    assert found == [Score(1.0, Status.OK)]


def test_without_isolation_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from or1.core.errors import ScorerError
    from or1.reward.code import sandbox

    monkeypatch.setattr(sandbox, "_wrapper", lambda kind, uid: [])
    with pytest.raises(ScorerError, match=r'apt-get install bubblewrap.*reward.code.sandbox = "none"'):
        find_sandbox("auto")
    assert find_sandbox("none") == "none"


# --- D2: what the machine lacks is a crash, and no program's fault


def test_a_sandbox_that_does_not_come_up_is_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: fork: Resource temporarily unavailable' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr("or1.reward.code.sandbox.shutil.which", lambda name: str(broken))
    kind = "bwrap-root" if os.geteuid() == 0 else "bwrap-user"
    for truth in (THREE, {"test_list": ["assert f(1) == 1"]}):
        with pytest.raises(SandboxStartError, match=r"did not start: .*Resource temporarily unavailable"):
            score("print(1)", truth, kind)
    with pytest.raises(SandboxStartError, match="cannot be started"):
        monkeypatch.setattr("or1.reward.code.sandbox.shutil.which", lambda name: str(tmp_path / "gone"))
        score("print(1)", THREE, kind)


def test_a_test_that_finds_no_room_for_a_process_is_a_crash(sandbox: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("the limit of a plain user's processes counts all that the user has")
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    # Root itself is exempt; the runner inherits the limit and then becomes another user.
    resource.setrlimit(resource.RLIMIT_NPROC, (1, hard))
    try:
        with pytest.raises(SandboxStartError, match=r"could not be started|did not start"):
            score("print(1)", THREE, sandbox)
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))


ZOMBIES = """
import ctypes, os, sys, time
from or1.reward.code import sandbox
from tests.helpers.sandboxes import score
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans come to this process, which, as in many containers, reaps none
for _ in range(5):
    score("print(1)", {"inputs": ["1\\n"], "outputs": ["1\\n"]}, sys.argv[1])
    score("def f(x): return x", {"test_list": ["assert f(1) == 1"]}, sys.argv[1])
for _ in range(50):
    time.sleep(0.2)
    sandbox._reap()
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        break
left = 0
try:
    while os.waitpid(-1, os.WNOHANG) != (0, 0):
        left += 1
except ChildProcessError:
    pass
print(left)
"""


def test_sandboxes_leave_no_zombies_to_a_process_1_that_does_not_reap(sandbox: str) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", ZOMBIES, sandbox], capture_output=True, text=True, env=environment)
    assert found.stdout.strip() == "0", found.stdout + found.stderr


def test_a_program_may_be_in_the_prime_of_its_limit(sandbox: str) -> None:
    """A test that ends just before its limit is right, however the runner is scheduled."""
    found = score("import time\ntime.sleep(0.7)\nprint(1)", THREE, sandbox, test_timeout_s=1.5)
    assert found == Score(1.0, Status.OK)


def test_two_sandboxes_at_once_have_different_users(sandbox: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("a plain user's sandboxes have user namespaces of their own")
    from or1.reward.code.sandbox import _free_uid

    users = {_free_uid() for _ in range(100)}
    assert len(users) == 100 and min(users) >= 61184
    assert output("import os; print(os.getuid())", sandbox) != output("import os; print(os.getuid())", sandbox)
