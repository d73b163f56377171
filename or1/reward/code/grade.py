"""The grader of the code verifier: it runs one program against its tests, in the workers of `or1.reward.pool`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from or1.core.types import CodeTests, Score, Status
from or1.reward.code.compare import key_text, same_output, same_result
from or1.reward.code.inside import wire
from or1.reward.code.sandbox import Inside, Limits, SandboxDiedError, SandboxStartError, SandboxTimeoutError


@dataclass(frozen=True)
class CodeSettings:
    """The settings of `[reward.code]`.

    sandbox  kind of sandbox, a result of `find_sandbox`
    partial  reward the fraction of passed tests instead of 0 or 1
    """

    sandbox: str
    test_timeout_s: float
    total_timeout_s: float
    memory_mib: int
    processes: int
    output_mib: int
    partial: bool

    def total_s(self, tests: int) -> float:
        """Return the limit in seconds for all tests: 5 s plus (limit of one + 1) for each, at most total_timeout_s."""
        return min((self.test_timeout_s + 1) * tests + 5, self.total_timeout_s)


@dataclass
class Tally:
    """Counts of passed tests and of all tests. `fault` is the status of the first failure that is not WRONG."""

    passed: int = 0
    total: int = 0
    fault: Status = Status.WRONG

    def score(self, partial: bool) -> Score:
        """Return reward 1 if every test passed, else the fraction of passed tests if `partial`, else 0."""
        if self.total == 0:
            raise ValueError("no test ran; the row's tests assert nothing")
        if self.passed == self.total:
            return Score(1.0, Status.OK)
        return Score(self.passed / self.total if partial else 0.0, self.fault)


def grade_job(job: Mapping[str, Any]) -> Score:
    """Score job["program"] against job["tests"] under job["settings"].

    The status is TIMEOUT if a time limit ended the program, and WRONG for any other failure of the program. An
    exception means that grading itself failed.
    """
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in job["tests"].items()}
    tests, settings = CodeTests(**fields), CodeSettings(**job["settings"])
    if tests.kind == "asserts":
        return _run_script(job["program"], tests, settings).score(settings.partial)
    if not tests.inputs:
        raise ValueError("no test to run; or1.reward.ground_truth refuses such rows")
    return _run_pairs(job["program"], tests, settings).score(settings.partial)


def _limits(settings: CodeSettings, total_s: float) -> Limits:
    return Limits(
        test_s=settings.test_timeout_s,
        cpu_s=total_s + 1,
        memory_bytes=settings.memory_mib << 20,
        processes=settings.processes,
        output_bytes=settings.output_mib << 20,
    )


# --- pairs of input and output


def _run_pairs(program: str, tests: CodeTests, settings: CodeSettings) -> Tally:
    tally = Tally(total=len(tests.inputs))
    total_s = settings.total_s(len(tests.inputs))
    deadline = time.monotonic() + total_s
    for verdict in _verdicts(program, tests, _limits(settings, total_s), settings.sandbox, deadline):
        tally.passed += verdict is Status.OK
        if verdict is not Status.OK:
            tally.fault = verdict if tally.fault is Status.WRONG else tally.fault
            if not settings.partial:
                break
    return tally


def _verdicts(program: str, tests: CodeTests, limits: Limits, sandbox: str, deadline: float) -> Iterator[Status]:
    """Yield a verdict for each test in order. Stop early when the sandbox ends."""
    judge = _judge_output if tests.kind == "stdin" else _judge_call
    try:
        with Inside(sandbox, "runner", {"program": program, "setup": tests.setup}, limits) as runner:
            if "error" in runner.answer:  # it does not compile
                yield Status.WRONG
                return
            for given, expected in zip(tests.inputs, tests.outputs, strict=True):
                if time.monotonic() > deadline:
                    yield Status.TIMEOUT
                    return
                yield judge(runner, tests.fn_name, given, expected, limits.test_s)
    except SandboxTimeoutError:
        yield Status.TIMEOUT
    except SandboxDiedError:
        # The grader never ends a sandbox that has started, so the program or its memory did.
        yield Status.WRONG


def _ask(runner: Inside, order: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Return the runner's answer to one order. Raises SandboxStartError if no process could start for a test."""
    answer = runner.ask(order, seconds)
    if "failed" in answer:
        raise SandboxStartError(f"a test could not be started: {answer['failed']}")
    return answer


def _judge_output(runner: Inside, _: str, given: str, expected: str, seconds: float) -> Status:
    answer = _ask(runner, {"stdin": given}, seconds)
    if "timeout" in answer:
        return Status.TIMEOUT
    right = answer.get("code") == 0 and same_output(str(answer.get("stdout")), expected)
    return Status.OK if right else Status.WRONG


def _judge_call(runner: Inside, fn_name: str, given: str, expected: str, seconds: float) -> Status:
    arguments = [wire.encode(json.loads(line), _no_object) for line in given.split("\n")]
    answer = _ask(runner, {"function": fn_name, "args": arguments, "kwargs": {}}, seconds)
    if "timeout" in answer:
        return Status.TIMEOUT
    if "value" not in answer:
        return Status.WRONG
    return Status.OK if same_result(_plain(answer["value"]), expected) else Status.WRONG


def _plain(data: Any) -> Any:
    """Return a program's value in JSON form. A value that JSON lacks, or a forged one, becomes an unequal object.

    This runs outside the sandbox on bytes from the program, so it must build nothing larger than the message.
    """
    try:
        return _unpacked(data)
    except (ValueError, TypeError, RecursionError):
        return object()


def _unpacked(data: Any) -> Any:
    if not isinstance(data, dict | list):
        return data
    if isinstance(data, list) or len(data) != 1:
        raise ValueError("no value")
    ((tag, body),) = data.items()
    if tag == "i" and isinstance(body, str):
        return int(body, 16)
    if tag in ("l", "t") and isinstance(body, list):
        return [_unpacked(item) for item in body]
    if tag == "d" and isinstance(body, list):
        pairs = [(_unpacked(key), _unpacked(value)) for key, value in body]
        # Text keys only, since a program can choose thousands of integers with one hash.
        found = {text: value for key, value in pairs if isinstance(text := key_text(key), str)}
        if len(found) == len(pairs):
            return found
    raise ValueError("JSON has no such value")


def _no_object(value: Any) -> Any:
    raise TypeError(f"{type(value).__name__} is no JSON")


# --- scripts of asserts


def _run_script(program: str, tests: CodeTests, settings: CodeSettings) -> Tally:
    asserts = max(tests.script.count("assert"), 1)
    total_s = settings.total_s(asserts)
    deadline = time.monotonic() + total_s
    limits = _limits(settings, total_s)
    wrong = Tally(total=asserts)
    try:
        with Inside(settings.sandbox, "runner", {"program": program, "setup": tests.setup}, limits) as runner:
            if "error" in runner.answer:
                return wrong
            order = {
                "setup": tests.setup,
                "script": tests.script,
                "names": list(tests.names),
                "stop": not settings.partial,
            }
            return _mediate(runner, settings.sandbox, order, limits, deadline)
    except SandboxTimeoutError:
        return Tally(total=asserts, fault=Status.TIMEOUT)
    except SandboxDiedError:
        return wrong


def _mediate(runner: Inside, sandbox: str, order: dict[str, Any], limits: Limits, deadline: float) -> Tally:
    """Pass the script's questions to the program and the answers back until the script sends its counts."""
    timed_out = False
    try:
        checker = Inside(sandbox, "checker", order, limits)
    except SandboxDiedError as error:
        # The checker has no value of the program yet, so the program is not the cause.
        raise SandboxStartError(f"the checker of the asserts died: {error}") from error
    with checker:
        message = checker.answer
        while "ask" in message:
            if time.monotonic() > deadline:
                raise SandboxTimeoutError
            answer = _ask(runner, message["ask"], limits.test_s)
            timed_out = timed_out or "timeout" in answer
            # The checker now holds values of the program. If it dies, the program is the cause.
            message = checker.ask(answer, limits.test_s)
    if "unsupported" in message:
        raise ValueError(f"{message['unsupported']}; leave the row out, or write its tests with plain values")
    return Tally(message["passed"], message["total"], Status.TIMEOUT if timed_out else Status.WRONG)
