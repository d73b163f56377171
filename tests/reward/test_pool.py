"""The math reward: what counts as the answer, and a pool in which nothing hangs, lies or outlives the trainer."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from or1.config import RewardConfig
from or1.core.errors import ScorerError
from or1.core.types import Prompt, Response, Score, Status
from or1.reward import make_scorer
from or1.reward.math import MAX_BOX_CHARS, equivalent, last_box, make_score, screen
from or1.reward.scorers import MathScorer

HANGS = r"\boxed{9^{9^{9^{9}}}}"
HANGS_TOO = r"\boxed{9^{9^{9^{8}}}}"
TIMEOUT_S = 1.0

# A grader whose answers are orders to itself.
GRADER = """
import os, signal, time

cold = True

def warm_up():
    global cold
    time.sleep(float(os.environ.get("WARM_UP_S", "0")))
    cold = False

def obey(job):
    box, golds = job["box"], job["golds"]
    order, _, argument = box.partition(" ")
    if order == "exit":
        os._exit(int(argument))
    if order == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if order == "raise":
        raise KeyError(argument)
    if order == "sleep" or cold:
        time.sleep(float(argument))
    if order == "log":
        with open(golds[0], "a") as file:
            file.write(box + chr(10))
    return order != "wrong"
"""


def grade(text: str, golds: Sequence[str], *, require_think_close: bool = False) -> Score:
    found = screen(text, golds, require_think_close=require_think_close)
    if isinstance(found, Score):
        return found
    return make_score(Status.OK if equivalent(found, golds) else Status.WRONG)


def prompt(*golds: str) -> Prompt:
    return Prompt(id="t:1", source="t", text="?", token_ids=np.array([1], dtype=np.int32), golds=golds)


def response(text: str, finish: str = "stop") -> Response:
    return Response(np.array([1], dtype=np.int32), np.zeros(1, dtype=np.float32), finish, 0, text)


def descendants(pid: int) -> set[int]:
    """Living processes that `pid` started, directly or not."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            parents[int(stat.parent.name)] = int(parent)
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see processes")


@pytest.fixture(scope="module")
def scorer() -> Iterator[MathScorer]:
    with MathScorer(workers=2, timeout_s=TIMEOUT_S) as scorer:
        yield scorer


@pytest.fixture
def obeying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., MathScorer]]:
    """Return a function that makes scorers that run GRADER in their workers."""
    (tmp_path / "grader_for_tests.py").write_text(GRADER)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def make(**options) -> MathScorer:
        made.append(MathScorer(**{"workers": 1, "timeout_s": TIMEOUT_S, "grader": "grader_for_tests:obey"} | options))
        return made[-1]

    yield make
    for scorer in made:
        scorer.close()


def status_of(scorer: MathScorer, order: str, gold: str = "gold") -> Status:
    return scorer.submit(prompt(gold), response(f"\\boxed{{{order}}}")).result(timeout=30).status


# --- grading


@pytest.mark.parametrize(
    ("text", "golds", "status"),
    [
        (r"so \boxed{19}", ["19"], Status.OK),
        (r"so \boxed{ 19 }", ["19"], Status.OK),
        (r"\boxed{019}", ["19"], Status.OK),
        (r"\boxed{91}", ["19"], Status.WRONG),
        (r"\boxed{-19}", ["19"], Status.WRONG),
        (r"\boxed{0.5}", [r"\frac{1}{2}"], Status.OK),
        (r"\boxed{\frac{2}{4}}", ["0.5"], Status.OK),
        (r"\boxed{\frac{1}{3}}", ["0.5"], Status.WRONG),
        (r"\boxed{1,080}", ["1080"], Status.OK),
        (r"\boxed{\$18}", ["18"], Status.OK),
        (r"\boxed{x=7}", ["7"], Status.OK),
        (r"\boxed{5, 6, 7, 8}", ["7"], Status.WRONG),
        (r"\boxed{\{2,1\}}", [r"\{1, 2\}"], Status.OK),
        (r"\boxed{(1,2]}", ["(1,2)"], Status.WRONG),
        (r"\boxed{7}", ["3", "7"], Status.OK),
        (r"\boxed{0.25}", ["3", r"\frac{1}{4}"], Status.OK),
        (r"\boxed{7}", ["3", "5"], Status.WRONG),
        (r"\boxed{\text{Evelyn}}", ["Evelyn"], Status.OK),
        (r"\boxed{1} no, \boxed{2}", ["2"], Status.OK),
        (r"\boxed{2} no, \boxed{1}", ["2"], Status.WRONG),
        (r"<think>\boxed{2}</think> it is \boxed{3}", ["3"], Status.OK),
        (r"<think>\boxed{3}</think> it is three", ["3"], Status.NO_ANSWER),
        (r"<think>a</think>\boxed{3}<think>b</think>\boxed{4}", ["4"], Status.OK),
        (r"<think>\boxed{3}", ["3"], Status.OK),
        ("the answer is 3", ["3"], Status.NO_ANSWER),
        ("", ["3"], Status.NO_ANSWER),
        (r"\boxed{}", ["3"], Status.NO_ANSWER),
        (r"\boxed{3} \boxed{  }", ["3"], Status.NO_ANSWER),
        (r"\boxed{3", ["3"], Status.NO_ANSWER),
        (r"\boxed{\frac{1}{}", ["3"], Status.NO_ANSWER),
        (r"\boxed{][}", ["3"], Status.WRONG),
        ("\\boxed{\ud800\0}", ["3"], Status.WRONG),
    ],
)
def test_grade(text: str, golds: list[str], status: Status) -> None:
    assert grade(text, golds) == Score(float(status is Status.OK), status)


def test_a_missing_think_close_is_truncated_on_request() -> None:
    assert grade(r"<think>\boxed{3}", ["3"], require_think_close=True) == Score(0.0, Status.TRUNCATED)
    assert grade(r"<think>x</think>\boxed{3}", ["3"], require_think_close=True) == Score(1.0, Status.OK)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{a{b}c}", "a{b}c"),
        (r"\boxed {a}", "a"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"} \boxed{1} {", "1"),
        (r"\boxed{1} \boxed{2", "1"),
        ("\\boxed{a\n  b}", "a b"),
        (r"\boxes{1}", None),
    ],
)
def test_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


def test_a_thousand_unclosed_boxes_take_linear_time() -> None:
    text = "\\boxed{" * 50_000
    start = time.perf_counter()
    assert last_box(text) is None
    assert time.perf_counter() - start < 1.0


def test_integers_and_equal_strings_need_no_worker() -> None:
    assert screen(r"\boxed{12}", ["13"]) == Score(0.0, Status.WRONG)
    assert screen(r"\boxed{+12}", ["x", "12"]) == Score(1.0, Status.OK)
    assert screen(r"\boxed{\frac12}", [r"\frac12"]) == Score(1.0, Status.OK)
    assert screen(r"\boxed{12}", ["13", r"\frac{24}{2}"]) == "12"


def test_over_long_boxes_are_never_parsed() -> None:
    box = "1+" * MAX_BOX_CHARS + "1"
    assert screen(f"\\boxed{{{box}}}", ["1"]) == Score(0.0, Status.WRONG)
    assert screen(f"\\boxed{{{box}}}", [box]) == Score(1.0, Status.OK)
    assert screen("\\boxed{" + "9" * 5000 + "}", ["1"]) == Score(0.0, Status.WRONG)


# --- the pool


def test_the_pool_scores_as_grade_does(scorer: MathScorer) -> None:
    cases = [(r"\boxed{0.5}", r"\frac{1}{2}"), (r"\boxed{x}", "y"), ("none", "1"), (r"\boxed{2}", "2")]
    futures = [scorer.submit(prompt(gold), response(text)) for text, gold in cases]
    assert [f.result(timeout=30) for f in futures] == [grade(text, [gold]) for text, gold in cases]


def test_truncated_responses_score_zero_even_when_right(scorer: MathScorer) -> None:
    assert scorer.submit(prompt("2"), response(r"\boxed{2}", "length")).result(0) == Score(0.0, Status.TRUNCATED)


def test_hanging_answers_cost_only_their_own_slots(scorer: MathScorer) -> None:
    texts = [f"\\boxed{{\\frac{{{i}}}{{7}}}}" for i in range(1, 61)]
    texts.insert(0, HANGS)
    texts.insert(20, HANGS_TOO)
    start = time.perf_counter()
    futures = [scorer.submit(prompt(r"\frac{5}{7}"), response(text)) for text in texts]
    statuses = [f.result(timeout=60).status for f in futures]
    seconds = time.perf_counter() - start
    assert [i for i, status in enumerate(statuses) if status is Status.TIMEOUT] == [0, 20]
    assert Counter(statuses) == {Status.OK: 1, Status.WRONG: 59, Status.TIMEOUT: 2}
    assert seconds < 2 * TIMEOUT_S + 3


def test_both_slots_come_back_after_hanging(scorer: MathScorer) -> None:
    for _ in range(2):
        start = time.perf_counter()
        futures = [scorer.submit(prompt("7"), response(text)) for text in (HANGS, HANGS_TOO)]
        assert [f.result(timeout=60).status for f in futures] == [Status.TIMEOUT] * 2
        # Side by side: one limit, not two.
        assert TIMEOUT_S <= time.perf_counter() - start < 1.8 * TIMEOUT_S


@pytest.mark.parametrize("order", ["exit 3", "exit 0", "segfault", "raise x"])
def test_a_crashing_grader_is_a_crash_and_the_next_answer_is_graded(obeying, order: str) -> None:
    scorer = obeying()
    futures = [scorer.submit(prompt("gold"), response(f"\\boxed{{{o}}}")) for o in ("a", order, "b", "wrong")]
    assert [f.result(timeout=30).status for f in futures] == [Status.OK, Status.CRASH, Status.OK, Status.WRONG]


def test_a_crash_is_logged_with_its_cause(obeying, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert status_of(obeying(), "raise apples") is Status.CRASH
    assert "KeyError: 'apples'" in caplog.text and "raise apples" in caplog.text


@needs_proc
def test_killed_idle_workers_are_replaced_and_no_answer_pays(obeying) -> None:
    before = descendants(os.getpid())
    scorer = obeying()
    assert status_of(scorer, "a") is Status.OK
    workers = descendants(os.getpid()) - before
    assert len(workers) == 2  # the warm process and the child it forked
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not any(map(alive, workers)), 5)
    assert status_of(scorer, "b") is Status.OK


def test_start_up_is_not_charged_to_the_first_answer(obeying, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARM_UP_S", "1.0")
    assert status_of(obeying(timeout_s=0.4), "if-cold-sleep 9") is Status.OK


def test_waiting_is_not_charged_to_an_answer(obeying) -> None:
    scorer = obeying(timeout_s=0.6)
    futures = [scorer.submit(prompt("gold"), response(f"\\boxed{{sleep 0.3{i}}}")) for i in range(4)]
    assert [f.result(timeout=30).status for f in futures] == [Status.OK] * 4


def test_a_worker_that_cannot_start_is_an_error_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ScorerError, match="ended with code 1 before it was ready"):
        MathScorer(workers=2, timeout_s=1, grader="no_such_module:grade")
    assert "No module named 'no_such_module'" in capfd.readouterr().err


def test_equal_answers_are_graded_once_within_the_memo(obeying, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    scorer = obeying(memo_size=2)
    futures = [scorer.submit(prompt(str(log)), response("\\boxed{log a}")) for _ in range(20)]
    assert {f.result(timeout=30).status for f in futures} == {Status.OK}
    assert log.read_text().split("\n")[:-1] == ["log a"]
    for order in ("log b", "log a", "log c", "log a", "log b"):  # c pushes b out, not the more recent a
        status_of(scorer, order, gold=str(log))
    assert log.read_text().split("\n")[:-1] == ["log a", "log b", "log c", "log b"]


def test_timeouts_are_not_remembered(obeying) -> None:
    scorer = obeying(timeout_s=0.2)
    start = time.perf_counter()
    assert [status_of(scorer, "sleep 5") for _ in range(2)] == [Status.TIMEOUT] * 2
    assert time.perf_counter() - start > 0.4


def test_scores_are_the_same_from_a_thread_and_from_asyncio(scorer: MathScorer) -> None:
    def submit():
        return scorer.submit(prompt(r"\frac{1}{8}"), response(r"\boxed{0.125}"))

    async def in_a_task() -> Score:
        return await asyncio.wrap_future(submit())

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(lambda: submit().result(timeout=30)).result() == Score(1.0, Status.OK)
    assert asyncio.run(in_a_task()) == Score(1.0, Status.OK)


@needs_proc
def test_close_answers_what_waits_and_leaves_no_process(obeying) -> None:
    before = descendants(os.getpid())
    scorer = obeying(workers=2, timeout_s=60)
    futures = [scorer.submit(prompt("gold"), response(f"\\boxed{{sleep {50 + i}}}")) for i in range(5)]
    assert wait_until(lambda: len(descendants(os.getpid()) - before) == 4, 10)
    start = time.perf_counter()
    scorer.close()
    assert time.perf_counter() - start < 5
    assert [f.result(timeout=0).status for f in futures] == [Status.CRASH] * 5
    assert wait_until(lambda: not descendants(os.getpid()) - before, 5)
    scorer.close()
    with pytest.raises(RuntimeError, match="closed"):
        scorer.submit(prompt("gold"), response("\\boxed{x}"))


@needs_proc
def test_ctrl_c_is_left_to_the_trainer(obeying) -> None:
    before = descendants(os.getpid())
    scorer = obeying(timeout_s=10)
    future = scorer.submit(prompt("gold"), response("\\boxed{sleep 0.5}"))
    assert wait_until(lambda: len(descendants(os.getpid()) - before) == 2, 10)
    for pid in descendants(os.getpid()) - before:
        assert os.getpgid(pid) != os.getpgid(0)  # a terminal's Ctrl-C goes to the trainer's group
        os.kill(pid, signal.SIGINT)
    assert future.result(timeout=30).status is Status.OK


@needs_proc
def test_no_worker_outlives_a_killed_trainer(tmp_path: Path) -> None:
    script = tmp_path / "unguarded.py"  # no `if __name__ == "__main__"`: workers must not run it again
    script.write_text(
        "import time, numpy as np\n"
        "from or1.reward.scorers import MathScorer\n"
        "from or1.core.types import Prompt, Response\n"
        "scorer = MathScorer(workers=2, timeout_s=1)\n"
        "p = Prompt('t', 't', '?', np.array([1]), ('1',))\n"
        f"for text in ({HANGS!r}, '\\\\boxed{{0.5}}'):\n"
        "    scorer.submit(p, Response(np.array([1]), np.zeros(1), 'stop', 0, text))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        assert trainer.stdout.readline() == "up\n"
        assert wait_until(lambda: len(descendants(trainer.pid)) == 4, 10)  # two workers, each with a child
        workers = descendants(trainer.pid)
    finally:
        trainer.kill()
        trainer.wait()
        trainer.stdout.close()
    assert wait_until(lambda: not any(map(alive, workers)), 1 + 3)


def test_make_scorer_follows_the_config() -> None:
    config = RewardConfig(workers=1, timeout_s=0.5, require_think_close=True)
    with make_scorer(config) as scorer:
        future = scorer.submit(prompt("2"), response(f"<think></think>{HANGS}"))
        assert scorer.submit(prompt("2"), response(r"\boxed{2}")).result(0).status is Status.TRUNCATED
        assert future.result(timeout=30).status is Status.TIMEOUT


def test_a_job_that_a_dying_process_did_not_take_is_given_to_another(obeying, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = obeying(workers=1)
    assert status_of(scorer, "echo") is Status.OK
    process = type(scorer._pool._workers[0]._process)
    first = [True]
    ask = process.ask

    def broken(self, *arguments):
        if first.pop() if first else False:
            raise BrokenPipeError
        return ask(self, *arguments)

    monkeypatch.setattr(process, "ask", broken)
    assert status_of(scorer, "again") is Status.OK
