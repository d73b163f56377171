"""The runner: it executes one program of the policy in forked children, on orders from the grader.

The program never runs in this process. Each run with standard input is a new child, whose processes and files are
removed before the next run. Calls go to one child that has loaded the program and keeps its objects. Inputs arrive one
at a time, and answers are sent without comparison.
"""

# ruff: noqa: F821  follows wire.py (send, receive, encode, decode, Lost), guard.py (hide_process, leave_process_one,
# die_with_parent, call_filter, refuse_calls) and cleaning.py (own_processes, end_all_others, empty_scratch) in one
# script, in which PRELUDE is the text of prelude.py

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
# Seconds after its limit at which a child may end: it may have ended in time while this process was not scheduled.
SLACK_S = 0.25


def main():
    """Read orders from descriptor 0 and write answers to descriptor 1 until the grader closes them.

    The first answer precedes the program, so that the program is the cause of every later death.
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
        program = Program(code, setup, names=names, limits=order["limits"], alone=alone, shown=order["shown"])
        # Once for all children, since installing a filter takes longer than a fork.
        refuse_calls(rules)
        while True:
            order = receive(0, MESSAGE_LIMIT)
            try:
                answer = program.run(order["stdin"]) if "stdin" in order else program.call(order)
            except OSError as error:
                # No child could be forked, or a child's files could not be removed.
                answer = {"failed": str(error)}
            send(1, answer)


class Program:
    """The compiled program and the child that has loaded it, if one lives."""

    def __init__(self, code, setup, *, names, limits, alone, shown):
        self.code, self.setup, self.names, self.limits = code, setup, names, limits
        self.alone, self.shown = alone, shown
        # Standard streams for all runs, since the filter denies memfd_create.
        self.streams = [os.memfd_create(name) for name in ("stdin", "stdout", "stderr")]
        # Library functions that programs use without an import. A program's own definitions shadow them.
        vars(builtins).update({name: value for name, value in names.items() if name not in vars(builtins)})
        # Objects that exist now are none of the program's files, so `flush_files` need not visit them.
        gc.freeze()
        self.pid = self.orders = self.answers = None

    def run(self, text):
        """Run the program as a script. Return {"stdout", "code"} or {"timeout"}. Raises OSError."""
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
        """Pass an order to the child that has loaded the program. Return its answer, {"timeout"} or {"died"}."""
        deadline = time.monotonic() + self.limits["test_s"]
        if self.pid is None:
            self.load()
        try:
            send(self.orders, order)
            # A child that sends half a message and stops blocks this process until the grader's deadline.
            if select.select([self.answers], [], [], max(0, deadline - time.monotonic()))[0]:
                answer = receive(self.answers, self.limits["output_bytes"])
                if time.monotonic() < deadline + SLACK_S:
                    # The child is under the program's control. Only this process may report "failed" or "timeout".
                    forged = not isinstance(answer, dict) or "failed" in answer or "timeout" in answer
                    return {"died": "no answer"} if forged else answer
            answer = {"timeout": True}
        except (Lost, OSError) as error:
            answer = {"died": str(error)}
        self.unload()
        self.clean()
        return answer

    def clean(self):
        """Remove all processes and files of this test before the next one. Raises OSError."""
        if self.alone:
            end_all_others()
            empty_scratch(self.shown)

    def load(self):
        theirs, self.orders = os.pipe()
        self.answers, ours = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            null = os.open("/dev/null", os.O_RDWR)
            # Descriptors below RLIMIT_NOFILE.
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
        """Set up a child: standard streams, no other descriptor but `keep`, and the limits."""
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
        # Python without site starts faster and reads no .pth files, but lacks these two.
        builtins.exit = builtins.quit = sys.exit
        # Signals to the program's process group must not reach the runner.
        if self.alone:
            os.setsid()
        die_with_parent()
        sys.setrecursionlimit(50_000)
        limit_resources(self.limits)

    def execute(self, name):
        """Run setup and program in a child as the module `name`, then exit as a script does. Never return."""
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
    """Load the program in a child, then answer orders to look up names and call objects. Never return."""
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
    """The program's globals, and the objects that the checker refers to by number.

    names  globals of the program, then the prelude
    given  globals from before the program ran, which are not the program's own
    """

    def __init__(self, names, given):
        self.names, self.given = names, given
        self.handles, self.numbers = [], {}

    def own(self, name):
        """Return a global that the program itself set. Raises NameError."""
        namespace = self.names.maps[0]
        if name not in namespace or (name in self.given and self.given[name] is namespace[name]):
            raise NameError(f"name {name!r} is not defined")
        return namespace[name]

    def obey(self, order):
        """Execute one order (a global name, an operation on an object, or a call) and return the answer."""
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
        """Return the function under test: a method of Solution, else a global. Raises NameError."""
        solution = self.names.maps[0].get("Solution")
        if solution is not None and hasattr(solution, name):
            return getattr(solution(), name)
        return self.own(name)

    def call(self, target, order):
        """Call a function by value. If it returns None, the answer includes the arguments that it changed in place."""
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
        """Return the JSON of a value that is not plain data: an array as lists, any other object as a number."""
        if type(value).__module__ in ("numpy", "array") and hasattr(value, "tolist"):
            return self.data(value.tolist())
        if type(value) in (type({}.keys()), type({}.values()), type({}.items())):
            return self.data(list(value))
        if id(value) not in self.numbers:
            self.handles.append(value)
            self.numbers[id(value)] = len(self.handles) - 1
        # Not isinstance, which trusts the object's own __class__.
        traits = (("__next__", "iterator"), ("__iter__", "iterable"))
        kind = next((kind for method, kind in traits if hasattr(type(value), method)), "")
        return {"h": {"number": self.numbers[id(value)], "kind": kind}}


def leave_orderly():
    """Wait for threads, then call exit handlers, as the interpreter does at the end of a script."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()


def array(kind, values):
    """Return a numpy array of numbers, booleans or text that the tests pass to the program."""
    import numpy

    return numpy.array(values, dtype=kind)


def flush_files():
    """Flush all open files, text before bytes, as the interpreter does when it ends."""
    kinds = ((io.TextIOWrapper,), (io.BufferedWriter, io.BufferedRandom))
    found = gc.get_objects()
    for file in (sys.__stdout__, sys.stdout, sys.stderr, *(o for kind in kinds for o in found if type(o) in kind)):
        with contextlib.suppress(Exception):
            file.flush()


def limit_resources(limits):
    """Set hard limits for this process and its children, which neither can raise again."""
    for name, value in (
        ("RLIMIT_AS", limits["memory_bytes"]),
        ("RLIMIT_CPU", int(limits["cpu_s"])),
        ("RLIMIT_FSIZE", limits["output_bytes"]),
        ("RLIMIT_NPROC", limits["processes"]),
        # The buffers of sockets and pipes count for no process.
        ("RLIMIT_NOFILE", 96),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MEMLOCK", 0),
    ):
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def wait(pid, seconds):
    """Return the exit code of a child, or kill the child after `seconds` and return None."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        left = deadline - time.monotonic()
        if done:
            # A program must not gain time by stopping this process with a signal.
            return os.waitstatus_to_exitcode(status) & 255 if left > -SLACK_S else None
        if left <= 0:
            break
        # Returns as soon as a child ends. The cap is for a signal that arrived between the two calls.
        signal.sigtimedwait({signal.SIGCHLD}, min(left, 0.5))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def contents(fd, limits):
    """Return the output of a child as text."""
    size = min(os.lseek(fd, 0, os.SEEK_END), limits["output_bytes"])
    return os.pread(fd, size, 0).decode("utf-8", "replace")


def prelude_names():
    """Return the prelude's globals for the program."""
    names = {}
    exec(compile(PRELUDE, "prelude.py", "exec"), names)
    return {name: value for name, value in names.items() if not name.startswith("__")}


main()
