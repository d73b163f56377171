"""Attacks on the limits of the sandbox: memory, files, time, and what may outlive a program."""

from __future__ import annotations

import textwrap
import time

import pytest

from tests.helpers.attacks import LEFT, Form, nothing_won
from tests.helpers.sandboxes import MEMORY_MIB, census

pytestmark = pytest.mark.timeout(120)


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
        time.sleep(0.5)  # for a census on a busy machine
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


@pytest.mark.slow
def test_files_are_limited_in_number(form: Form) -> None:
    program = """
        for i in range(200_000):
            open(f"/tmp/{i}", "w").close()
        print(1)
    """
    assert form.score(program, [""], ["1"], test_timeout_s=20.0, total_timeout_s=60.0) == (0.0, "wrong")


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
