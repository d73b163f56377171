"""Runs one program of the policy in children of its own, on orders from the grader: `main` after wire and prelude.

This process itself never runs any of the program. Each run with standard input is a new child; calls go to one child
that has loaded the program and keeps its objects. Inputs come one at a time, answers go back as they are.
"""

# ruff: noqa: F821  joined behind wire.py, which defines send, receive, encode, decode and Lost

from __future__ import annotations

import atexit
import builtins
import contextlib
import os
import resource
import select
import signal
import sys
import time

MESSAGE_LIMIT = 1 << 30


def main():
    """Orders on descriptor 0, answers on descriptor 1; ends when the grader closes."""
    order = receive(0, MESSAGE_LIMIT)
    limits = order["limits"]
    if order["uid"]:
        os.setgroups([])
        os.setresgid(*[order["uid"]] * 3)
        os.setresuid(*[order["uid"]] * 3)
    sys.path += order["path"]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    names = prelude_names()
    try:
        compile(order["setup"], "setup.py", "exec")
        code = compile(order["program"], "solution.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        send(1, {"error": f"{type(error).__name__}: {error}"})
        return
    send(1, {"uid": os.getuid()})
    program = Program(code, order["setup"], names, limits)
    with contextlib.suppress(Lost):
        while True:
            order = receive(0, MESSAGE_LIMIT)
            send(1, program.run(order["stdin"]) if "stdin" in order else program.call(order))


class Program:
    """The compiled program and the child that has loaded it, if one lives."""

    def __init__(self, code, setup, names, limits):
        self.code, self.setup, self.names, self.limits = code, setup, names, limits
        self.pid = self.orders = self.answers = None

    def run(self, text):
        """Run it as a script: {"stdout", "code"} or {"timeout"}."""
        stdin, stdout, stderr = (os.memfd_create(name) for name in ("stdin", "stdout", "stderr"))
        view = memoryview(text.encode("utf-8", "surrogatepass"))
        while view:
            view = view[os.write(stdin, view) :]
        os.lseek(stdin, 0, os.SEEK_SET)
        pid = os.fork()
        if pid == 0:
            self.enter(stdin, stdout, stderr, keep=())
            self.execute("__main__")
        code = wait(pid, self.limits["test_s"])
        answer = {"timeout": True} if code is None else {"code": code, "stdout": contents(stdout, self.limits)}
        if code:
            answer["stderr"] = contents(stderr, self.limits)[-2000:]
        for fd in (stdin, stdout, stderr):
            os.close(fd)
        return answer

    def call(self, order):
        """Pass an order to the child that has loaded the program: its answer, {"timeout"} or {"died"}."""
        deadline = time.monotonic() + self.limits["test_s"]
        if self.pid is None:
            self.load()
        try:
            send(self.orders, order)
            # A child that sends half a message and stops must not hold this process: see the deadline in the grader.
            if select.select([self.answers], [], [], max(0, deadline - time.monotonic()))[0]:
                return receive(self.answers, self.limits["output_bytes"])
            answer = {"timeout": True}
        except (Lost, OSError) as error:
            answer = {"died": str(error)}
        self.unload()
        return answer

    def load(self):
        theirs, self.orders = os.pipe()
        self.answers, ours = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            null, quiet = os.open("/dev/null", os.O_RDWR), os.memfd_create("stdout")
            orders, answers = os.dup2(theirs, 200), os.dup2(ours, 201)
            self.enter(null, quiet, quiet, keep=(orders, answers))
            serve(self, orders, answers)
        os.close(theirs)
        os.close(ours)

    def unload(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.orders)
        os.close(self.answers)
        self.pid = None

    def enter(self, stdin, stdout, stderr, keep):
        """In the child: standard streams, nothing else open, limits."""
        for target, fd in enumerate((stdin, stdout, stderr)):
            os.dup2(fd, target)
        low = 3
        for fd in sorted(keep):
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, 4096)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        for name in ("stdin", "stdout", "stderr"):
            setattr(sys, name, open(("stdin", "stdout", "stderr").index(name), "r" if name == "stdin" else "w",
                                    encoding="utf-8", closefd=False))  # fmt: skip
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
        sys.argv = ["solution.py"]
        # Python without site, which starts faster and sees no .pth files, lacks these two.
        builtins.exit = builtins.quit = sys.exit
        sys.setrecursionlimit(50_000)
        limit_resources(self.limits)

    def execute(self, name):
        """In the child: run setup and program under `name`, then leave as a script would. Never returns."""
        code = 1
        try:
            namespace = self.namespace(name)
            try:
                exec(self.code, namespace)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else int(error.code is not None)
            leave_orderly()
        except BaseException as error:
            code = code or 1
            sys.stderr.write(f"{type(error).__name__}: {error}")
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code & 255)

    def namespace(self, name):
        namespace = dict(self.names) | {"__name__": name, "__builtins__": __builtins__}
        module = type(sys)(name)
        module.__dict__.update(namespace)
        sys.modules[name] = module
        exec(compile(self.setup, "setup.py", "exec"), module.__dict__)
        return module.__dict__


def serve(program, orders, answers):
    """In the child: load the program, then look up and call what is asked for. Never returns."""
    try:
        namespace = program.namespace("solution")
        error = None
        try:
            exec(program.code, namespace)
        except BaseException as caught:
            error = caught
        handles = []
        while True:
            order = receive(orders, MESSAGE_LIMIT)
            try:
                if error is not None:
                    raise error
                answer = obey(order, namespace, handles)
            except BaseException as caught:
                answer = {"raised": f"{type(caught).__name__}: {caught}"[:1000]}
            send(answers, answer)
    finally:
        os._exit(0)


def obey(order, namespace, handles):
    """One order: a global name, a function or method of Solution, an attribute, or a call of a handle."""
    if "name" in order:
        return {"value": encode(namespace[order["name"]], handles)}
    if "attribute" in order:
        return {"value": encode(getattr(handles[order["of"]], order["attribute"]), handles)}
    if "function" in order:
        target = namespace.get(order["function"])
        if target is None or ("Solution" in namespace and hasattr(namespace["Solution"], order["function"])):
            target = getattr(namespace["Solution"](), order["function"])
    else:
        target = handles[order["call"]]

    def local(data):
        return decode(data, namespace, handles.__getitem__)

    arguments = [local(item) for item in order["args"]]
    keywords = {key: local(item) for key, item in order["kwargs"].items()}
    value = target(*arguments, **keywords)
    answer = {"value": encode(value, handles)}
    after = [encode(item, handles) for item in arguments]
    after_keywords = {key: encode(item, handles) for key, item in keywords.items()}
    if after != order["args"] or after_keywords != order["kwargs"]:
        answer |= {"args": after, "kwargs": after_keywords}
    return answer


def leave_orderly():
    """As the interpreter ends a script: wait for its threads, then call what it registered."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()


def limit_resources(limits):
    """For this process and all that it starts; there is no way back up."""
    for name, value in (
        ("RLIMIT_AS", limits["memory_bytes"]),
        ("RLIMIT_CPU", int(limits["cpu_s"])),
        ("RLIMIT_FSIZE", limits["output_bytes"]),
        ("RLIMIT_NPROC", limits["processes"]),
        ("RLIMIT_NOFILE", 256),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
    ):
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def wait(pid, seconds):
    """Exit code of a child, or None after killing it at its limit."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) & 255
        left = deadline - time.monotonic()
        if left <= 0:
            break
        # Wakes at once when a child ends; the cap is for a signal that came between the two calls.
        signal.sigtimedwait({signal.SIGCHLD}, min(left, 0.5))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def contents(fd, limits):
    """What a child wrote, as text."""
    size = min(os.lseek(fd, 0, os.SEEK_END), limits["output_bytes"])
    return os.pread(fd, size, 0).decode("utf-8", "replace")


def prelude_names():
    """The prelude's names, as the program shall see them."""
    names = {}
    exec(compile(PRELUDE, "prelude.py", "exec"), names)
    return names


main()
