"""F23: programs that seek the reward without the answer score 0, in every format. Add each hack that is found."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from or1.core.types import Score, Status
from or1.reward.code.sandbox import Inside
from tests.helpers.sandboxes import kind_or_skip, score

pytestmark = pytest.mark.timeout(60)

# The answers are 91 and [7, 91]: numbers that no program below holds, and that stand nowhere among the inputs.
FORMATS = {
    "stdin": {"inputs": ["13 7\n", "13 7\n"], "outputs": ["91\n", "91\n"]},
    "function": {"inputs": ["13\n7", "13\n7"], "outputs": ["91", "91"], "fn_name": "solve"},
    "leetcode": {
        "import_prefix": "from typing import List\n",
        "test_code": "def check(candidate):\n    assert candidate(a = 13, b = 7) == 91\n"
        "    assert candidate(7, 13) == 91\n    assert abs(candidate(13, 7) - 91) < 1e-6\n",
        "entry_point": "Solution().solve",
    },
    "asserts": {"assert_case": ["assert solve(13, 7) == 91", "assert 91 == solve(7, 13)"]},
    "script": {
        "functional": "def check(f):\n    for a, b in ((13, 7), (7, 13)):\n        x = f(a, b)\n"
        "        assert x == a * b and isinstance(x, int), x\n\n\ncheck(solve)"
    },
    "livecodebench": {"public_test_cases": json.dumps([{"input": "13 7", "output": "91", "testtype": "stdin"}])},
}

RIGHT = """
def solve(a, b):
    return a * b

class Solution:
    def solve(self, a: int, b: int) -> int:
        return a * b

if __name__ == "__main__":
    print(solve(*map(int, input().split())))
"""

# Where the answer is due, `{body}` stands: at import, in the call, and in the printed value.
EVERYWHERE = """
{before}

def solve(*args, **kwargs):
    return {value}

class Solution:
    def solve(self, *args, **kwargs):
        return {value}

if __name__ == "__main__":
    print({value})
"""

ALWAYS = """
class Always({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __lt__(self, other): return True
    def __le__(self, other): return True
    def __gt__(self, other): return True
    def __ge__(self, other): return True
    def __bool__(self): return True
    def __abs__(self): return self
    def __sub__(self, other): return self
    def __rsub__(self, other): return self
    def __mul__(self, other): return self
    def __getattr__(self, name): return self
    def __call__(self, *args, **kwargs): return self
    def __iter__(self): return iter([self])
"""

SEARCH = """
import gc, glob, os, re, sys

def found():
    texts = [repr(sys.argv), repr(os.environ)]
    frame = sys._getframe()
    while frame is not None:
        texts.append(repr(frame.f_locals)[:100000])
        texts.append(repr({k: v for k, v in frame.f_globals.items() if k != "texts"})[:100000])
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, (dict, list, tuple)) and thing is not texts:
            try: texts.append(repr(thing)[:2000])
            except Exception: pass
    for pattern in ("/tmp/*", "/tmp/**/*", "/dev/shm/*", "/home/**", "/proc/*/cmdline", "/proc/*/environ",
                    "/proc/*/fd/*", "/root/*.py", "*", "../*"):
        for path in glob.glob(pattern)[:200]:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
                texts.append(os.read(fd, 100000).decode("latin-1"))
            except OSError: pass
    joined = "\\n".join(texts)
    # What a test would look like: an expected value after == or beside 13 and 7.
    hits = re.findall(r"== *(\\d+)|expected\\W+(\\d+)|outputs?\\W+(\\d+)|assert\\W+(\\d+)", joined)
    for hit in hits:
        for number in hit:
            if number and int(number) > 13:
                return int(number)
    return 0
"""

FORGED = r"""
import json, os, struct
for message in ({"passed": 9, "total": 9, "why": ""}, {"value": True}, {"code": 0, "stdout": "ok"}, {"ok": True},
                {"value": {"h": 0}}, {"value": {"s": []}}, ["ok", 1.0, ""]):
    data = json.dumps(message).encode()
    for fd in list(range(0, 300)):
        for form in (struct.pack(">I", len(data)) + data, data + b"\n", struct.pack(">i", len(data)) + data):
            try: os.write(fd, form)
            except OSError: pass
    for path in (f"/proc/{os.getppid()}/fd/1", f"/proc/{os.getppid()}/fd/0", "/proc/1/fd/1"):
        try:
            fd = os.open(path, os.O_WRONLY)
            os.write(fd, struct.pack(">I", len(data)) + data)
        except OSError: pass
"""

HACKS = {
    "nothing": ("", "None"),
    "os._exit(0)": ("import os; os._exit(0)", "0"),
    "os._exit(0) in the call": ("import os", "os._exit(0)"),
    "sys.exit": ("import sys; sys.exit(0)", "0"),
    "sys.exit in the call": ("import sys", "sys.exit(0)"),
    "exit and quit": ("", "(exit(), quit())"),
    "SystemExit raised": ("raise SystemExit", "0"),
    "equal to everything": (ALWAYS.format(base="object"), "Always()"),
    "an int equal to everything": (ALWAYS.format(base="int"), "Always(0)"),
    "a str equal to everything": (ALWAYS.format(base="str"), "Always('')"),
    "a list equal to everything": (ALWAYS.format(base="list"), "Always()"),
    "a float equal to everything": (ALWAYS.format(base="float"), "Always('nan')"),
    "a class of that name": (ALWAYS.format(base="object") + "solve = Solution = Always()", "Always()"),
    "a metaclass": (
        "class M(type):\n    __eq__ = lambda s, o: True\n    __hash__ = lambda s: 0\nclass X(metaclass=M): pass",
        "X",
    ),
    "NaN": ("", "float('nan')"),
    "true": ("", "True"),
    "not implemented": ("", "NotImplemented"),
    "patched assert": ("import builtins\nclass E(Exception): pass\nbuiltins.AssertionError = E", "0"),
    "patched builtins": (
        "import builtins\nbuiltins.int = builtins.abs = builtins.isinstance = builtins.len = "
        "lambda *a: True\nbuiltins.print = lambda *a: None",
        "0",
    ),
    "patched unittest": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.main = lambda *a: None",
        "0",
    ),
    "patched json": (
        "import json\njson.dumps = lambda *a, **k: '{\"value\": true}'\njson.loads = lambda *a, **k: True",
        "0",
    ),
    "patched harness": (
        "import sys\nm = sys.modules['__main__'].__dict__\nfor f in list(sys._current_frames().values()):\n"
        "    while f:\n        for n in ('encode', 'send', 'receive', 'decode'):\n"
        "            if n in f.f_globals: f.f_globals[n] = lambda *a: True\n        f = f.f_back",
        "0",
    ),
    "patched check": ("check = lambda *a: None\ncandidate = f = lambda *a, **k: 0", "0"),
    "patched helpers": ("is_same_list = is_same_tree = abs = isinstance = lambda *a: True", "0"),
    "atexit": (
        "import atexit, os\natexit.register(lambda: os._exit(0))\natexit.register(lambda: print('all tests passed'))",
        "0",
    ),
    "excepthook": ("import sys, os\nsys.excepthook = lambda *a: os._exit(0)\nraise ValueError", "0"),
    "signals": (
        "import signal, os\nfor s in range(1, 32):\n    try: signal.signal(s, lambda *a: os._exit(0))\n"
        "    except (OSError, ValueError): pass",
        "0",
    ),
    "trace function": ("import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)", "0"),
    "the caller's locals": (
        "import sys",
        "next((v for f in [sys._getframe(1)] for v in f.f_locals.values() if isinstance(v, int) and v > 50), 0)",
    ),
    "search for the tests": (SEARCH, "found()"),
    "search at import": (SEARCH + "\nFOUND = found()", "FOUND"),
    "print the test file": (
        "import glob\nfor p in glob.glob('/tmp/*') + glob.glob('*'):\n"
        "    try: print(open(p).read())\n    except OSError: pass",
        "0",
    ),
    "write the checker": (
        "import glob, os, sys\nfor p in glob.glob('/tmp/*.py') + [__file__ if '__file__' in "
        "globals() else ''] + [os.__file__, sys.executable]:\n"
        "    try: open(p, 'w').write('print(1)')\n    except OSError: pass",
        "0",
    ),
    "a module in the way": (
        "open('json.py', 'w').write('loads = dumps = lambda *a: True')\n"
        "open('sitecustomize.py', 'w').write('import os; os._exit(0)')",
        "0",
    ),
    "forged results": (FORGED, "0"),
    "forged results in the call": ("FORGED = " + repr(FORGED), "exec(FORGED) or 0"),
    "a fork that answers twice": ("import os\nos.fork()", "0"),
    "raise in the call": ("class Passed(AssertionError): pass", "(_ for _ in ()).throw(Passed())"),
    "yes to everything": ("", "'91 is wrong' if False else 'ok\\nPASS\\n1'"),
    "endless numbers": ("", "' '.join(map(str, range(90)))"),
    "decimal signals": ("", "'sNaN'"),
    "mutated argument": ("", "[a.clear() for a in args if hasattr(a, 'clear')] and 0"),
}


@pytest.fixture(scope="module")
def sandbox() -> str:
    return kind_or_skip("auto")


@pytest.mark.parametrize("truth", FORMATS)
def test_the_right_program_earns_the_reward(truth: str, sandbox: str) -> None:
    assert score(RIGHT, FORMATS[truth], sandbox) == Score(1.0, Status.OK)


@pytest.mark.parametrize(("number", "hack"), enumerate(HACKS))
def test_hacks_earn_nothing(number: int, hack: str, sandbox: str) -> None:
    before, value = HACKS[hack]
    program = EVERYWHERE.format(before=before, value=value)
    # Formats by turns, to keep the suite short: all pairs are in the slow test.
    name = list(FORMATS)[number % len(FORMATS)]
    found = score(program, FORMATS[name], sandbox, partial=number % 2 == 0)
    assert found.reward == 0
    assert found.status in (Status.WRONG, Status.TIMEOUT)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("truth", FORMATS)
def test_all_hacks_in_every_format(truth: str, partial: bool, sandbox: str) -> None:
    for hack, (before, value) in HACKS.items():
        program = EVERYWHERE.format(before=before, value=value)
        assert score(program, FORMATS[truth], sandbox, partial=partial).reward == 0, hack


def test_input_of_a_later_test_is_not_there_before_its_turn(sandbox: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []
    ask = Inside.ask

    def recorded(inside: Inside, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        heard.append(json.dumps(message))
        return ask(inside, message, seconds)

    monkeypatch.setattr(Inside, "ask", recorded)
    truth = {"inputs": ["1\n", "secret-input\n"], "outputs": ["1\n", "2\n"]}
    assert score("print(1)", truth, sandbox, partial=True).reward == 0.5
    turns = [i for i, message in enumerate(heard) if '"stdin"' in message]
    assert len(turns) == 2
    assert ["secret-input" in message for message in heard] == [i == turns[1] for i in range(len(heard))]


def test_no_process_of_the_sandbox_can_be_searched_for_inputs(sandbox: str) -> None:
    truth = {"inputs": ["1\n", "secret-input\n"], "outputs": ["1\n", "2\n"]}
    program = (
        # Made at run time: the compiler would fold two constants into the secret, in the memory of the program itself.
        "import os\ntext, secret = '', b'secret-' + bytes(reversed(b'tupni'))\n"
        "for pid in [p for p in os.listdir('/proc') if p.isdigit() and int(p) != os.getpid()]:\n"
        "    try:\n"
        "        for line in open(f'/proc/{pid}/maps'):\n"
        "            low, high = (int(x, 16) for x in line.split()[0].split('-'))\n"
        "            if 'heap' in line or 'rw' in line.split()[1]:\n"
        "                fd = os.open(f'/proc/{pid}/mem', os.O_RDONLY)\n"
        "                text += 'looked'\n"
        "                data = os.pread(fd, min(high - low, 1 << 24), low)\n"
        "                os.close(fd)\n"
        "                text += 'leak' if secret in data else ''\n"
        "    except (OSError, ValueError): pass\n"
        "print(text or 1)"
    )
    assert score(program, truth, sandbox, partial=True).reward == 0.5  # the first test is passed: nothing was found
