"""The checker: it runs a problem's script of asserts and passes its calls by value to the program in another sandbox.

The program never runs in this process. Its results arrive as plain data, so its classes, its __eq__ and its patches
have no effect here.
"""

# ruff: noqa: F821  follows wire.py and guard.py in one script, which define send, receive, encode, decode, Lost,
# hide_process, leave_process_one, call_filter and refuse_calls

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import importlib.util
import os
import sys

MESSAGE_LIMIT = 1 << 30


class Stop(BaseException):
    """A test failed, and the rest of the script need not run."""


class UnsupportedError(BaseException):
    """The tests use an operation that is impossible by value. Not an Exception, so that no test can catch it."""


class Cases:
    """The assert statements that ran, and those that failed at least once."""

    def __init__(self, stop):
        self.stop, self.ran, self.failures, self.why = stop, set(), set(), ""

    def begin(self, number):
        self.ran.add(number)

    def failed(self, number, error):
        self.failures.add(number)
        self.why = self.why or f"{type(error).__name__}: {error}"[:500]
        if self.stop:
            raise Stop


class Remote:
    """A proxy of an object in the program, by number: attributes and calls are forwarded, comparisons are not."""

    def __init__(self, number):
        self.__dict__["_number"] = number

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return ask({"attribute": name, "of": self._number})

    def __call__(self, *args, **kwargs):
        order = {
            "call": self._number,
            "args": [outward(a) for a in args],
            "kwargs": {k: outward(v) for k, v in kwargs.items()},
        }
        return ask(order, args, kwargs)

    def __bool__(self):
        return ask({"truth": self._number}) is True

    def __len__(self):
        return ask({"length": self._number})

    def __getitem__(self, item):
        return ask({"item": outward(item), "of": self._number})

    def __setattr__(self, name, value):
        ask({"set": name, "of": self._number, "to": outward(value)})


class RemoteIterable(Remote):
    """A proxy of an iterable object in the program."""

    def __iter__(self):
        return ask({"iterate": self._number})


class RemoteIterator(Remote):
    """A proxy of an iterator in the program, which computes each value on demand."""

    def __iter__(self):
        return self

    def __next__(self):
        answer = exchange({"next": self._number})
        if "end" in answer:
            raise StopIteration
        return inward(answer["value"])


class Missing:
    """A placeholder for a name that the program does not define. Every use raises NameError."""

    def __init__(self, name):
        self.__dict__["_name"] = name

    def __getattr__(self, name):
        raise NameError(f"name {self._name!r} is not defined")

    def __call__(self, *args, **kwargs):
        raise NameError(f"name {self._name!r} is not defined")


def outward(value):
    """Return a value as JSON for the program."""
    return encode(value, keep)


def keep(value):
    """Return the JSON of a proxy (its number) or of a numpy array. Raises UnsupportedError for other objects."""
    if isinstance(value, Remote):
        return {"h": {"number": value._number}}
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return {"h": {"array": [str(value.dtype), value.tolist()]}} if value.ndim else encode(value.item(), keep)
    raise UnsupportedError(f"the tests pass a {type(value).__name__} to the program, which cannot go by value")


def exchange(order):
    """Return the program's answer to one order. Raises the exception that the program raised; see `raised`."""
    send(1, {"ask": order})
    answer = receive(0, MESSAGE_LIMIT)
    if "value" not in answer and "end" not in answer:
        raise raised(answer)
    return answer


def raised(answer):
    """Return the exception that the program raised, as the nearest builtin class."""
    text = str(answer.get("raised") or next(iter(answer), "no answer"))
    for name in answer.get("kinds", ()):
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception) and name not in UNHEARD:
            try:
                return kind(text)
            except TypeError:  # UnicodeDecodeError and similar classes require more arguments
                continue
    return RuntimeError(text)


def ask(order, args=(), kwargs=None):
    """Return the program's value. If the value is None, apply the program's changes to the mutable arguments."""
    answer = exchange(order)
    value = inward(answer.get("value"))
    if value is None:
        for mine, theirs in zip(args, answer.get("args", ()), strict=False):
            replace(mine, inward(theirs))
        for key, theirs in answer.get("kwargs", {}).items():
            replace((kwargs or {}).get(key), inward(theirs))
    return value


def inward(data):
    """Return a value that the program sent."""
    return decode(data, NAMES, remote)


def remote(body):
    """Return a proxy of an object in the program."""
    return {"iterator": RemoteIterator, "iterable": RemoteIterable}.get(body.get("kind"), Remote)(body["number"])


def replace(mine, theirs):
    """Copy the program's version of a mutable argument into the script's."""
    if type(mine) is not type(theirs):
        return
    if isinstance(mine, list):
        mine[:] = theirs
    elif isinstance(mine, dict | set):
        mine.clear()
        mine.update(theirs)
    elif type(mine).__name__ in ("ListNode", "TreeNode"):
        vars(mine).update(vars(theirs))


class Count(ast.NodeTransformer):
    """A transformer that makes each assert record its run and its failure. A statement counts once, even in a loop."""

    def __init__(self):
        self.statements = 0

    def visit_Assert(self, node):
        number, self.statements = self.statements, self.statements + 1
        wrapped = ast.parse(
            f"_cases_.begin({number})\ntry:\n    pass\nexcept Exception as _error_:\n"
            f"    _cases_.failed({number}, _error_)"
        ).body
        wrapped[1].body = [node]
        return wrapped


def main():
    """Read the script from descriptor 0. Write questions and finally the counts to descriptor 1."""
    leave_process_one()
    order = receive(0, MESSAGE_LIMIT)
    if order["uid"]:
        os.setgroups([])
        os.setresgid(*[order["uid"]] * 3)
        os.setresuid(*[order["uid"]] * 3)
    hide_process()
    refuse_calls(call_filter(os.uname().machine))
    sys.path += order["path"]
    sys.setrecursionlimit(50_000)
    # Output of the tests must not mix with the messages.
    sys.stdout = sys.stderr = open(os.devnull, "w")
    send(1, {})
    with contextlib.suppress(Lost):
        order = receive(0, MESSAGE_LIMIT)
        try:
            send(1, counts(order, Cases(order["stop"])))
        except UnsupportedError as error:
            send(1, {"unsupported": str(error)})


def counts(order, cases):
    """Run the script and return {"passed", "total", "why"}.

    passed  assert statements that ran and never failed
    total   statements that ran if none failed, since a script may have asserts for cases that do not occur; else all
    why     first failure
    """
    NAMES.update({"__name__": "__main__", "_cases_": cases})
    counter, error = Count(), None
    try:
        exec(compile(PRELUDE, "prelude.py", "exec"), NAMES)
        tree = ast.parse(order["script"])
        require_modules(ast.parse(order["setup"]), tree)
        run_setup(order["setup"])
        tree = ast.fix_missing_locations(counter.visit(tree))
        found = [take(name) for name in order["names"]]
        if all(found):
            exec(compile(tree, "tests.py", "exec", dont_inherit=True), NAMES)
    except Stop:
        pass
    except (Lost, UnsupportedError):
        raise
    except BaseException as caught:
        error = caught
        cases.why = cases.why or f"{type(error).__name__}: {error}"[:500]
    passed = len(cases.ran - cases.failures)
    whole = cases.ran and not cases.failures and error is None
    total = passed if whole else max(counter.statements, passed + 1)
    return {"passed": passed, "total": total, "why": cases.why}


def require_modules(*trees):
    """Raise UnsupportedError if the tests import a module that is not installed."""
    for tree in trees:
        for node in ast.walk(tree):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else names
            for name in names:
                if name and importlib.util.find_spec(name.partition(".")[0]) is None:
                    raise UnsupportedError(f"the tests import {name}, which is not installed here")
                if name and name.partition(".")[0] == "numpy":
                    refuse_empty_comparisons()


def run_setup(source):
    """Run the setup of the tests. Raises UnsupportedError if the setup fails."""
    try:
        exec(compile(source, "setup.py", "exec", dont_inherit=True), NAMES)
    except Exception as error:
        raise UnsupportedError(f"the setup of the tests fails: {type(error).__name__}: {error}"[:500]) from None


def refuse_empty_comparisons():
    """Make numpy's comparisons reject an empty array against a non-empty one, which broadcasting makes equal."""
    import numpy
    import numpy.testing

    def guarded(compare):
        @functools.wraps(compare)
        def compared(actual, desired, *args, **kwargs):
            sizes = numpy.size(actual), numpy.size(desired)
            if 0 in sizes and any(sizes):
                raise AssertionError(f"{sizes[0]} values are compared with {sizes[1]}")
            return compare(actual, desired, *args, **kwargs)

        return compared

    for place, names in (
        (numpy, ("allclose", "isclose", "array_equiv")),
        (
            numpy.testing,
            (
                "assert_allclose",
                "assert_almost_equal",
                "assert_array_almost_equal",
                "assert_array_equal",
                "assert_equal",
            ),
        ),
    ):
        for name in names:
            setattr(place, name, guarded(getattr(place, name)))


def take(name):
    """Bind a name under test to the program's object. Return whether the program defines the name."""
    try:
        NAMES[name] = ask({"name": name})
    except Exception:
        NAMES[name] = Missing(name)
        return False
    return True


NAMES = {}
# These would silently end loops and generators of the tests.
UNHEARD = ("StopIteration", "StopAsyncIteration")
main()
