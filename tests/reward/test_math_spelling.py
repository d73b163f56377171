"""The spelling of maths answers: golds that math-verify misreads are right for themselves, and for nothing else."""

from __future__ import annotations

import pytest

from or1.reward.math import equivalent, gold_job
from or1.reward.math_spelling import respelled, same_spelling, with_symbols

MATRIX = r"\begin{pmatrix} 1 & -1 \\ 1 & %s \end{pmatrix}"
# Each gold with right answers, and with wrong ones that must also be wrong as golds for this gold as the answer.
GOLDS = {
    "a + b + c": (["a+b+c", "c + b + a"], ["a + b", "a+b+d", "a +", "a", "a + b - c"]),
    "x - c": (["x-c", "-c + x"], ["x", "x - d", "c - x"]),
    r"\sin^2 t": ([r"\sin^2(t)", r"(\sin t)^2"], [r"\sin^2", r"\sin^2 h", r"\sin t"]),
    r"\log_2 t": ([r"\log_2(t)"], [r"\log_2 h", r"\log_3 t"]),
    r"\pi r^2 h": ([r"\pi h r^2", r"\pi r^{2}h"], [r"\pi r^2", r"\pi r^2 l", r"\pi r h"]),
    r"\frac12 ab": ([r"\frac{ab}{2}"], [r"\frac12", r"\frac12 bc"]),
    "f(t) = 3t": (["f(t)=t+2t"], ["f(t)=3"]),
    r"20,\!000": (["20000", "20,000", "20{,}000"], ["20", r"2,\!000", r"20,\!000,\!000", "0"]),
    "20,000": (["20000", r"20\,000"], ["20", "(20, 0)"]),
    r"\frac{2469}{20,\!000}": ([r"\frac{2469}{20000}", r"\frac{2469}{20,000}", "0.12345"], [r"\frac{2469}{20}"]),
    r"2007 + \frac\pi 2": ([r"\frac{\pi}{2} + 2007", r"2007+\dfrac\pi2"], ["2", "2007", r"2007+\frac{2}{\pi}"]),
    r"\sqrt\pi": ([r"\pi^{1/2}"], [r"\pi", r"\sqrt{2}"]),
    MATRIX % r"\phantom -1": ([MATRIX % "1"], ["-1", "1", MATRIX % "-1"]),
    "(1, 2)": (["(1,2)", r"\left( 1,\, 2 \right)"], ["12", "(2, 1)"]),
    "1,2": (["2, 1"], ["12", "1.2", "1"]),
    "5 m": (["5", r"5\text{ m}"], ["6", "5 km"]),
    "x = 5 m": (["5", "x = 5"], ["x = 6"]),
    "5": (["5 sq m", "5 h"], ["5x + h"]),
}


@pytest.mark.parametrize("gold", GOLDS)
def test_a_gold_is_right_in_every_spelling_and_wrong_for_another_value(gold: str) -> None:
    right, wrong = GOLDS[gold]
    assert gold_job({"golds": [gold]})
    assert [answer for answer in [gold, *right] if not equivalent(answer, (gold,))] == []
    assert [answer for answer in wrong if equivalent(answer, (gold,)) or equivalent(gold, (answer,))] == []


def test_an_expression_without_a_value_is_right_as_written_only() -> None:
    assert not gold_job({"golds": [r"05\!:\!00"]})
    assert equivalent("05:00", (r"05\!:\!00",))
    assert not any(equivalent(answer, (r"05\!:\!00",)) for answer in ("05:01", "50", "0", "05", "5:00:00"))


SAME = [
    (r"\left( 1, x\right)", "(1, x)"),
    (r"\dfrac{1}{2}", r"\frac{1} {2}"),
    (r"\sin t", r"\sin\,t"),
    (r"\text{two  words}", r"\text{two words}"),
]
DIFFERENT = [
    ("1 2", "12"),
    (r"1\ 2", "12"),
    ("2^1 3", "2^13"),
    ("1, 234", "1,234"),
    (r"\sqrt 2 3", r"\sqrt 23"),
    (r"\pi r", r"\pir"),
    (r"\text{a b}", r"\text{ab}"),
    (r"\left. 5\right)", "5)"),
    ("a+b", "a-b"),
]


def test_white_space_and_delimiters_are_no_difference_but_between_digits() -> None:
    assert [pair for pair in SAME if not same_spelling(*pair)] == []
    assert [pair for pair in DIFFERENT if same_spelling(*pair)] == []


def test_only_unambiguous_numbers_are_joined() -> None:
    kept = ["1,234", "(1,000)", "1{,}2", r"1,\!23", r"12,345,\!678", r"\frac{1,2}{3}", r"\binom{1,000}{2}"]
    assert [respelled(text) for text in kept] == kept
    assert respelled(r"\frac{1,234}{5}+1{,}234{,}567") == r"\frac{1234}{5}+1234567"


def test_a_unit_is_no_symbol() -> None:
    units = ["5 m", "x = 5 m", "5 km / h", "5 m / s", "5 sq m", "8 p.m", r"\frac{1}{2} h", r"2\pi m", "h", "m"]
    assert [with_symbols(text) for text in units] == units


def test_long_texts_take_little_time() -> None:
    # The limit of the test is the proof: a quadratic rule would take minutes.
    for piece in ("a + ", r"\frac", r"1,\!", "{", r"\phantom", "1,000", r"\sin^2 ", r"\left", " ", "t "):
        text = piece * 5_000 + "c"
        respelled(text), with_symbols(text), same_spelling(text, text)
