r"""The maths verifier: it compares the last \boxed{} of a response with the gold answers.

Pure functions. `screen` is cheap and bounded in time, and may run in any process. `equivalent` calls math-verify, which
never returns on `9^{9^{9^{9}}}`. The trainer therefore calls `equivalent` only in processes that can be killed
(`or1.reward.pool`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any

from or1.core.types import Score, Status
from or1.reward import math_spelling, math_text
from or1.reward.terms import UNVERIFIABLE

MAX_BOX_CHARS = 2000
"""Longest \\boxed{} that is parsed. A longer one is WRONG unless it is equal to a gold answer as text."""

_KEPT_GOLDS = 1024
"""Golds whose parsed values a worker caches. The number bounds the memory of the cache."""
_THINK_CLOSE = "</think>"
# `\\.` consumes escaped braces, so that the set \{1,2\} does not count as nesting.
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
# int() raises at 4300 digits.
_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_MOST_WORDS = 3
_NUMBER = re.compile(r"\d[\d.,]*")


def screen(text: str, golds: Sequence[str], *, require_think_close: bool = False) -> Score | str:
    r"""Return the score of a response if string or integer comparison decides it, else its \boxed{} for `equivalent`.

    Linear in len(text). Only the text after the last `</think>` counts. A response without `</think>` counts whole, or
    is TRUNCATED if `require_think_close`.
    """
    answer = answer_part(text)
    if require_think_close and answer is None:
        return make_score(Status.TRUNCATED)
    box = last_box(text if answer is None else answer)
    if not box:
        return make_score(Status.NO_ANSWER)
    golds = [_squeeze(gold) for gold in golds]
    if box in golds:
        return make_score(Status.OK)
    if len(box) > MAX_BOX_CHARS:
        return make_score(Status.WRONG)
    if _INTEGER.fullmatch(box):
        integers = [int(gold) for gold in golds if _INTEGER.fullmatch(gold)]
        if int(box) in integers:
            return make_score(Status.OK)
        if len(integers) == len(golds):
            return make_score(Status.WRONG)
    return box


def answer_part(text: str) -> str | None:
    """Return the text after the last `</think>`, or None if there is no `</think>`."""
    _, closed, answer = text.rpartition(_THINK_CLOSE)
    return answer if closed else None


def last_box(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} with balanced braces, each run of whitespace as one space, or None.

    One pass, since a response may hold thousands of `\boxed{` that never close.
    """
    if "\\boxed" not in text:
        return None
    best: tuple[int, int] | None = None
    open_boxes: list[int | None] = []  # content start of each open \boxed{, None for any other open brace
    for token in _BRACES.finditer(text):
        if token[0] == "{":
            open_boxes.append(None)
        elif token[0] == "}":
            start = open_boxes.pop() if open_boxes else None
            if start is not None and (best is None or start > best[0]):
                best = (start, token.start())
        elif token[0][-1] == "{" and len(token[0]) > 2:
            open_boxes.append(token.end())
    return None if best is None else _squeeze(text[best[0] : best[1]])


def equivalent(box: str, golds: Sequence[str]) -> bool:
    """Return whether `box` is equal to one of `golds`, by math-verify and the rules of `math_text` and `math_rules`.

    May never return, or exhaust memory.
    """
    # At level WARNING, math-verify logs once per process that its timeouts are off.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    answer = math_text.tidy(box)
    return any(_equals(answer, math_text.tidy(gold)) for gold in golds)


def _equals(answer: str, gold: str) -> bool:
    if math_spelling.same_spelling(answer, gold):
        return True
    decided = math_text.verdict(answer, gold)
    if decided is not None:
        return decided
    from or1.reward import math_rules  # imports sympy, which must not load in the trainer

    parsed = _values(answer)
    pairs = product(_gold_values(gold), parsed)
    if not any(_verify(one, other) and math_rules.agrees(one, other, _verify) for one, other in pairs):
        return False
    if not all(_equals(part, of_gold) for part, of_gold in math_text.parts_to_match(answer, gold)):
        return False
    # sympy reads 7,7 and [7,7] as sets of one number.
    if math_text.is_list(answer) and math_rules.is_number_for_set(_gold_values(gold), parsed):
        return False
    chain = math_text.chain(answer) if answer.count("=") > gold.count("=") else []
    return math_rules.chain_holds([value for member in chain for value in _values(member)[:1]])


@lru_cache(maxsize=4)
def _values(text: str) -> tuple[Any, ...]:
    """Return the values that math-verify parses from a text, and the text itself.

    The text is wrapped in \\boxed{}, without which math-verify misreads many answers (Skywork-OR1 report, 7.1).
    math-verify's own timeouts are off: they use SIGALRM, which works in main threads only.
    """
    from math_verify import parse

    readings = math_text.readings(text)
    return tuple(value for reading in readings for value in parse(f"\\boxed{{{reading}}}", parsing_timeout=None))


@lru_cache(maxsize=_KEPT_GOLDS)
def _gold_values(gold: str) -> tuple[Any, ...]:
    """Return the values of a gold, cached for all its responses. Callers must not modify the values."""
    return _values(gold)


def _verify(gold: Any, answer: Any) -> bool:
    from math_verify import verify

    return verify(gold, answer, timeout_seconds=None)


def equivalent_job(job: Mapping[str, Any]) -> Score:
    """Return the score of a job {"box", "golds"} of `or1.reward.pool`, by `equivalent`.

    The cause of a wrong answer is UNVERIFIABLE if no gold can be verified. Each gold is checked at its first wrong
    answer, where its parsed values are cached: a check costs less than the comparison before it.
    """
    if equivalent(job["box"], job["golds"]):
        return make_score(Status.OK)
    is_known = any(_is_verifiable(math_text.tidy(gold)) for gold in job["golds"])
    return Score(0.0, Status.WRONG, "" if is_known else UNVERIFIABLE)


def gold_job(job: Mapping[str, Any]) -> bool:
    """Return whether a job {"golds"} has a verifiable gold, or {"golds", "text"} a worked solution that ends with one.

    A verifiable gold has a value, is no prose, and is equal to itself. The answer of a worked solution is its last
    box, else what math-verify finds. This is the check of the Skywork-OR1 report (section 6): extract and compare.
    May never return, or exhaust memory.
    """
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    golds = job["golds"]
    if (text := job.get("text")) is None:
        return any(_is_verifiable(math_text.tidy(gold)) for gold in golds)
    if (box := last_box(text)) is not None:
        return equivalent(box, golds)
    found = parse(text, parsing_timeout=None)
    return any(_verify(value, found) for gold in golds for value in _gold_values(math_text.tidy(gold)))


@lru_cache(maxsize=_KEPT_GOLDS)
def _is_verifiable(gold: str) -> bool:
    # math-verify reads prose as a product of its letters.
    if len(_WORD.findall(gold)) > _MOST_WORDS or _is_misread(gold):
        return False
    values = [value for value in _gold_values(gold) if not isinstance(value, str)]
    return any(_verify(value, value) for value in values)


def _is_misread(gold: str) -> bool:
    """Return whether math-verify cannot read a text as LaTeX, and takes one of its several numbers for the whole."""
    if len(_NUMBER.findall(gold)) < 2:
        return False
    from math_verify import LatexExtractionConfig, parse

    latex = (LatexExtractionConfig(),)
    boxes = [f"\\boxed{{{reading}}}" for reading in math_text.readings(gold)]
    found = [value for box in boxes for value in parse(box, extraction_config=latex, parsing_timeout=None)]
    return all(isinstance(value, str) for value in found)


def warm_up() -> None:
    """Trigger the lazy imports of math-verify (0.5 to 1 s), so that they do not count towards a response's limit."""
    for gold, box in _WARM_UP:
        equivalent(box, (gold,))


def make_score(status: Status) -> Score:
    """Return the score of a status: reward 1 for OK, 0 otherwise."""
    return Score(1.0 if status is Status.OK else 0.0, status)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


_WARM_UP = (
    ("\\frac{1}{2}", "0.5"),
    ("[1,2)", "(1,2]"),
    ("\\{1,2\\}", "1,3"),
    ("\\text{(C)}", "D"),
    ("y=x^2+1", "y=3x"),
    ("x^2+2x", "x(x+1)"),
    ("\\sqrt{8}", "2\\sqrt{3}"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\3\\end{pmatrix}"),
    ("x<3", "x>4"),
    ("50\\%", "0.4"),
    ("x^2+1=0", "x^2+2=0"),
)
