"""Attacks on the sandbox in its four forms: bubblewrap and own namespaces, started by root and by a plain user.

Every attack runs in all forms that this machine has. As root the plain user's forms run in a process of that user. Each
program prints what it won, or earns its reward by the attack alone; the test asserts that it won nothing.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from tests.helpers.attacks import LEFT, Form, nothing_won

pytestmark = pytest.mark.timeout(120)


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
