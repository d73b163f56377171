"""Runs a problem's script of asserts, whose calls go by value to the program in another sandbox: `main` after wire.

No line of the program runs here. What it returns arrives as plain data, so its classes, its __eq__ and whatever it
patched stay where they are.
"""

# ruff: noqa: F821  joined behind wire.py, which defines send, receive, encode and decode

from __future__ import annotations

import ast
import builtins
import os
import sys

MESSAGE_LIMIT = 1 << 30


class Stop(BaseException):
    """A test failed and the rest need not run."""


class Cases:
    """Counts the asserts that ran and passed."""

    def __init__(self, stop):
        self.stop, self.passed, self.total, self.why = stop, 0, 0, ""

    def begin(self):
        self.total += 1

    def ok(self):
        self.passed += 1

    def failed(self, error):
        self.why = self.why or f"{type(error).__name__}: {error}"[:500]
        if self.stop:
            raise Stop


class Remote:
    """An object of the program, known here by number only: attributes and calls go there, comparisons do not."""

    def __init__(self, number):
        self.__dict__["_number"] = number

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return ask({"attribute": name, "of": self._number})

    def __call__(self, *args, **kwargs):
        order = {"call": self._number, "args": [outward(a) for a in args],
                 "kwargs": {k: outward(v) for k, v in kwargs.items()}}  # fmt: skip
        return ask(order, args, kwargs)

    def __bool__(self):
        raise TypeError("an object of the program has no truth value here")


def outward(value):
    """A value for the program."""
    if isinstance(value, Remote):
        return {"h": value._number}
    kept = []
    data = encode(value, kept)
    if kept:
        raise TypeError(f"{type(kept[0]).__name__} cannot be passed to the program")
    return data


def ask(order, args=(), kwargs=None):
    """The program's answer; what it changed of its arguments is changed here too. Raises RuntimeError if it raised."""
    send(1, {"ask": order})
    answer = receive(0, MESSAGE_LIMIT)
    if "value" not in answer:
        raise RuntimeError(answer.get("raised") or next(iter(answer)))
    for mine, theirs in zip(args, answer.get("args", ()), strict=False):
        replace(mine, inward(theirs))
    for key, theirs in answer.get("kwargs", {}).items():
        replace((kwargs or {}).get(key), inward(theirs))
    return inward(answer["value"])


def inward(data):
    """A value of the program."""
    return decode(data, NAMES, Remote)


def replace(mine, theirs):
    """Make a mutable argument equal to what the call made of it."""
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
    """Each assert becomes: begin; try it; ok or failed."""

    def visit_Assert(self, node):
        wrapped = ast.parse(
            "_cases_.begin()\ntry:\n    pass\nexcept _Stop_:\n    raise\nexcept Exception as _error_:\n"
            "    _cases_.failed(_error_)\nelse:\n    _cases_.ok()"
        ).body
        wrapped[1].body = [node]
        return wrapped


def free_names(tree):
    """Names that the script uses and neither defines nor finds: the program must have them."""
    used, made = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else made).add(node.id)
        elif isinstance(node, ast.arg):
            made.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            made.add(node.name)
        elif isinstance(node, ast.alias):
            made.add((node.asname or node.name).partition(".")[0])
    return sorted(used - made - set(NAMES) - set(vars(builtins)))


def main():
    """Script on descriptor 0, questions and at last the counts on descriptor 1."""
    order = receive(0, MESSAGE_LIMIT)
    if order["uid"]:
        os.setgroups([])
        os.setresgid(*[order["uid"]] * 3)
        os.setresuid(*[order["uid"]] * 3)
    sys.path += order["path"]
    sys.setrecursionlimit(50_000)
    cases = Cases(order["stop"])
    NAMES.update({"__name__": "tests", "_cases_": cases, "_Stop_": Stop})
    # What the tests print must not stand among the messages.
    sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        exec(compile(PRELUDE, "prelude.py", "exec"), NAMES)
        exec(compile(order["setup"], "setup.py", "exec"), NAMES)
        tree = ast.fix_missing_locations(Count().visit(ast.parse(order["script"])))
        for name in free_names(tree):
            send(1, {"ask": {"name": name}})
            answer = receive(0, MESSAGE_LIMIT)
            if "value" in answer:
                NAMES[name] = inward(answer["value"])
        exec(compile(tree, "tests.py", "exec"), NAMES)
    except Stop:
        pass
    except Lost:
        return
    except BaseException as error:
        cases.total += 1
        cases.why = cases.why or f"{type(error).__name__}: {error}"[:500]
    send(1, {"passed": cases.passed, "total": cases.total, "why": cases.why})


NAMES = {}
main()
