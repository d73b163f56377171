"""The maths verifier on answers that math-verify alone misjudges: wrong ones it pays, right ones it does not."""

from __future__ import annotations

import time

import numpy as np
import pytest

from or1.core.types import Prompt, Response, Status
from or1.reward import math, math_text
from or1.reward.math import equivalent
from or1.reward.scorers import MathScorer

SYSTEM = r"\mathbf{y}=c_1\begin{bmatrix}1\\2\end{bmatrix}e^{2t}+c_2\begin{bmatrix}1\\-1\end{bmatrix}e^{-t}"


def right(gold: str, *answers: str) -> list[tuple[str, str, bool]]:
    return [(gold, answer, True) for answer in answers]


def wrong(gold: str, *answers: str) -> list[tuple[str, str, bool]]:
    return [(gold, answer, False) for answer in answers]


def prompt(gold: str) -> Prompt:
    return Prompt("t", "t", "?", np.array([1]), (gold,))


def response(text: str) -> Response:
    return Response(np.array([1]), np.zeros(1), "stop", 0, text)


def check(cases: list[tuple[str, str, bool]]) -> None:
    assert [case for case in cases if equivalent(case[1], (case[0],)) != case[2]] == []


# --- equations


def test_equations_without_real_solutions_are_not_all_equal() -> None:
    check(
        [
            *wrong("x^2-2x+10=0", "x^2+1=0", "x^2-2x+11=0", "1=2", "x=x", "1=1", r"\emptyset", "0=x^2+1"),
            *right("x^2-2x+10=0", "x^2+10=2x", "(x-1)^2+9=0", "2x^2-4x+20=0", "-x^2+2x-10=0", "0=x^2-2x+10"),
            *wrong("x^2+y^2=-25", "x^2+y^2=-16", "1=2"),
            *right("x^2+y^2=-25", "x^2+y^2+25=0"),
            *wrong("x^2=-1.5", "x^2=-2.5", "x^2=-1.6"),
            *right("x^2=-1.5", "2x^2=-3", "x^2=-1.50"),
            *wrong("|x|=-1", "1=2", r"\sqrt{x}=-2"),
        ]
    )


IDENTITIES = [
    r"\log_3(27)=3",
    r"\log_2(32)=5",
    r"\ln(e^5)=5",
    "2+3=5",
    r"0.56 = 56\%",
    "(x+1)^2=x^2+2x+1",
    r"\sin^2 x+\cos^2 x=1",
]


@pytest.mark.parametrize("gold", IDENTITIES)
def test_identities_are_told_apart_by_their_form(gold: str) -> None:
    left, _, right_side = gold.partition("=")
    check(
        [
            *wrong(gold, "1=2", "x=x", "1=1", "5=5", "3=3", r"\log_2(32)=6", "2^5=32", r"\emptyset", "0=0"),
            *wrong(r"\log_2(32)=5.0", r"\log_2(32)=6.0"),
            *right(gold, gold + r"\,", f"{right_side}={left}"),
        ]
    )


def test_equations_of_vectors_and_of_the_imaginary_unit() -> None:
    check(
        [
            *wrong(SYSTEM, "1=2", "x=x", r"\emptyset", SYSTEM.replace(r"\\2", r"\\3")),
            *right(SYSTEM, SYSTEM.replace("=", " = "), SYSTEM.replace("1", " 1 ")),
            *wrong(r"I=2e^{-t}", "1=2", "x=x", r"\emptyset", r"I=3e^{-t}"),
            *right(r"I=2e^{-t}", r"I=2 e^{-t}", r"2e^{-t}=I", r"I=\frac{2}{e^t}"),
            *wrong(r"I=\frac{V}{R}", "1=2", "x=x", r"\emptyset", "I=VR"),
            *right(r"I=\frac{V}{R}", "I=V/R"),
        ]
    )


def test_other_relations_are_matched_by_no_universal_answer() -> None:
    check(
        [
            *wrong("x<3", "1=2", "x=x", "1<2", "x<x", r"\emptyset"),
            *wrong("x^2<-1", r"\emptyset", "1=2", "x<x"),
            *wrong("x<x", "y<y"),
            *right("x<3", "x-3<0", "3>x"),
            *right("-2<x<3", "(-2,3)"),
        ]
    )


def test_equations_with_solutions_are_compared_as_before() -> None:
    check(
        [
            *right("y=2x+1", "2x-y+1=0", "y-1=2x", "2y=4x+2", "2x+1=y"),
            *wrong("y=2x+1", "y=2x", "1=2", "y=3x+1"),
            *right("x^2+y^2=25", "x^2+y^2=5^2", r"\frac{x^2}{25}+\frac{y^2}{25}=1"),
            *right("f(x)=x^2+1", "f(x)=1+x^2"),
            *right("x^2-4=0", "(x-2)(x+2)=0"),
            *right("A=\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
        ]
    )


# --- numbers


def test_small_numbers_are_compared_by_their_ratio() -> None:
    check(
        [
            *wrong(r"1.6\times10^{-19}", r"9.1\times10^{-31}", r"1.7\times10^{-19}", r"10^{-40}", "0"),
            *right(r"1.6\times10^{-19}", r"1.60\times 10^{-19}", r"16\times10^{-20}"),
            *wrong("2^{-100}", "2^{-101}", "-2^{-100}", r"10^{-40}", "0"),
            *right("2^{-100}", r"\frac{1}{2^{100}}", "4^{-50}"),
            *wrong(r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
            *wrong(r"\frac{1}{3^{40}}", r"-\frac{1}{3^{40}}"),
            *right(r"\frac{1}{3^{40}}", "3^{-40}", "8.225263339969e-20"),
            *wrong("0.00000012", "0.00000013", "0", r"1.3\times10^{-7}"),
            *right("0.00000012", r"1.2\times10^{-7}", "1.2e-7"),
            *right("0.000000333333", r"\frac{1}{3000000}"),
            *wrong(r"\frac{1}{2^{100000}}", r"\frac{1}{2^{100001}}"),
        ]
    )


def test_exact_numbers_are_compared_exactly() -> None:
    check(
        [
            *wrong("1-2^{-100}", "1-2^{-101}", "1"),
            *right("1-2^{-100}", r"1-\frac{1}{2^{100}}"),
            *wrong(r"\pi-2^{-100}", r"\pi-2^{-101}"),
            *right(r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}"),
        ]
    )


def test_small_numbers_inside_of_other_values() -> None:
    check(
        [
            *wrong("(2^{-100},1)", "(2^{-101},1)"),
            *wrong(r"\{2^{-100},5\}", r"\{2^{-101},5\}"),
            *right(r"\{2^{-100},5\}", r"\{5,4^{-50}\}"),
            *wrong("x=2^{-100}", "x=2^{-101}", "2^{-101}"),
            *wrong("x<2^{-100}", "x<2^{-101}"),
            *wrong("[2^{-100},1]", "[2^{-101},1]"),
            *wrong("\\begin{pmatrix}2^{-100}\\\\1\\end{pmatrix}", "\\begin{pmatrix}2^{-101}\\\\1\\end{pmatrix}"),
        ]
    )


def test_decimals_of_ordinary_size_keep_their_tolerance() -> None:
    check(
        [
            *right("0.5", r"\frac12", "1/2", "0.50"),
            *right(r"\frac{1}{3}", "0.333333"),
            *wrong(r"\frac{1}{3}", "0.333"),
            *right("0.000015", r"1.5\times10^{-5}", "1.5e-5", "0.0000150", r"\frac{3}{200000}"),
            *right(r"40\%", "0.4", "40"),
            *right(r"\frac{1}{7}", r"\frac{2}{14}"),
        ]
    )


def test_e_notation_is_a_number() -> None:
    check(
        [
            *right("602000000000000000000000", "6.02e23", "6.02E+23"),
            *right(r"6.02\times10^{23}", "6.02e23", "6.02E23"),
            *wrong(r"6.02\times10^{23}", "6.03e23", "6.02e22"),
            *right("1000", "1e3", "1.0E3", "x=1e3"),
            *right("1e3", "1000", "10^3"),
            *right("0.002", "2e-3"),
            *right("2e-3", "-3+2e"),
            *wrong("1e3", "3e"),
        ]
    )


# --- arithmetic left undone


def test_a_copied_arithmetic_question_is_no_answer() -> None:
    check(
        [
            *wrong(
                "57", "46+11", "46 + 11", "(46+11)", "x=46+11", "100-43", r"3\cdot 19", r"3\times19", "3*19", "57+0"
            ),
            *wrong("57", r"\frac{46+11}{1}", r"46+11+\sqrt{0}", "46+11=46+11"),
            *wrong("57", "{46}{11}", "46 11", r"46\ 11", r"46\quad 11"),
            *right("57", "46+11=57", "x=46+11=57", r"\frac{114}{2}", "57.0"),
            *wrong("3628800", "10!"),
            *wrong("55", r"\sum_{k=1}^{10} k"),
            *wrong("9", r"\int_0^3 x^2 dx"),
            *wrong("(57, 1)", "(46+11, 1)"),
            *wrong("x=2", "x=1+1"),
            *wrong("0.75", "0.5+0.25"),
        ]
    )


def test_exact_forms_of_a_number_stay_right() -> None:
    check(
        [
            *right("1024", "2^{10}"),
            *right("1023", "2^{10}-1"),
            *right("100000", "10^5"),
            *right("5000", r"5\times10^3"),
            *right("-5000", r"-5\times10^3"),
            *right("0.000015", r"1.5\times10^{-5}"),
            *right("162", r"2\cdot3^4"),
            *right(r"2\cdot3^4", r"2\cdot 3^{4}"),
            *right("120", r"\binom{10}{3}"),
            *right("5", r"\sqrt{25}"),
            *right("3", r"\log_2 8"),
            *right("2.356194", r"3\pi/4"),
            *right("1.618034", r"\frac{1+\sqrt{5}}{2}"),
            *right("2.5", r"2\frac{1}{2}", "2 1/2", "5/2"),
            *right(r"\frac{5}{2}", r"2\frac12", "2 1/2"),
            *right(r"\frac{1023}{1024}", r"1-\frac{1}{2^{10}}"),
            *right("46+11", "11+46"),
            *right("0.5", r"\frac{1}{2}"),
        ]
    )


# --- what the text says


def test_number_bases() -> None:
    check(
        [
            *wrong("1011_2", "1011_3", "1011_{10}", "1011", "1010_2", r"1011_{\text{three}}"),
            *right("1011_2", "1011_{2}", r"1011_{\text{two}}", r"1011\text{ (base 2)}", "$1011_2$", r"1\,011_2"),
            *right("1011_2", "x=1011_2"),
            *right("1011", "1011_2"),
            *right(r"\text{A5}_{11}", "A5_{11}", r"\text{a5}_{11}"),
        ]
    )


def test_ratios_of_three() -> None:
    check(
        [
            *wrong("1:2:3", "1:3:2", r"\frac16", "1:2:3:1", "1:6"),
            *right("1:2:3", "1 : 2 : 3", r"1:2:\frac{6}{2}"),
            *right("1:2", r"\frac12"),
        ]
    )


def test_a_list_for_assignments_has_their_order() -> None:
    check(
        [
            *wrong("x=3, y=4", "4,3", "(4,3)", "x=4, y=3"),
            *right("x=3, y=4", "3,4", "(3,4)", "y=4, x=3"),
            *right("x=3, x=4", "4,3"),
            *wrong(r"x=3\text{ and }y=4", "4,3"),
        ]
    )


def test_words_are_no_products_of_letters() -> None:
    check(
        [
            *wrong("Evelyn", "nylevE", r"\text{nylevE}"),
            *right("Evelyn", r"\text{Evelyn}", "evelyn", r"\textbf{Evelyn}"),
            *wrong("east", "teas", r"\text{teas}"),
            *wrong(r"\text{ab}", "ba"),
            *right(r"\text{no solution}", "no solution", r"\text{No solution}"),
            *right("xy", "yx"),
            *right("abc", "cab"),
            *right("wxyz", "zyxw"),
            *right("Alice and Bob", "Bob and Alice"),
        ]
    )


def test_units_of_different_kinds() -> None:
    check(
        [
            *wrong(r"5\text{ minutes}", r"5\text{ hours}", r"5\text{ cm}"),
            *right(r"5\text{ minutes}", r"5\text{ min}", "5", "5 minutes"),
            *right("5", r"5\text{ minutes}", r"5\text{ cm}^2", r"5\text{ m/s}^2", r"5\text{ apples}"),
            *wrong(r"5\text{ cm}", r"5\text{ kg}", r"5\text{ cm}^2", "5 kg"),
            *right(r"10\text{ square inches}", r"10\text{ in}^2", r"10\,\mathrm{in}^{2}", r"10\text{ sq. in}"),
            *wrong(r"\$5", r"5\text{ cents}"),
            *right(r"5^\circ", r"5\text{ degrees}"),
        ]
    )


def test_text_that_changes_the_meaning_is_not_dropped() -> None:
    check(
        [
            *wrong("7", r"7\text{ or maybe 8}", r"7\text{ or }8", r"7\text{ and a half}", r"7\text{ (not 8)}"),
            *wrong("7", r"7 \mbox{ or eight}"),
            *right(
                "7", r"7\text{ cm}", r"7\text{ more apples}", r"7\text{ cm}^2", r"7\text{ m/s^2}", r"\text{Total }=7"
            ),
            *right(r"-2 \text{ or } -12", r"-12\text{ or }-2", "-12, -2"),
        ]
    )


def test_a_chain_is_right_only_if_its_equalities_hold() -> None:
    check(
        [
            *wrong("7", "6=7", "1=2=...=7", r"1=2=\ldots=7", "1=2=3=7", "x=6=7", "8=7.0"),
            *right("7", "x=7", "x=3+4=7", "3+4=7", "f(2)=7", r"\frac{14}{2}=7", "x+y=7"),
            *wrong("x=7", "x=6=7"),
            *right("3.14", r"x=\frac{22}{7}=3.14", r"\pi=3.14"),
            *right(r"\frac{\pi}{3}", r"60^\circ=\frac{\pi}{3}"),
            *right("90", r"\$0.90=90\text{ cents}"),
            *right("2", r"\log 100=2"),
            *right("4", r"1024=4\pmod{10}"),
            *right("1011", "11_{10}=1011_2"),
            *right("2.5", "2 1/2=2.5"),
        ]
    )


def test_one_number_is_no_list_and_no_row_of_formulas() -> None:
    check(
        [
            *wrong("7", "[7,7]", "7,7", r"\(8\)\(7\)", "$8$ $7$", "$8$$7$", "3 4"),
            *right("7", r"\{7\}", r"\(7\)", "$7$", r"\[7\]"),
            *right("(1,2)", r"\(1,2\)"),
        ]
    )


def test_full_stops_and_thin_spaces() -> None:
    check(
        [
            *right(r"7\pi", r"7\pi.", "$7\\pi.$", r"7\pi\,"),
            *right("4320", r"4\,320", r"4\,320.", "4~320", r"4\;320", "4 320", r"x=4\,320"),
            *right("12345678", r"12\,345\,678"),
            *wrong("324", r"4\,320", "4 320"),
            *right("1234.5", r"1\,234.5"),
            *right("(1,2]", r"\left(1,2\right]", r"(1,\,2]."),
        ]
    )


# --- golds are read once, and nothing new hangs


def test_a_gold_is_parsed_once_for_all_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    import math_verify

    parsed, parse = [], math_verify.parse
    monkeypatch.setattr(math_verify, "parse", lambda text, **options: parsed.append(text) or parse(text, **options))
    gold = r"\frac{271}{1009}"
    answers = [rf"\frac{{{271 * n}}}{{{1009 * n}}}" for n in range(2, 7)] + ["1/2", "x"]
    assert [equivalent(answer, (gold,)) for answer in answers] == [True] * 5 + [False] * 2
    assert parsed.count(rf"\boxed{{{gold}}}") == 1


@pytest.mark.slow
def test_kept_golds_are_bounded_and_not_changed_by_comparisons() -> None:
    assert 0 < math._gold_values.cache_info().maxsize < 10_000
    golds = [SYSTEM, r"\{3,1,2\}", "x=1, y=2", "1<x<2", r"\begin{pmatrix}1\\2\end{pmatrix}", r"40\%", "x^2-2x+10=0"]
    answers = ["1=2", "1,2,3", "2,1", "(1,2)", r"\begin{pmatrix}1\\2.0\end{pmatrix}", "0.4", "x^2+10=2x", *golds]
    first = [repr(math._gold_values(gold)) for gold in golds]
    scores = [[equivalent(answer, (gold,)) for answer in answers] for gold in golds]
    assert [[equivalent(answer, (gold,)) for answer in reversed(answers)][::-1] for gold in golds] == scores
    assert [repr(math._gold_values(gold)) for gold in golds] == first


def test_the_rules_on_text_take_linear_time() -> None:
    pieces = ["9", "9 ", r"9\,", ".", "a ", r"\text{", r"\text{a}", "{", "(", "=", ":", ",", "_2", "$", "\\", "1e5"]
    start = time.perf_counter()
    for piece in pieces:
        text = math_text.tidy(piece * 2000)
        math_text.verdict(text, "7")
        math_text.verdict("7", text)
        math_text.readings(text)
        math_text.parts_to_match(text, "x=3, y=4")
        math_text.chain(text)
    assert time.perf_counter() - start < 2


@pytest.mark.slow
def test_bombs_end_at_the_time_limit() -> None:
    boxes = ["x=9^{9^{9^{9}}}", "9^{9^{9^{9}}}=7", "1:2:9^{9^{9^9}}", "x=(10^9)!", "1e9999e9999", "9^{9^{9^{9}}}, 7"]
    pairs = [(gold, box) for gold in ("7", "1:2:3") for box in boxes]
    with MathScorer(workers=2, timeout_s=0.2) as scorer:
        futures = [scorer.submit(prompt(gold), response(f"\\boxed{{{box}}}")) for gold, box in pairs]
        found = {future.result(timeout=60).status for future in futures}
    assert found <= {Status.TIMEOUT, Status.WRONG}
