"""Runs one program of the policy in children of its own, on orders from the grader: `main` after wire and prelude.

This process itself never runs any of the program. Each run with standard input is a new child, and leaves nothing to
the next. Calls go to one child that has loaded the program and keeps its objects. Inputs come one at a time, answers
go back as they are.
"""

# ruff: noqa: F821  joined behind wire.py (send, receive, encode, decode, Lost), guard.py (hide_process,
# leave_process_one, die_with_parent, call_filter, refuse_calls) and cleaning.py (own_processes, end_all_others,
# empty_scratch)

from __future__ import annotations

import atexit
import builtins
import collections
import contextlib
import gc
import io
import os
import resource
import select
import signal
import sys
import time

MESSAGE_LIMIT = 1 << 30
# A child that ended this much after its limit may have ended in time, with this process not scheduled.
SLACK_S = 0.25


def main():
    """Orders on descriptor 0, answers on descriptor 1; ends when the grader closes.

    The first answer comes before the program is there, so that a death after it is the program's doing.
    """
    leave_process_one()
    order = receive(0, MESSAGE_LIMIT)
    if order["uid"]:
        os.setgroups([])
        os.setresgid(*[order["uid"]] * 3)
        os.setresuid(*[order["uid"]] * 3)
    hide_process()
    sys.path += order["path"]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    names = prelude_names()
    rules, alone = call_filter(os.uname().machine), own_processes(order["outside"])
    send(1, {"filter": rules is not None, "alone": alone})
    with contextlib.suppress(Lost):
        source = receive(0, MESSAGE_LIMIT)
        try:
            # Neither may inherit this file's `from __future__ import annotations`.
            setup = compile(source["setup"], "setup.py", "exec", dont_inherit=True)
            code = compile(source["program"].removeprefix("\ufeff"), "solution.py", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            send(1, {"error": f"{type(error).__name__}: {error}"})
            return
        send(1, {})
        program = Program(code, setup, names, order["limits"], alone, order["shown"])
        # Once, for all children: to check a filter takes the kernel longer than a fork.
        refuse_calls(rules)
        while True:
            order = receive(0, MESSAGE_LIMIT)
            try:
                answer = program.run(order["stdin"]) if "stdin" in order else program.call(order)
            except OSError as error:
                # No child could be made, or what one left could not be removed.
                answer = {"failed": str(error)}
            send(1, answer)


class Program:
    """The compiled program and the child that has loaded it, if one lives."""

    def __init__(self, code, setup, names, limits, alone, shown):
        self.code, self.setup, self.names, self.limits = code, setup, names, limits
        self.alone, self.shown = alone, shown
        # Standard streams of every run, since the filter allows no new memfd.
        self.streams = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
        # Library functions that programs use without an import; what a program defines itself comes before them.
        vars(builtins).update({name: value for name, value in names.items() if name not in vars(builtins)})
        # What exists by now is none of the program's files, and is not looked through when a test ends.
        gc.freeze()
        self.pid = self.orders = self.answers = None

    def run(self, text):
        """Run it as a script: {"stdout", "code"} or {"timeout"}. Raises OSError."""
        for fd in self.streams:
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
        stdin, stdout, stderr = self.streams
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
        self.clean()
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
                answer = receive(self.answers, self.limits["output_bytes"])
                if time.monotonic() < deadline + SLACK_S:
                    # The child is the program: only this process may say that the machine failed, or time is up.
                    forged = not isinstance(answer, dict) or "failed" in answer or "timeout" in answer
                    return {"died": "no answer"} if forged else answer
            answer = {"timeout": True}
        except (Lost, OSError) as error:
            answer = {"died": str(error)}
        self.unload()
        self.clean()
        return answer

    def clean(self):
        """Leave no process and no file of this test to the next one. Raises OSError."""
        if self.alone:
            end_all_others()
            empty_scratch(self.shown)

    def load(self):
        theirs, self.orders = os.pipe()
        self.answers, ours = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            null = os.open("/dev/null", os.O_RDWR)
            # Below the limit of open files.
            orders, answers = os.dup2(theirs, 90), os.dup2(ours, 91)
            self.enter(null, null, null, keep=(orders, answers))
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
        for fd, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))
        sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
        sys.argv = ["solution.py"]
        # Python without site, which starts faster and sees no .pth files, lacks these two.
        builtins.exit = builtins.quit = sys.exit
        # Signals to the own process group must not reach the runner.
        if self.alone:
            os.setsid()
        die_with_parent()
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
            flush_files()
            os._exit(code & 255)

    def namespace(self, name):
        """Return the globals of a module called `name` in which the setup has run."""
        module = type(sys)(name)
        module.__dict__["__builtins__"] = __builtins__
        sys.modules[name] = module
        exec(self.setup, module.__dict__)
        return module.__dict__


def serve(program, orders, answers):
    """In the child: load the program, then look up and call what is asked for. Never returns."""
    try:
        namespace = program.namespace("solution")
        given = dict(namespace)
        error = None
        try:
            exec(program.code, namespace)
        except BaseException as caught:
            error = caught
        objects = Objects(collections.ChainMap(namespace, program.names), given)
        while True:
            order = receive(orders, MESSAGE_LIMIT)
            try:
                if error is not None:
                    raise error
                answer = objects.obey(order)
            except BaseException as caught:
                kinds = [kind.__name__ for kind in type(caught).__mro__ if kind.__module__ == "builtins"]
                answer = {"raised": f"{type(caught).__name__}: {caught}"[:1000], "kinds": kinds}
            send(answers, answer)
    finally:
        os._exit(0)


class Objects:
    """What the program has defined, and the objects that it has handed out by number.

    names  globals of the program, then the prelude
    given  globals from before the program ran, which are not its own
    """

    def __init__(self, names, given):
        self.names, self.given = names, given
        self.handles, self.numbers = [], {}

    def own(self, name):
        """Return a global that the program itself has set. Raises NameError."""
        namespace = self.names.maps[0]
        if name not in namespace or (name in self.given and self.given[name] is namespace[name]):
            raise NameError(f"name {name!r} is not defined")
        return namespace[name]

    def obey(self, order):
        """Carry out one order: a global name, what Python asks of an object, or a call."""
        if "name" in order:
            return self.value(self.own(order["name"]))
        if "attribute" in order:
            return self.value(getattr(self.handles[order["of"]], order["attribute"]))
        if "truth" in order:
            return {"value": bool(self.handles[order["truth"]])}
        if "iterate" in order:
            return self.value(iter(self.handles[order["iterate"]]))
        if "length" in order:
            return {"value": len(self.handles[order["length"]])}
        if "item" in order:
            return self.value(self.handles[order["of"]][self.local(order["item"])])
        if "set" in order:
            setattr(self.handles[order["of"]], order["set"], self.local(order["to"]))
            return {"value": None}
        if "next" in order:
            try:
                return self.value(next(self.handles[order["next"]]))
            except StopIteration:
                return {"end": True}
        if "function" in order:
            return self.call(self.function(order["function"]), order)
        return self.call(self.handles[order["call"]], order)

    def function(self, name):
        """Return the function under test, a method of Solution before a global. Raises NameError."""
        solution = self.names.maps[0].get("Solution")
        if solution is not None and hasattr(solution, name):
            return getattr(solution(), name)
        return self.own(name)

    def call(self, target, order):
        """Call a function by value. What it made of its arguments goes back if it returned None, as in-place code."""
        arguments = [self.local(item) for item in order["args"]]
        keywords = {key: self.local(item) for key, item in order["kwargs"].items()}
        value = target(*arguments, **keywords)
        answer = self.value(value)
        if value is None:
            after = [self.data(item) for item in arguments]
            after_keywords = {key: self.data(item) for key, item in keywords.items()}
            if after != order["args"] or after_keywords != order["kwargs"]:
                answer |= {"args": after, "kwargs": after_keywords}
        return answer

    def value(self, value):
        return {"value": self.data(value)}

    def data(self, value):
        return encode(value, self.keep)

    def local(self, data):
        return decode(data, self.names, self.object)

    def object(self, body):
        return array(*body["array"]) if "array" in body else self.handles[body["number"]]

    def keep(self, value):
        """Return the JSON of a value that is no plain data: an array as lists, anything else as a number."""
        if type(value).__module__ in ("numpy", "array") and hasattr(value, "tolist"):
            return self.data(value.tolist())
        if type(value) in (type({}.keys()), type({}.values()), type({}.items())):
            return self.data(list(value))
        if id(value) not in self.numbers:
            self.handles.append(value)
            self.numbers[id(value)] = len(self.handles) - 1
        # Not isinstance, which asks the object's own __class__.
        traits = (("__next__", "iterator"), ("__iter__", "iterable"))
        kind = next((kind for method, kind in traits if hasattr(type(value), method)), "")
        return {"h": {"number": self.numbers[id(value)], "kind": kind}}


def leave_orderly():
    """As the interpreter ends a script: wait for its threads, then call what it registered."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()


def array(kind, values):
    """Return a numpy array of numbers, truth values or text that the tests pass to the program."""
    import numpy

    return numpy.array(values, dtype=kind)


def flush_files():
    """Write out what open files hold back, as the interpreter does when it ends: text first, then bytes."""
    kinds = ((io.TextIOWrapper,), (io.BufferedWriter, io.BufferedRandom))
    found = gc.get_objects()
    for file in (sys.__stdout__, sys.stdout, sys.stderr, *(o for kind in kinds for o in found if type(o) in kind)):
        with contextlib.suppress(Exception):
            file.flush()


def limit_resources(limits):
    """For this process and all that it starts; there is no way back up."""
    for name, value in (
        ("RLIMIT_AS", limits["memory_bytes"]),
        ("RLIMIT_CPU", int(limits["cpu_s"])),
        ("RLIMIT_FSIZE", limits["output_bytes"]),
        ("RLIMIT_NPROC", limits["processes"]),
        # The buffers of a socket or pipe are charged to nobody.
        ("RLIMIT_NOFILE", 96),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
    ):
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def wait(pid, seconds):
    """Exit code of a child, or None if it took longer than its limit, after killing it."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        left = deadline - time.monotonic()
        if done:
            # A program that stops this process with a signal must not gain time by it.
            return os.waitstatus_to_exitcode(status) & 255 if left > -SLACK_S else None
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
    """Return the prelude's names, as the program shall see them."""
    names = {}
    exec(compile(PRELUDE, "prelude.py", "exec"), names)
    return {name: value for name, value in names.items() if not name.startswith("__")}


main()
