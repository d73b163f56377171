"""Attacks on the sandbox in its four forms: bubblewrap and own namespaces, started by root and by a plain user.

Every attack runs in all forms that this machine has. As root the plain user's forms run in a process of that user. Each
program prints what it won, or earns its reward by the attack alone; the test asserts that it won nothing.
"""

from __future__ import annotations

import os
import socket
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from plain_user import PLAIN_USER, Grader
from sandboxes import MEMORY_MIB, census

pytestmark = pytest.mark.timeout(120)
FORMS = ("bwrap, root", "namespaces, root", "bwrap, plain user", "namespaces, plain user")


class Form(NamedTuple):
    """A form of the sandbox and the process that grades in it."""

    kind: str
    grader: Grader

    def output(self, program: str) -> str:
        """Return what a program prints."""
        return self.grader.ask(program=textwrap.dedent(program), kind=self.kind)

    def score(self, program: str, inputs: list[str], outputs: list[str], **changes: Any) -> tuple[float, str]:
        """Return reward and status of a program."""
        truth = {"inputs": inputs, "outputs": outputs}
        return tuple(self.grader.ask(program=textwrap.dedent(program), truth=truth, kind=self.kind, changes=changes))


@pytest.fixture(scope="module", params=[FORMS[0], *(pytest.param(form, marks=pytest.mark.slow) for form in FORMS[1:])])
def form(request: pytest.FixtureRequest) -> Iterator[Form]:
    choice, _, who = request.param.partition(", ")
    root = os.geteuid() == 0
    required = os.environ.get("OR1_REQUIRE_SANDBOXES") == "1"
    if who == "root" and not root:
        pytest.skip("needs root")
    grader = None
    try:
        grader = Grader(PLAIN_USER if who == "plain user" and root else None)
        kind = grader.ask(choice=choice)
    except (OSError, AssertionError) as error:
        if grader is not None:
            grader.close()
        if required:
            raise
        pytest.skip(f"{request.param}: {error}")
    yield Form(kind, grader)
    grader.close()


WON = """
import ctypes, errno, json, os, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"
won = []

def attempt(name, action):
    try:
        result = action()
    except Exception:
        return
    if result is not None and result is not False and result != -1:
        won.append(name)
"""


# What stands in the private folders, but for folders on the way to Python's packages, which may lie below /tmp.
LEFT = """
import os, sys
def left(folder):
    shown = [*sys.path, sys.executable, os.__file__]
    return [n for n in os.listdir(folder) if not any(p.startswith(f"{folder}/{n}/") for p in shown)]
"""


def nothing_won(form: Form, attack: str) -> None:
    printed = form.output(WON + textwrap.dedent(attack) + "\nprint(json.dumps(won))")
    assert printed.strip() == "[]", printed


def test_files_of_the_host_cannot_be_read(form: Form, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hf_geheim")
    paths = [
        "/etc/passwd",
        "/etc/shadow",
        "/etc/hostname",
        "/root",
        "/home",
        "/var",
        str(tmp_path),
        __file__,
        "/sys",
        "/boot",
        "/run",
        "/proc/1/root/etc/passwd",
        "/proc/2/root/etc/passwd",
        "/proc/kcore",
    ]
    nothing_won(
        form,
        f"""
        # Folders on the way to this Python exist, with nothing else in them.
        shown = sys.executable + ":" + os.__file__ + ":" + ":".join(sys.path)
        for path in {paths!r}:
            attempt(path, lambda: [n for n in os.listdir(path) if f"{{path}}/{{n}}" not in shown] or False
                    if os.path.isdir(path) else open(path, "rb").read(1) or False)
        for path in ("/proc/1/environ", "/proc/2/environ", "/proc/self/environ"):
            attempt(path, lambda: b"geheim" in open(path, "rb").read())
        attempt("environment", lambda: "HF_TOKEN" in os.environ)
    """,
    )


def test_nothing_of_the_host_can_be_written(form: Form) -> None:
    nothing_won(
        form,
        """
        for path in ("/", "/usr", "/etc", "/lib", "/bin", "/dev", "/proc", "/sys", "/usr/bin", "/usr/lib", "/var",
                     os.path.dirname(os.__file__)):
            attempt(path, lambda: open(path + "/or1-was-here", "w").write("x"))
        for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/1/oom_score_adj", "/dev/mem",
                     "/proc/2/oom_score_adj", "/proc/sys/vm/drop_caches", "/dev/kmsg", "/dev/sda", "/dev/vda"):
            attempt(path, lambda: os.open(path, os.O_WRONLY))
    """,
    )
    assert not any(Path(folder, "or1-was-here").exists() for folder in ("/", "/usr", "/etc", "/lib", "/dev"))


def test_there_is_no_network(form: Form, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind("\0or1-attack")
        abstract.listen()
        nothing_won(
            form,
            f"""
            port = {tcp.getsockname()[1]}
            attempt("tcp", lambda: socket.create_connection(("127.0.0.1", port), 1))
            attempt("internet", lambda: socket.create_connection(("1.1.1.1", 53), 1))
            attempt("name", lambda: socket.gethostbyname("pypi.org"))
            def udp():
                s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                s.connect(("127.0.0.1", port))
                s.send(b"x")
                time.sleep(0.1)
                s.send(b"x")
            attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect("\\0or1-attack") or True)
            for path in ("/run/docker.sock", "/var/run/docker.sock", "/run/dbus/system_bus_socket"):
                attempt(path, lambda: socket.socket(socket.AF_UNIX).connect(path) or True)
            for family in (17, 38, 44, 30, 21, 15, 9, 12, 5, 4, 29, 31):
                attempt(f"family {{family}}", lambda: [socket.socket(family, kind) for kind in (1, 2, 3, 5)])
                attempt(f"family {{family}} raw", lambda: socket.socket(family, 3))
            attempt("raw", lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
        """,
        )


def test_vsock_is_closed(form: Form) -> None:
    nothing_won(
        form,
        """
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
            attempt(f"vsock {kind}", lambda: socket.socket(40, kind))
        attempt("pair", lambda: socket.socketpair(40, 1))
    """,
    )


def test_other_processes_cannot_be_seen_or_signalled(form: Form) -> None:
    nothing_won(
        form,
        f"""
        for pid in ({os.getpid()}, {form.grader.pid}):
            attempt(f"see {{pid}}", lambda: os.stat(f"/proc/{{pid}}"))
            attempt(f"signal {{pid}}", lambda: os.kill(pid, 0) or True)
        attempt("many", lambda: len([n for n in os.listdir("/proc") if n.isdigit()]) > 4)
        attempt("init", lambda: os.kill(1, 9) or os.path.exists("/proc/1") and False)
    """,
    )
    assert form.score("import os\nos.kill(-1, 9)\nprint(1)", [""], ["1"])[0] in (0.0, 1.0)
    assert form.score("print(1)", [""], ["1"]) == (1.0, "ok")


@pytest.mark.parametrize("number", [9, 19])
def test_a_signal_to_the_own_process_group_stays_inside(form: Form, number: int) -> None:
    start = time.monotonic()
    reward, status = form.score(f"import os\nos.kill(0, {number})\nprint(1)", [""] * 2, ["1"] * 2, test_timeout_s=1.0)
    assert reward == 0 and status in ("wrong", "timeout")
    assert time.monotonic() - start < 8
    assert form.score("print(1)", [""], ["1"]) == (1.0, "ok")


def test_what_runs_the_program_is_closed_to_it(form: Form) -> None:
    nothing_won(
        form,
        """
        parent = os.getppid()
        for pid in (1, parent):
            attempt(f"memory {pid}", lambda: os.open(f"/proc/{pid}/mem", os.O_RDWR))
            attempt(f"read memory {pid}", lambda: os.open(f"/proc/{pid}/mem", os.O_RDONLY))
            attempt(f"maps {pid}", lambda: open(f"/proc/{pid}/maps").read() or False)
            attempt(f"descriptors {pid}", lambda: os.listdir(f"/proc/{pid}/fd"))
            attempt(f"pipe {pid}", lambda: os.open(f"/proc/{pid}/fd/1", os.O_WRONLY))
            attempt(f"ptrace {pid}", lambda: libc.ptrace(16, pid, None, None) == 0)
            attempt(f"seize {pid}", lambda: libc.ptrace(0x4206, pid, None, None) == 0)
            attempt(f"pidfd {pid}", lambda: libc.syscall(438, os.pidfd_open(pid), 1, 0))
            buffer = ctypes.create_string_buffer(8)
            io = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
            attempt(f"vm_read {pid}", lambda: libc.process_vm_readv(pid, io, 1, io, 1, 0))
    """,
    )


@pytest.mark.slow
def test_nothing_outlives_the_sandbox(form: Form) -> None:
    program = """
        import ctypes, os, signal, time
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
        for i in range(4):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    while True: time.sleep(1)
                os._exit(0)
        print(1)
    """
    with census(form.grader.pid) as watched:
        form.score(program, [""], ["1"])
    assert len(watched.seen) >= 3


@pytest.mark.parametrize("attack", ["mapping", "threads", "descriptors", "scratch", "sockets"])
def test_memory_stays_within_its_limit(form: Form, attack: str) -> None:
    programs = {
        "mapping": "x = []\nwhile True: x.append(b'x' * (1 << 24))",
        "threads": "import threading, time\nfor _ in range(999):\n"
        "    threading.Thread(target=time.sleep, args=(9,)).start()",
        "descriptors": "import os\nx = [os.pipe() for _ in range(999)]",
        "scratch": "for i in range(999): open(f'/tmp/{i}', 'wb').write(bytes(1 << 20))",
        "sockets": "import socket\nfor _ in range(120):\n    a, b = socket.socketpair()\n    a.setblocking(False)\n"
        "    x = globals().setdefault('x', [])\n    x += [a, b]\n    try:\n"
        "        while True: a.send(bytes(4096))\n"
        "    except BlockingIOError: pass\nwhile True: pass",
    }
    with census(form.grader.pid) as watched:
        reward, _ = form.score(programs[attack] + "\nprint(1)", ["", ""], ["1", "1"], test_timeout_s=1.0)
    assert reward == 0
    assert watched.peak_bytes < 3 * MEMORY_MIB << 20


def test_no_memory_outside_the_limit_by_system_v(form: Form) -> None:
    nothing_won(
        form,
        """
        attempt("shmget", lambda: libc.shmget(0, 64 << 20, 0o1600))
        attempt("msgget", lambda: libc.msgget(0, 0o1600))
        attempt("semget", lambda: libc.semget(0, 9, 0o1600))
        attempt("mqueue", lambda: libc.syscall(240 if X86 else 180, b"x", 0o102, 0o600, None))
    """,
    )


def test_no_memory_outside_the_limit_by_memfd_or_mounts(form: Form) -> None:
    nothing_won(
        form,
        """
        attempt("memfd", lambda: os.memfd_create("x"))
        attempt("memfd_secret", lambda: libc.syscall(447, 0))
        attempt("tmpfs", lambda: libc.mount(b"x", b"/tmp", b"tmpfs", 0, b"size=4G") == 0)
        attempt("fsopen", lambda: libc.syscall(430, b"tmpfs", 0))
    """,
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["mapping", "zero", "socket", "pipe"])
def test_no_memory_that_is_charged_to_nobody(form: Form, how: str) -> None:
    nothing_won(
        form,
        f"""
        import fcntl, mmap
        if "{how}" == "mapping":
            attempt("shared", lambda: mmap.mmap(-1, 1 << 20))
            attempt("private", lambda: mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE) and None)
        if "{how}" == "zero":
            attempt("zero", lambda: mmap.mmap(os.open("/dev/zero", os.O_RDWR), 1 << 20, flags=mmap.MAP_SHARED))
        if "{how}" == "socket":
            for family in (socket.AF_INET, socket.AF_INET6):
                attempt(f"family {{family}}", lambda: socket.socket(family))
            attempt("many", lambda: [socket.socketpair() for _ in range(60)])
        if "{how}" == "pipe":
            attempt("vmsplice", lambda: libc.syscall(278 if X86 else 75, 1, None, 0, 0) != -1)
            attempt("aio", lambda: libc.syscall(206 if X86 else 0, 1, ctypes.byref(ctypes.c_ulong())) != -1)
            attempt("inotify", lambda: libc.inotify_init1(0))
            attempt("lock", lambda: fcntl.flock(open("/usr/bin/env", "rb"), fcntl.LOCK_EX) or True)
    """,
    )


@pytest.mark.parametrize(
    "attack",
    [
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (1, 1))\nprint(1)",
        "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_NPROC, (0, 0))\nprint(1)",
        "import os\nfor path in ('/tmp', '/dev/shm'):\n    try: os.chmod(path, 0)\n    except OSError: pass\nprint(1)",
    ],
)
def test_a_program_cannot_make_grading_fail(form: Form, attack: str) -> None:
    _, status = form.score(attack, [""] * 3, ["1"] * 3)
    assert status in ("ok", "wrong"), status
    assert form.score("print(1)", [""], ["1"]) == (1.0, "ok")


@pytest.mark.slow
def test_files_are_limited_in_number(form: Form) -> None:
    program = """
        for i in range(200_000):
            open(f"/tmp/{i}", "w").close()
        print(1)
    """
    assert form.score(program, [""], ["1"], test_timeout_s=20.0, total_timeout_s=60.0) == (0.0, "wrong")


NAMESPACES = {
    "user": 0x10000000,
    "mount": 0x20000,
    "network": 0x40000000,
    "process": 0x20000000,
    "ipc": 0x8000000,
    "uts": 0x4000000,
    "cgroup": 0x2000000,
    "time": 0x80,
}


def test_no_namespace_can_be_made_or_entered(form: Form) -> None:
    nothing_won(
        form,
        f"""
        for name, flag in {NAMESPACES!r}.items():
            attempt(f"unshare {{name}}", lambda: libc.unshare(flag) == 0)
            attempt(f"with a user {{name}}", lambda: libc.unshare(flag | 0x10000000) == 0)
        def clone(flags):
            pid = libc.syscall(56 if X86 else 220, flags | signal.SIGCHLD, 0, 0, 0, 0)
            if pid == 0:
                os._exit(0)
            if pid > 0:
                os.waitpid(pid, 0)
            return pid
        attempt("clone", lambda: clone(0x10000000))
        attempt("clone with a network", lambda: clone(0x50000000))
        arguments = (ctypes.c_uint64 * 11)(0x10000000, 0, 0, 0, 17)
        def clone3():
            pid = libc.syscall(435, arguments, 88)
            if pid == 0:
                os._exit(0)
            return pid
        attempt("clone3", clone3)
        for name in ("user", "mnt", "pid", "net"):
            attempt(f"setns {{name}}", lambda: libc.setns(os.open(f"/proc/1/ns/{{name}}", 0), 0) == 0)
    """,
    )


def test_no_mount_and_no_root_even_from_a_new_namespace(form: Form) -> None:
    nothing_won(
        form,
        """
        libc.unshare(0x10000000 | 0x20000 | 0x40000000)
        for flags, target in ((32, b"/usr"), (32, b"/"), (4096, b"/tmp")):
            attempt(f"mount {target}", lambda: libc.mount(b"/usr", target, None, flags, None) == 0)
        for kind in (b"proc", b"sysfs", b"tmpfs", b"cgroup2", b"overlay"):
            attempt(f"mount {kind}", lambda: libc.mount(kind, b"/tmp", kind, 0, None) == 0)
        for target in (b"/tmp", b"/proc", b"/usr", b"/"):
            attempt(f"umount {target}", lambda: libc.umount2(target, 2) == 0)
        attempt("mknod", lambda: os.mknod("/tmp/disk", 0o60600, os.makedev(8, 0)) or True)
        attempt("setuid", lambda: os.setuid(0) or True)
        attempt("setgid", lambda: os.setgid(0) or True)
        attempt("sethostname", lambda: socket.sethostname("x") or True)
        attempt("su", lambda: subprocess.run(["su", "-c", "true"], stdin=subprocess.DEVNULL).returncode == 0)
        attempt("mount program", lambda: subprocess.run(["mount", "-t", "tmpfs", "x", "/tmp"]).returncode == 0)
    """,
    )


def test_calls_of_the_kernel_that_lead_out_are_refused(form: Form) -> None:
    nothing_won(
        form,
        """
        calls = {"bpf": (321, 280), "perf": (298, 241), "userfaultfd": (323, 282), "kexec": (246, 104),
                 "init_module": (175, 105), "finit_module": (313, 273), "swapon": (167, 224), "acct": (163, 89),
                 "reboot": (169, 142), "syslog": (103, 116), "settimeofday": (164, 170), "chroot": (161, 51),
                 "fanotify": (300, 262), "open_by_handle_at": (304, 265), "io_uring": (425, 425), "quotactl": (179, 60)}
        block = ctypes.create_string_buffer(256)
        for name, numbers in calls.items():
            number = numbers[0 if X86 else 1]
            attempt(name, lambda: libc.syscall(number, block, block, block, block, 0))
            if ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):
                won.append(f"{name} is looked at: {errno.errorcode.get(ctypes.get_errno())}")
        import resource
        for limit in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
            attempt(f"limit {limit}", lambda: resource.setrlimit(limit, (-1, -1)) or True)
        attempt("terminal", lambda: __import__("fcntl").ioctl(0, 0x5412, b"x"))
        attempt("oom", lambda: open("/proc/self/oom_score_adj", "w").write("-1000"))
    """,
    )


def test_keyrings_carry_nothing_to_the_next_program(form: Form) -> None:
    key = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
add, control = (248, 250) if os.uname().machine == "x86_64" else (217, 219)
"""
    form.output(key + "print(libc.syscall(add, b'user', b'or1-answer', b'91', 2, -4))")
    found = form.output(key + "print(libc.syscall(control, 10, -4, b'user', b'or1-answer', 0))")
    assert found.strip() == "-1", found


def test_programs_share_nothing(form: Form) -> None:
    leave = (
        LEFT
        + """
import time
for folder in ("/tmp", "/dev/shm"):
    open(folder + "/left", "w").write("x")
files = sorted(left("/tmp") + left("/dev/shm"))
print(files, len([n for n in os.listdir("/proc") if n.isdigit()]), flush=True)
time.sleep(0.5)
"""
    )
    for printed in form.grader.ask(together=[leave, leave], kind=form.kind):
        assert printed.split("]")[0] == "['left', 'left'" and int(printed.split("]")[1]) <= 3, printed
    assert form.output(LEFT + "print(left('/tmp'), left('/dev/shm'))").strip() == "[] []"


def test_time_is_not_gained_by_stopping_what_measures_it(form: Form) -> None:
    program = """
        import os, signal, time
        parent, start = os.getppid(), time.monotonic()
        if os.fork() == 0:
            time.sleep(1.9)
            os.kill(parent, signal.SIGCONT)
            os._exit(0)
        os.kill(parent, signal.SIGSTOP)
        while time.monotonic() - start < 1.6: pass
        print(1)
    """
    assert form.score(program, [""], ["1"], test_timeout_s=1.0) == (0.0, "timeout")


def test_a_daemon_does_not_work_for_the_next_test(form: Form) -> None:
    program = """
        import os, time
        if input() == "first":
            os.makedirs("/tmp/" + "/".join("d" * 9), mode=0o700)
            os.chmod("/tmp/d", 0)
            for path in ("/tmp/.count", "/dev/shm/count"): open(path, "w").write("1")
            if os.fork() == 0:
                os.setsid()
                time.sleep(9)
            print(1)
        else:
            mine = {str(os.getpid()), str(os.getppid()), "1"}
            others = [n for n in os.listdir("/proc") if n.isdigit() and n not in mine]
            print(1 if others or left("/tmp") or left("/dev/shm") else 0)
    """
    assert form.score(LEFT + textwrap.dedent(program), ["first", "second"], ["1", "1"], partial=True) == (0.5, "wrong")


def test_the_grader_is_not_held_by_a_runner_that_was_stopped(form: Form) -> None:
    program = """
        import os, signal, time
        parent = os.getppid()
        if os.fork() == 0:
            os.setsid()
            while True:
                try: os.kill(parent, signal.SIGSTOP)
                except OSError: pass
        print(1)
    """
    start = time.monotonic()
    reward, _ = form.score(program, ["", "x" * (1 << 20)], ["1", "2"], test_timeout_s=1.0, total_timeout_s=3.0)
    assert reward == 0
    assert time.monotonic() - start < 12


def test_deep_folders_are_removed_between_tests(form: Form) -> None:
    program = """
        import os
        if input() == "first":
            os.chdir("/tmp")
            for _ in range(3000):
                os.mkdir("d")
                os.chdir("d")
            print(1)
        else:
            print(1 if left("/tmp") else 2)
    """
    assert form.score(LEFT + textwrap.dedent(program), ["first", "second"], ["1", "2"]) == (1.0, "ok")


def test_the_filter_has_the_numbers_of_this_machine() -> None:
    """Compare the table of calls with the kernel's own headers, where they are installed."""
    import importlib.util
    import re

    from or1.reward.code import sandbox

    path = Path(sandbox.__file__).parent / "inside" / "guard.py"
    spec = importlib.util.spec_from_file_location("guard", path)
    guard = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(guard)
    headers = (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h"))
    for column, header in enumerate(headers):
        if not header.is_file():
            pytest.skip(f"no {header}")
        text = header.read_text()
        known = {m[1]: int(m[2]) for m in re.finditer(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
        table = guard.DENIED | {"clone": guard.CLONE, "clone3": (guard.CLONE3,) * 2}
        wrong = {n: (v[column], known[n]) for n, v in table.items() if n in known and known[n] != v[column]}
        assert not wrong and len(known.keys() & guard.DENIED.keys()) > 60
    for machine, (_, architecture) in guard.MACHINES.items():
        assert architecture.to_bytes(4, "little") in guard.call_filter(machine)
        assert len(guard.call_filter(machine)) // 8 < 4096
    assert guard.call_filter("riscv64") is None


def test_a_grader_may_run_in_a_thread(form: Form) -> None:
    thread = threading.Thread(target=lambda: form.score("print(1)", [""], ["1"]))
    thread.start()
    thread.join()
    assert form.score("print(1)", [""], ["1"]) == (1.0, "ok")
