"""Scripts of asserts: the row says what is the program's, and everything else is beyond its reach."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from or1.core.errors import GroundTruthError, ScorerError
from or1.core.types import Score, Status
from or1.reward.code.grade import CodeSettings, grade_job
from or1.reward.code.sandbox import find_sandbox
from or1.reward.ground_truth import parse_ground_truth


@pytest.fixture(scope="module")
def settings() -> CodeSettings:
    try:
        return CodeSettings(find_sandbox("auto"), 2.0, 20.0, 1024, 16, 4, False)
    except ScorerError as error:
        pytest.skip(str(error))


def score(program: str, truth: object, settings: CodeSettings, **changes: object) -> Score:
    tests = parse_ground_truth(truth)
    return grade_job({"program": program, "tests": asdict(tests), "settings": asdict(settings) | changes})


def asserts(*lines: str, **columns: str) -> dict:
    return {"test_list": list(lines), **columns}


# --- D1: a function under test that is named like something in the prelude or in Python

GCD = asserts("assert gcd(12, 18) == 6", "assert gcd(7, 5) == 1")
COUNT = asserts("assert count([True, False, True]) == 2", "assert count([]) == 0")
SUM = asserts("assert sum(10, 15) == 6", "assert sum(100, 150) == 93")
ADD_CALLS = {"inputs": ["2\n3", "4\n5"], "outputs": ["5", "9"], "fn_name": "add"}
ADD_CHECK = {
    "test": "def check(candidate):\n    assert candidate(2, 3) == 5\n",
    "entry_point": "add",
    "prompt": 'def add(x: int, y: int):\n    """Add."""\n',
}
COMMON = (
    "def sum(a, b):\n    g = __import__('math').gcd(a, b)\n    t = 0\n"
    "    for d in range(1, g + 1): t += d * (g % d == 0)\n    return t"
)


@pytest.mark.parametrize(
    ("program", "truth", "reward"),
    [
        ("x = 1", GCD, 0),
        ("def gcd(a, b): return 42", GCD, 0),
        ("def gcd(a, b):\n    while b: a, b = b, a % b\n    return a", GCD, 1),
        ("from math import gcd", GCD, 1),
        ("import math\ngcd = math.gcd", GCD, 1),
        ("def count(l): return sum(l)", COUNT, 1),
        ("def count(l): return 2", COUNT, 0),
        ("x = 1", COUNT, 0),
        (COMMON, SUM, 1),
        ("def sum(a, b): return 6", SUM, 0),
        ("x = 1", SUM, 0),
        ("x = 1", ADD_CALLS, 0),
        ("def add(a, b): return a + b", ADD_CALLS, 1),
        ("class Solution:\n    def add(self, a, b): return a + b", ADD_CALLS, 1),
        ("x = 1", ADD_CHECK, 0),
        ("def add(a, b): return a + b", ADD_CHECK, 1),
        ("def add(a, b): return 5.1", ADD_CHECK, 0),
    ],
)
def test_what_is_tested_is_the_programs_own(program: str, truth: dict, reward: int, settings: CodeSettings) -> None:
    assert score(program, truth, settings).reward == reward


def test_a_program_with_none_of_the_names_earns_nothing(settings: CodeSettings) -> None:
    script = "try:\n    solve(1)\n    ok = False\nexcept Exception:\n    ok = True\nassert ok"
    assert score("x = 1", {"functional": script}, settings) == Score(0.0, Status.WRONG)
    assert score("def solve(x): raise ValueError", {"functional": script}, settings) == Score(1.0, Status.OK)


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        (asserts("assert set(similar((3, 4), (5, 4))) == set((4,))"), ("similar",)),
        (asserts("assert abs(add(1, 2) - 3) < 1e-6"), ("add",)),
        (asserts("assert math.isclose(volume(10), 4188.79, rel_tol=0.001)"), ("volume",)),
        (asserts("assert chain([Pair(5, 24), Pair(15, 25)], 4) == 3"), ("Pair", "chain")),
        (
            asserts("assert is_close(solve(3), 9)", code="def solve(x): pass\ndef is_close(a, b): pass"),
            ("is_close", "solve"),
        ),
        (asserts("assert solve(3) == 9", entry_point="solve"), ("solve",)),
        (
            {
                "test_code": "def check(candidate):\n    assert candidate(list_node([1])) == gcd(4, 6)\n",
                "entry_point": "Solution().merge",
            },
            ("Solution",),
        ),
        ({"functional": "s = Stack()\ns.push(1)\nassert s.pop() == 1"}, ("Stack",)),
        ({"functional": "def check(f):\n    assert f(1) == 1\n\ncheck(product)"}, ("product",)),
    ],
)
def test_names_under_test(columns: dict, names: tuple[str, ...]) -> None:
    if "functional" in columns and names == ("product",):
        # In LeetCode's form the prelude belongs to the tests, so a name of it is never the program's.
        with pytest.raises(GroundTruthError, match="entry_point"):
            parse_ground_truth(columns)
        columns = columns | {"entry_point": "product"}
    assert parse_ground_truth(columns).names == names


def test_helpers_of_the_problem_are_not_the_programs(settings: CodeSettings) -> None:
    truth = {
        "prompt": "import math\n\ndef poly(xs, x):\n    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n"
        'def find_zero(xs):\n    """Find x with poly(xs, x) = 0."""\n',
        "test": "def check(candidate):\n    assert math.fabs(poly([1, 2], candidate([1, 2]))) < 1e-4\n",
        "entry_point": "find_zero",
    }
    assert score("def find_zero(xs): return -xs[0] / xs[1]", truth, settings).reward == 1
    assert score("def poly(xs, x): return 0\ndef find_zero(xs): return 7", truth, settings).reward == 0


# --- D8: what cannot pass by value, and what can

VALUES = [
    (
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n"
        "def longest(pairs, n): return sum(p.b - p.a for p in pairs[:n])",
        "assert longest([Pair(5, 24), Pair(15, 25)], 2) == 29",
    ),
    (
        "def remove(values, kind): return [v for v in values if not isinstance(v, kind)]",
        "assert remove([1, 'a', 2.0], int) == ['a', 2.0]",
    ),
    (
        "def f(x):\n    if x < 0: raise ValueError('negative')\n    return x",
        "caught = ''\ntry:\n    f(-1)\nexcept ValueError as error:\n    caught = str(error)\n"
        "assert 'negative' in caught",
    ),
    (
        "class Bad(KeyError): pass\ndef f(x): raise Bad(x)",
        "try:\n    f(1)\nexcept LookupError:\n    caught = True\nassert caught",
    ),
    ("def squares(n):\n    for i in range(n): yield i * i", "assert list(squares(4)) == [0, 1, 4, 9]"),
    (
        "import itertools\ndef numbers(): return itertools.count(5)",
        "g = numbers()\nassert next(g) == 5\nassert [next(g), next(g)] == [6, 7]",
    ),
    ("from fractions import Fraction\ndef half(): return Fraction(1, 2)", "assert half() == 0.5"),
    (
        "import datetime\ndef leap(y): return datetime.date(y, 2, 28) + datetime.timedelta(1)",
        "import datetime\nassert leap(2024) == datetime.date(2024, 2, 29)",
    ),
    ("import re\ndef found(t): return re.match('a+', t)", "assert found('aab').group() == 'aa'\nassert found('aab')"),
    (
        "def total(a): return float(a.sum()) if hasattr(a, 'sum') else None",
        "assert total(np.array([[1.0, 2.0], [3.0, 4.0]])) == 10",
    ),
    ("def indexes(n): return range(n)", "assert indexes(3) == range(3)"),
    ("def sort(x): x.sort()", "x = [2, 1]\nsort(x)\nassert x == [1, 2]"),
]


@pytest.mark.parametrize(("program", "script"), VALUES)
def test_values_that_reach_program_and_tests(program: str, script: str, settings: CodeSettings) -> None:
    assert score(program, asserts(script), settings, test_timeout_s=20.0) == Score(1.0, Status.OK)


def test_what_cannot_pass_is_told_when_the_row_is_read_or_is_a_crash(settings: CodeSettings) -> None:
    with pytest.raises(GroundTruthError, match="pass the function lambda to the program"):
        parse_ground_truth(asserts("assert apply(lambda x: x + 1, 2) == 3"))
    script = asserts("import threading\nlock = threading.Lock()\nassert use(lock) == 1")
    with pytest.raises(ValueError, match="pass a lock to the program, which cannot go by value"):
        score("def use(x): return 1", script, settings)


# --- finding 11: what a program could win without the answer


def test_names_that_nobody_defines_are_no_way_in(settings: CodeSettings) -> None:
    forged = "class np:\n    allclose = staticmethod(lambda *a, **k: True)\ndef solve(a, b): return 0"
    assert score(forged, asserts("assert np.allclose(solve(13, 7), 91)"), settings).reward == 0
    right = "def solve(a, b): return a * b"
    assert score(right, asserts("assert np.allclose(solve(13, 7), 91)"), settings, test_timeout_s=20.0).reward == 1
    for script in ("assert is_close(solve(13, 7), 91)", "assert solve(3) == EXPECTED", "assert solve(1) == Half(1, 2)"):
        with pytest.raises(GroundTruthError, match="entry_point"):
            parse_ground_truth(asserts(script))


@pytest.mark.parametrize(
    ("script", "program"),
    [
        ("x = [1, 2]\nassert solve(x) == sum(x)", "def solve(x): x.clear(); return 0"),
        ("d = {2: 1, 3: 1}\nassert solve(d) == sorted(d)", "def solve(d): d.clear(); return []"),
        ("x = [1, 2]\nassert solve(values=x) == sum(x)", "def solve(values): values.clear(); return 0"),
    ],
)
def test_arguments_are_not_changed_by_a_call_that_returns_something(
    script: str, program: str, settings: CodeSettings
) -> None:
    assert score(program, asserts(script), settings) == Score(0.0, Status.WRONG)


def test_an_assert_statement_counts_once_however_often_it_runs(settings: CodeSettings) -> None:
    script = {"functional": "for x in solve(3):\n    assert x >= 0\nassert solve(3) == [1, 2, 3]"}
    assert score("def solve(n): return [0] * 1000", script, settings, partial=True) == Score(0.5, Status.WRONG)
    assert score("def solve(n): return [1, 2, 3]", script, settings, partial=True) == Score(1.0, Status.OK)
    assert score("def solve(n): return [-1, 0]", script, settings, partial=True) == Score(0.0, Status.WRONG)


def test_a_program_that_skips_every_assert_is_wrong_and_no_crash(settings: CodeSettings) -> None:
    script = {"functional": "for x in solve(3):\n    assert x > 0"}
    for partial in (False, True):
        assert score("def solve(n): return []", script, settings, partial=partial) == Score(0.0, Status.WRONG)


def test_a_call_that_ends_an_iteration_early_wins_nothing(settings: CodeSettings) -> None:
    script = {
        "functional": "assert all(y == x * 2 for x, y in zip([1, 2], map(solve, [1, 2])))\n"
        "assert len(list(map(solve, [1, 2]))) == 2"
    }
    assert score("def solve(x): raise StopIteration", script, settings).reward == 0
    assert score("def solve(x): return 2 * x", script, settings).reward == 1


# --- what a row may leave open, and what it may not


@pytest.mark.parametrize("start", ["random.seed(0)", "print('start')", "import sys\nsys.setrecursionlimit(5000)"])
def test_a_call_before_the_check_does_not_replace_it(start: str, settings: CodeSettings) -> None:
    test = f"import random\n{start}\ndef check(candidate):\n    assert candidate(3) == 9\n"
    truth = {"test": test, "entry_point": "solve"}
    assert score("def solve(x): return x * x", truth, settings) == Score(1.0, Status.OK)
    assert score("def solve(x): return x", truth, settings) == Score(0.0, Status.WRONG)


@pytest.mark.parametrize(
    "truth",
    [
        {"test_code": "def check(candidate):\n    assert candidate(3) == 9\n", "entry_point": "Solution.solve"},
        {"test": "assert candidate(3) == 9", "entry_point": "solve"},
        {"test_list": ["  assert solve(3) == 9"]},
        {"test_list": ["assert c.Counter([solve(3)]) == c.Counter([9])"], "test_imports": ["import collections as c"]},
    ],
)
def test_rows_as_people_write_them(truth: dict, settings: CodeSettings) -> None:
    program = "class Solution:\n    def solve(self, x): return x * x\ndef solve(x): return x * x"
    assert score(program, truth, settings) == Score(1.0, Status.OK)
    assert score(program.replace("x * x", "x"), truth, settings) == Score(0.0, Status.WRONG)


def test_constants_of_the_reference_are_not_the_programs(settings: CodeSettings) -> None:
    truth = asserts("assert solve(10) == 2**10 % MOD", code="MOD = 1000\ndef solve(x): return pow(2, x, MOD)")
    assert score("MOD = 1\ndef solve(x): return 0", truth, settings) == Score(0.0, Status.WRONG)
    assert score("def solve(x): return pow(2, x, 1000)", truth, settings) == Score(1.0, Status.OK)


@pytest.mark.parametrize(
    "truth",
    [
        asserts("assert my_sub(3, 2) == 1", "assert add(1, 2) == 3"),
        asserts("assert count(flatten([1])) == 2"),
        asserts("assert solve(1) == 1", test_setup_code="x = ("),
        {"functional": "def check(f):\n    assert f(1)\nprint('nothing is checked')"},
    ],
)
def test_rows_that_leave_open_what_is_tested_are_refused(truth: dict) -> None:
    with pytest.raises(GroundTruthError):
        parse_ground_truth(truth)


def test_a_row_whose_imports_or_setup_fail_is_a_crash_and_no_wrong_answer(settings: CodeSettings) -> None:
    for truth, cause in (
        (asserts("import nosuchmodule\nassert solve(1) == 1"), "nosuchmodule, which is not installed"),
        (asserts("assert solve(1) == 1", test_setup_code="x = 1 / 0"), "ZeroDivisionError"),
    ):
        with pytest.raises(ValueError, match=cause):
            score("def solve(x): return 1", truth, settings)
    # What the program raises is its own.
    found = score("def solve(x): raise ImportError('numpy')", asserts("assert solve(1) == 1"), settings)
    assert found == Score(0.0, Status.WRONG)


def test_an_empty_answer_is_close_to_nothing(settings: CodeSettings) -> None:
    truth = asserts("import numpy as np\nassert np.allclose(solve(13, 7), 91)")
    empty = "import numpy\ndef solve(a, b): return numpy.array([])"
    assert score(empty, truth, settings, test_timeout_s=20.0) == Score(0.0, Status.WRONG)
    right = "import numpy\ndef solve(a, b): return numpy.array([a * b * 1.0])"
    assert score(right, truth, settings, test_timeout_s=20.0) == Score(1.0, Status.OK)


@pytest.mark.parametrize(
    ("program", "script"),
    [
        ("def f(): return {1: 2}.keys()", "assert list(f()) == [1]"),
        ("import array\ndef f(): return array.array('i', [1, 2])", "assert list(f()) == [1, 2]"),
        (
            "class Bag:\n    def __init__(self): self.a = [3, 4]\n    def __len__(self): return 2\n"
            "    def __getitem__(self, i): return self.a[i]\n    def __iter__(self): return iter(self.a)",
            "b = Bag()\nassert len(b) == 2 and b[1] == 4 and list(b) == [3, 4]",
        ),
        (
            "class P:\n    def __init__(self, x): self.x = x\n    def double(self): return 2 * self.x",
            "p = P(1)\np.x = 5\nassert p.double() == 10",
        ),
    ],
)
def test_objects_of_the_program_can_be_looked_into(program: str, script: str, settings: CodeSettings) -> None:
    assert score(program, asserts(script), settings) == Score(1.0, Status.OK)


def test_values_that_are_too_much_for_the_checker_are_wrong_and_no_crash(settings: CodeSettings) -> None:
    script = asserts("assert sorted(solve(3)) == [9]")
    found = score("def solve(x): return range(10 ** 9)", script, settings, memory_mib=512)
    assert found.reward == 0 and found.status in (Status.WRONG, Status.TIMEOUT)
