"""Forms of the sandbox that attacks are tried in, and what an attack reports."""

from __future__ import annotations

import textwrap
from typing import Any, NamedTuple

from tests.helpers.plain_user import Grader


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
