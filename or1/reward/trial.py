r"""Trials of a reward on known texts: the reference answer of a row, a wrong text, and a text of the user's.

A reward that refuses the reference answer, or accepts the wrong text, would train the wrong thing in silence.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from or1.core.errors import DataError
from or1.core.types import Prompt, Response, Score, Status
from or1.reward import math
from or1.reward.code.extract import last_python_block
from or1.reward.scorer import Scorer

if TYPE_CHECKING:
    from or1.config import RewardConfig

_WRONG = "-987654321"
_NO_ANSWER = "I do not know."
_PROGRAMS = ("solution", "canonical_solution", "reference_solution", "code")
"""Columns that may hold a program which passes the tests of its row."""


class Sample(NamedTuple):
    """A text to grade. `what` says where the text is from; `right`: a built-in verifier must give a full reward."""

    what: str
    text: str
    right: bool = False


class Trial(NamedTuple):
    """A graded text: the answer or program that the verifier extracts ("" if none), the reason, and the seconds."""

    sample: Sample
    score: Score
    answer: str
    reason: str
    seconds: float


def choose_rows(prompts: Sequence[Prompt], row: str | None = None, count: int = 3) -> list[Prompt]:
    """Return the problems to try: `row`, or the first of every file, then the second of every file, up to `count`.

    row  number of the problem from 1, or its id such as "train.jsonl:17"

    Raises DataError if there is no such row.
    """
    if row is not None:
        found = [prompt for prompt in prompts if prompt.id == row]
        if row.isascii() and row.isdecimal() and 1 <= int(row[:9]) <= len(prompts):
            found = found or [prompts[int(row) - 1]]
        if not found:
            raise DataError(
                f"--row {row}: no such row; give a number from 1 to {len(prompts)}, or an id such as {prompts[0].id}"
            )
        return found[:1]
    seen: dict[str, int] = {}
    places = []
    for prompt in prompts:
        file = prompt.id.rpartition(":")[0]
        places.append(seen.setdefault(file, 0))
        seen[file] += 1
    order = sorted(range(len(prompts)), key=lambda index: places[index])
    return [prompts[index] for index in order[:count]]


def samples_of(prompt: Prompt, config: RewardConfig) -> list[Sample]:
    """Return the reference answers that the row has, in the forms that `config` may expect, and a wrong text."""
    thought = "</think>\n" if config.require_think_close else ""
    samples: list[Sample] = []
    if prompt.tests is not None:
        for name in _PROGRAMS:
            if isinstance(program := prompt.row.get(name), str) and program.strip():
                samples.append(Sample(f"column {name}", f"{thought}{_fenced(program)}", right=True))
                break
        samples.append(Sample("a wrong program", f"{thought}{_fenced('pass')}"))
    else:
        own = bool(config.functions)
        for gold in prompt.golds[:1]:
            samples += [Sample("reference answer", gold)] if own else []
            samples.append(Sample("reference answer, boxed", f"{thought}\\boxed{{{gold}}}", right=not own))
        samples.append(Sample("a wrong answer", f"{thought}\\boxed{{{_WRONG}}}"))
    return [*samples, Sample("no answer", f"{thought}{_NO_ANSWER}")]


def tried(
    scorer: Scorer, config: RewardConfig, prompt: Prompt, samples: Sequence[Sample], tokenizer: Any = None
) -> Iterator[Trial]:
    """Grade the texts one after the other, so that each time is that of one text.

    tokenizer  for functions that read token ids; None: the responses have no ids
    """
    for sample in samples:
        ids = tokenizer.encode(sample.text, add_special_tokens=False) if tokenizer is not None else []
        response = Response(np.array(ids, np.int32), np.zeros(len(ids), np.float32), "stop", 0, sample.text)
        began = time.perf_counter()
        score = scorer.submit(prompt, response).result()
        seconds = time.perf_counter() - began
        answer = extracted(prompt, config, sample.text)
        yield Trial(sample, score, answer, reason(score, prompt, config, answer), seconds)


def extracted(prompt: Prompt, config: RewardConfig, text: str) -> str:
    """Return what a built-in verifier reads from a text: the last box or program; "" if there is none."""
    if not config.needs_answers:
        return ""
    answer = math.answer_part(text)
    if answer is None and config.require_think_close:
        return ""
    part = text if answer is None else answer
    return (last_python_block(part) if prompt.tests is not None else math.last_box(part)) or ""


def reason(score: Score, prompt: Prompt, config: RewardConfig, answer: str) -> str:
    """Return why a text got its score, in words; "" for a full reward."""
    parts = ", ".join(f"{name} {value:g}" for name, value in score.parts)
    if parts:
        return parts + (f"; {score.cause}" if score.cause else "")
    what = "program" if prompt.tests is not None else "answer"
    own = bool(config.functions)
    match score.status:
        case Status.NO_ANSWER:
            return "no Python block" if prompt.tests is not None else r"no \boxed{} that closes"
        case Status.TRUNCATED:
            return "no </think>, which reward.require_think_close asks for"
        case Status.TIMEOUT:
            return f"grading took longer than its limit (reward.timeout_s = {config.timeout_s:g})"
        case Status.CRASH:
            return score.cause or "the grader crashed"
        case Status.SKIPPED:
            return "the function returned None: no reward, and the response is not trained on"
        case Status.WRONG if not own:
            if score.cause:
                return score.cause
            gold = f" is not equal to {prompt.golds[0]}" if prompt.golds else " does not pass the tests"
            return f"the {what}{gold}"
        case _:
            return "" if own or score.reward >= 1 else "part of the tests pass"


def _fenced(program: str) -> str:
    return f"```python\n{program}\n```"
