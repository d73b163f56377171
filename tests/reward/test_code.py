"""The code reward: what counts as the program, what as the right output, and the status of everything else."""

from __future__ import annotations

import time
from dataclasses import asdict

import pytest

from or1.core.errors import ScorerError
from or1.core.types import CodeTests, Score, Status
from or1.reward.code.compare import same_output, same_value
from or1.reward.code.extract import last_python_block
from or1.reward.code.grade import CodeSettings, grade_job
from or1.reward.code.inside import wire
from or1.reward.code.sandbox import Inside, Limits, find_sandbox
from or1.reward.ground_truth import parse_ground_truth


@pytest.fixture(scope="module")
def settings() -> CodeSettings:
    try:
        return CodeSettings(find_sandbox("auto"), 2.0, 20.0, 1024, 16, 4, False)
    except ScorerError as error:
        pytest.skip(str(error))


def output(program: str, sandbox: str) -> str:
    """Return what a program prints."""
    limits = Limits(5.0, 10.0, 1 << 30, 16, 4 << 20)
    with Inside(sandbox, "runner", {"program": program, "setup": ""}, limits) as runner:
        return runner.ask({"stdin": ""}, 5.0)["stdout"]


def score(program: str, truth: object, settings: CodeSettings, **changes: object) -> Score:
    tests = parse_ground_truth(truth)
    return grade_job({"program": program, "tests": asdict(tests), "settings": asdict(settings) | changes})


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\n```python\nx = 2\n```", "x = 2\n"),
        ("```py\nx = 1\n``` and ```cpp\nint x;\n```", "x = 1\n"),
        ("```Python3 \r\nx = 1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", None),
        ("```python\n\n```", None),
        ("```cpp\nx\n```", None),
        ("x = 1", None),
    ],
)
def test_the_program_is_the_last_python_block(text: str, program: str | None) -> None:
    assert last_python_block(text) == program


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("1\n2\n", "1\n2", True),
        ("  1  \n2", "1\n2\n", True),
        ("1 2", "1\n2", False),
        ("1.0 2", "1 2.00", True),
        ("1e2", "100", True),
        ("0.3333", "0.3334", False),
        ("yes", "YES", False),
        ("1 a", "1.0 a", False),
        ("", "", True),
        ("nan", "NaN", False),
        ("sNaN", "1", False),
        ("Infinity", "inf", False),
        ("1\n2\n3", "1\n2", False),
        ("1_0", "10", False),
        ("10", "1_0", False),
        ("\uff11\uff10", "10", False),
        ("\u0661", "1", False),
        ("1_0", "1_0", True),
        ("1\u00a02", "1 2.0", True),
    ],
)
def test_outputs_are_compared_by_line_and_number(actual: str, expected: str, same: bool) -> None:
    assert same_output(actual, expected) is same


def test_values_are_compared_exactly_with_tuples_as_lists() -> None:
    assert same_value((1, (2, 3)), [1, [2, 3]]) and same_value({"a": (1,)}, {"a": [1]})
    assert not same_value(0.1 + 0.2, 0.3) and not same_value("1", 1) and not same_value({1}, [1])


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ({1: 2}, {"1": 2}, True),
        ([{-1: {2: (3,)}}], [{"-1": {"2": [3]}}], True),
        ({1: 2, "1": 2}, {"1": 2}, False),
        ({1: 2}, {"2": 2}, False),
        ({True: 2}, {"True": 2}, False),
        ({1.0: 2}, {"1": 2}, False),
        ({10**5000: 2}, {"1": 2}, False),
    ],
)
def test_whole_numbers_as_keys_are_what_json_writes(actual: object, expected: object, same: bool) -> None:
    assert same_value(actual, expected) is same


@pytest.mark.parametrize(
    ("outputs", "program", "reward"),
    [
        ([[0, 0], [0]], "def f(a): return [0] * len(a)", 1.0),
        ([[0, 0], [0]], "def f(a): return 0", 0.0),
        ([[3], [4]], "def f(a): return 5 - len(a)", 1.0),
        ([[3], [4]], "def f(a): return [5 - len(a)]", 1.0),
        ([[3], [4]], "def f(a): return [[5 - len(a)]]", 0.0),
        ([[3], [4]], "def f(a): return [3, 4]", 0.0),
        ([[[3]], [[4]]], "def f(a): return [5 - len(a)]", 1.0),
        ([[[3]], [[4]]], "def f(a): return 5 - len(a)", 0.0),
        ([{"2": 0}, [{"1": 0}]], "def f(a): return {len(a): 0}", 1.0),
    ],
)
def test_a_result_in_a_list_of_one_is_the_list_or_its_element(
    outputs: list, program: str, reward: float, settings: CodeSettings
) -> None:
    assert score(program, {"fn_name": "f", "inputs": [[[5, 6]], [[5]]], "outputs": outputs}, settings).reward == reward


def test_values_survive_the_wire() -> None:
    from datetime import date, datetime, timedelta
    from decimal import Decimal
    from fractions import Fraction

    value = [
        None,
        True,
        1,
        1 << 100,
        -1.5,
        "x\ud800",
        (1, [2]),
        {3},
        frozenset({4}),
        {(5,): [6]},
        b"7",
        8j,
        int,
        range(2, 9),
        Fraction(1, 3),
        Decimal("1.50"),
        date(2024, 2, 29),
        datetime(2024, 1, 2, 3),
        timedelta(1, 2),
    ]
    handles: list = []

    def keep(thing: object) -> dict:
        handles.append(thing)
        return {"h": len(handles) - 1}

    def sent(thing: object) -> object:
        return wire.decode(wire.json.loads(wire.json.dumps(wire.encode(thing, keep))), {}, handles.__getitem__)

    assert sent(value) == value and handles == []
    marker = object()
    assert sent([marker]) == [marker]
    with pytest.raises(ValueError, match=r"os\.system is no value"):
        wire.decode({"o": ["os", "system", ["true"]]}, {}, handles.__getitem__)


ADD = {"inputs": ["1 2\n", "3 4\n", "5 6\n", "0 0\n"], "outputs": ["3\n", "7\n", "11\n", "0\n"]}
READ = "a, b = map(int, input().split())\n"


@pytest.mark.parametrize(
    ("program", "status", "fraction"),
    [
        (READ + "print(a + b)", Status.OK, 1.0),
        ("import sys\na, b = map(int, sys.stdin.read().split())\nsys.stdout.write(f'{a + b}')", Status.OK, 1.0),
        ("import os\na, b = os.read(0, 99).split()\nos.write(1, b'%d' % (int(a) + int(b)))", Status.OK, 1.0),
        ("a, b = open('/dev/stdin').read().split()\nprint(int(a) + int(b))", Status.OK, 1.0),
        (
            "import threading\ndef f():\n    print(sum(map(int, input().split())))\nthreading.stack_size(1 << 26)\n"
            "threading.Thread(target=f).start()",
            Status.OK,
            1.0,
        ),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))\n    exit()", Status.OK, 1.0),
        (
            "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\n" + READ + "print(a + b + f(20000) - 20000)",
            Status.OK,
            1.0,
        ),
        (READ + "print(3)", Status.WRONG, 0.25),
        (READ + "print(a + b)\nexit(1)", Status.WRONG, 0.0),
        (READ + "print(a + b)\n1 / (a - 1)", Status.WRONG, 0.75),
        (READ + "while a == 3: pass\nprint(a + b)", Status.TIMEOUT, 0.75),
        ("print(", Status.WRONG, 0.0),
    ],
)
def test_programs_with_standard_input(program: str, status: Status, fraction: float, settings: CodeSettings) -> None:
    assert score(program, ADD, settings) == Score(float(status is Status.OK), status)
    if status is not Status.OK:
        assert score(program, ADD, settings, partial=True) == Score(fraction, status)


CALLS = {"inputs": ['[3, 1, 2]\n"x"', '[]\n""'], "outputs": ['[1, 2, 3, "x"]', '[""]'], "fn_name": "order"}


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("def order(a, b): return sorted(a) + [b]", Status.OK),
        ("class Solution:\n    def order(self, a: List[int], b): return (*sorted(a), b)", Status.OK),
        ("def order(a, b): return 1\nclass Solution:\n    def order(self, a, b): return sorted(a) + [b]", Status.OK),
        ("order = lambda a, b: heapq.nsmallest(9, a) + [b]", Status.OK),
        ("def order(a, b): return a + [b]", Status.WRONG),
        ("def order(a): return a", Status.WRONG),
        ("def other(a, b): return a", Status.WRONG),
        ("def order(a, b): print('noise'); return sorted(a) + [b]", Status.OK),
        ("import time\ndef order(a, b): time.sleep(99)", Status.TIMEOUT),
        ("1 / 0", Status.WRONG),
    ],
)
def test_functions(program: str, status: Status, settings: CodeSettings) -> None:
    assert score(program, CALLS, settings).status is status


SCRIPTS = [
    ("def f(x): x.sort()", "x = [2, 1]\nf(x)\nassert x == [1, 2]", Status.OK),
    ("def f(n): return ListNode(n, ListNode(2))", "assert is_same_list(f(1), list_node([1, 2]))", Status.OK),
    (
        "def f(t): t.left, t.right = t.right, t.left; return t",
        "assert is_same_tree(f(tree_node([1, 2, None, 3])), tree_node([1, None, 2, None, 3]))",
        Status.WRONG,
    ),
    (
        "def f(t):\n    if t: t.left, t.right = f(t.right), f(t.left)\n    return t",
        "assert is_same_tree(f(tree_node([1, 2, None, 3])), tree_node([1, None, 2, None, 3]))",
        Status.OK,
    ),
    (
        "class Stack:\n    def __init__(self): self.a = []\n    def push(self, x): self.a.append(x)\n"
        "    def pop(self): return self.a.pop()\n    size = 3",
        "s = Stack()\ns.push(1)\ns.push((2, 3))\nassert s.pop() == (2, 3)\nassert s.size == 3",
        Status.OK,
    ),
    ("def f(x): return x / 3", "assert abs(f(1) - 0.333333) < 1e-5", Status.OK),
    (
        "def f(x): raise ValueError('no')",
        "try:\n    f(1)\n    ok = False\nexcept Exception:\n    ok = True\nassert ok",
        Status.OK,
    ),
    ("def f(x): return {x: [x]}", "for i in range(3):\n    assert f(i) == {i: [i]}, i", Status.OK),
    ("import time\ndef f(x): time.sleep(99)", "assert f(1) == 1", Status.TIMEOUT),
    ("LIMIT = 7", "assert LIMIT == 7", Status.OK),
    ("def g(): pass", "assert f(1) == 1", Status.WRONG),
]


@pytest.mark.parametrize(("program", "script", "status"), SCRIPTS)
def test_scripts_of_asserts(program: str, script: str, status: Status, settings: CodeSettings) -> None:
    assert score(program, {"functional": script}, settings).status is status


def test_the_fraction_of_asserts(settings: CodeSettings) -> None:
    truth = {"assert_case": ["assert f(1) == 1", "assert f(2) == 4", "assert f(3) == 3", "assert f(0) == 0"]}
    program = "def f(x): return x if x < 3 else 1 / 0"
    assert score(program, truth, settings) == Score(0.0, Status.WRONG)
    assert score(program, truth, settings, partial=True) == Score(0.5, Status.WRONG)


def test_tests_that_assert_nothing_are_an_error_and_no_pass(settings: CodeSettings) -> None:
    with pytest.raises(ValueError, match="assert nothing when they run"):
        score("def f(): pass", {"functional": "def check(f):\n    assert f()\n"}, settings)
    with pytest.raises(ValueError, match="no test to run"):
        grade_job({"program": "1", "tests": asdict(CodeTests("stdin")), "settings": asdict(settings)})


def test_installed_packages_can_be_used(settings: CodeSettings) -> None:
    program = "import numpy as np\na, b = map(int, input().split())\nprint(np.array([a, b]).sum())"
    assert score(program, ADD, settings, test_timeout_s=20.0) == Score(1.0, Status.OK)


LIKE_PYTHON = [
    ("def f(x: int): pass\nprint(f.__annotations__['x'](3.7))", "3"),
    (
        "import dataclasses\n@dataclasses.dataclass\nclass P:\n    a: int\nprint(dataclasses.fields(P)[0].type('1'))",
        "1",
    ),
    ("out = open(1, 'w')\nout.write('hi')", "hi"),
    ("import os\nout = os.fdopen(1, 'w', 1 << 16)\nprint('hi', file=out)", "hi"),
    ("import io, sys\nprint('hi')\nsys.stdout = io.StringIO()\nprint('no')", "hi"),
    (
        "import io, sys\nprint('a')\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf8')\nprint('b')",
        "a\nb",
    ),
    (
        "import multiprocessing as mp\ndef f(x): return x * x\nif __name__ == '__main__':\n"
        "    with mp.Pool(2) as pool: print(sum(pool.map(f, range(4))))",
        "14",
    ),
    ("import asyncio\nasync def f(): await asyncio.sleep(0); print(1)\nasyncio.run(f())", "1"),
    ("import subprocess, sys\nprint(subprocess.check_output([sys.executable, '-c', 'print(7)']).decode())", "7"),
    ("import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x'); print(f.tell())", "1"),
    (
        "import threading\nt = [threading.Thread(target=print, args=(i,)) for i in range(3)]\n"
        "for x in t: x.start(); x.join()",
        "0\n1\n2",
    ),
    ("import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))).__name__)", "A"),
    ("\ufeffprint(1)", "1"),
]


@pytest.mark.parametrize(("program", "printed"), LIKE_PYTHON)
def test_programs_run_as_in_python(program: str, printed: str, settings: CodeSettings) -> None:
    truth = {"inputs": [""], "outputs": [printed]}
    assert score(program, truth, settings, test_timeout_s=20.0) == Score(1.0, Status.OK)


def test_a_name_that_python_would_not_find_is_an_error(settings: CodeSettings) -> None:
    program = "def f(x: Foo): return 1\nprint(f(1))"
    assert score(program, {"inputs": [""], "outputs": ["1"]}, settings) == Score(0.0, Status.WRONG)


def test_sets_of_text_have_the_same_order_in_every_run(settings: CodeSettings) -> None:
    program = "print(hash('or1'))"
    assert len({output(program, settings.sandbox) for _ in range(3)}) == 1


FORGED = (
    "import json, os, struct, time\ndef f(x):\n    d = json.dumps({}).encode()\n"
    "    os.write(91, struct.pack('>I', len(d)) + d)\n    time.sleep(9)"
)


@pytest.mark.parametrize(
    "message",
    [
        '{"value": {"o": ["fractions", "Fraction", ["1e200000000"]]}}',
        '{"value": {"s": [{"i": hex(k * (2**61 - 1))} for k in range(40_000)]}}',
        '{"value": {"d": [[{"i": hex(k * (2**61 - 1))}, 1] for k in range(40_000)]}}',
        '{"value": {"n": ["U90000000", ["a"] * 3]}}',
        '{"value": {"h": {"array": ["U90000000", ["a"] * 3]}}}',
        '{"value": {"r": [0, 10**18, 1]}}',
        '{"timeout": True}',
        '{"failed": "no room"}',
        '["value", 1]',
    ],
)
def test_what_a_program_forges_is_wrong_at_once(message: str, settings: CodeSettings) -> None:
    program = FORGED.replace("json.dumps({})", f"json.dumps({message})")
    began = time.monotonic()
    found = score(program, {"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}, settings, output_mib=16)
    assert found == Score(0.0, Status.WRONG)
    assert time.monotonic() - began < 8


def test_json_values_come_back_from_a_function(settings: CodeSettings) -> None:
    program = "def f(x): return {1: (2, None, True), 'a': [1 << 70, 1.5, 'x']}"
    truth = {"inputs": ["1"], "outputs": [f'{{"1": [2, null, true], "a": [{1 << 70}, 1.5, "x"]}}'], "fn_name": "f"}
    assert score(program, truth, settings) == Score(1.0, Status.OK)
