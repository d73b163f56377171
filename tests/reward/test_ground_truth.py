"""Ground truths as data sets write them."""

from __future__ import annotations

import base64
import json
import zlib

import pytest

from or1.core.errors import GroundTruthError
from or1.core.types import CodeTests
from or1.reward.ground_truth import parse_golds, parse_ground_truth, parse_tests

CHECK = "def check(candidate):\n    assert candidate(1) == 2\n"


def packed(text: str) -> str:
    """Pack tests as LiveCodeBench packs its private tests: protocol 4 of one str."""
    body = text.encode()
    return base64.b64encode(
        zlib.compress(b"\x80\x04\x95" + bytes(8) + b"X" + len(body).to_bytes(4, "little") + body + b"\x94.")
    ).decode()


@pytest.mark.parametrize(
    ("truth", "golds"),
    [
        ("19", ("19",)),
        (19, ("19",)),
        ([" 1 ", "2"], ("1", "2")),
        ('["1", "\\\\frac{1}{2}"]', ("1", "\\frac{1}{2}")),
        ("[1, 2]", ("[1, 2]",)),
        ("{1, 2}", ("{1, 2}",)),
        ("[1, 2)", ("[1, 2)",)),
        (1.5e-5, ("0.000015",)),
        ([1e-7, -2.5e-10], ("0.0000001", "-0.00000000025")),
        (1e22, ("10000000000000000000000",)),
        (0.5, ("0.5",)),
        (-3.0, ("-3.0",)),
        (10**22, ("10000000000000000000000",)),
        ("1.5e-5", ("1.5e-5",)),
        ("[]", ("[]",)),
    ],
)
def test_gold_answers(truth: object, golds: tuple[str, ...]) -> None:
    assert parse_ground_truth(truth) == golds


@pytest.mark.parametrize(
    ("truth", "tests"),
    [
        ({"inputs": ["1\n"], "outputs": ["2\n"]}, CodeTests("stdin", ("1\n",), ("2\n",))),
        ({"inputs": [["1", "2"]], "outputs": [["3"]]}, CodeTests("stdin", ("1\n2",), ("3",))),
        ({"inputs": ["1\n[2]"], "outputs": ["3"], "fn_name": "f"}, CodeTests("function", ("1\n[2]",), ("3",), "f")),
        (
            {"inputs": [[1, [2]]], "outputs": [[3]], "fn_name": "f"},
            CodeTests("function", ("1\n[2]",), ("3\n[3]",), "f"),
        ),
        ({"inputs": [[1]], "outputs": [[0, [0]]], "fn_name": "f"}, CodeTests("function", ("1",), ("[0, [0]]",), "f")),
        ({"inputs": ["1"], "outputs": ["[0,\n0]\n"], "fn_name": "f"}, CodeTests("function", ("1",), ("[0, 0]",), "f")),
        (
            {"import_prefix": "import os\n", "test_code": CHECK, "entry_point": "Solution().f"},
            CodeTests("asserts", script=CHECK + "\ncheck(Solution().f)\n", setup="import os\n", names=("Solution",)),
        ),
        ({"functional": CHECK + "\ncheck(f)"}, CodeTests("asserts", script=CHECK + "\ncheck(f)", names=("f",))),
        (
            {"assert_case": ["assert f(1) == 2", "assert f(2)"]},
            CodeTests("asserts", script="assert f(1) == 2\nassert f(2)", names=("f",)),
        ),
        (
            {"test_list": ["assert g()"], "test_setup_code": "x = 1"},
            CodeTests("asserts", script="assert g()", setup="x = 1", names=("g",)),
        ),
        (
            {
                "public_test_cases": '[{"input": "1", "output": "2", "testtype": "stdin"}]',
                "private_test_cases": packed('[{"input": "3", "output": "4", "testtype": "stdin"}]'),
                "question_id": "q",
            },
            CodeTests("stdin", ("1", "3"), ("2", "4")),
        ),
        (
            {
                "public_test_cases": [{"input": "1", "output": "2", "testtype": "functional"}],
                "metadata": '{"func_name": "f"}',
            },
            CodeTests("function", ("1",), ("2",), "f"),
        ),
        ({"input_output": '{"inputs": ["1"], "outputs": ["2"]}'}, CodeTests("stdin", ("1",), ("2",))),
    ],
)
def test_code_tests(truth: dict, tests: CodeTests) -> None:
    assert parse_ground_truth(truth) == tests
    assert parse_ground_truth(json.dumps(truth)) == tests
    nulls = dict.fromkeys(("inputs", "assert_case", "test_code", "public_test_cases"))
    assert parse_ground_truth(nulls | truth) == tests


@pytest.mark.parametrize(
    ("cases", "tests"),
    [
        (
            [{"input": "1\n", "output": "2\n"}, {"input": "", "output": "3"}],
            CodeTests("stdin", ("1\n", ""), ("2\n", "3")),
        ),
        (
            [{"input": "1", "output": "2", "testtype": "stdin", "metadata": {"func_name": None}}],
            CodeTests("stdin", ("1",), ("2",)),
        ),
        (
            [{"input": "1", "output": "2", "testtype": "functional", "metadata": {"func_name": "f"}}],
            CodeTests("function", ("1",), ("2",), "f"),
        ),
        (
            [{"input": "1", "output": "2", "testtype": None, "metadata": '{"func_name": "f"}'}],
            CodeTests("function", ("1",), ("2",), "f"),
        ),
        (
            [{"type": "function_call", "fn_name": "f", "input": [[1], 2], "output": [3]}],
            CodeTests("function", ("[1]\n2",), ("3\n[3]",), "f"),
        ),
    ],
)
def test_a_list_of_objects_is_a_list_of_tests(cases: list, tests: CodeTests) -> None:
    assert parse_ground_truth(cases) == parse_ground_truth(json.dumps(cases)) == tests
    assert parse_tests(cases) == parse_tests(json.dumps(cases)) == tests
    with pytest.raises(GroundTruthError, match="list of objects"):
        parse_golds(json.dumps(cases))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([{"input": "1", "output": "2"}, {"input": "1"}], "item 2 lacks 'output'; .* has the keys: input"),
        ([{"x": 1}], "list of objects, of which item 1 lacks 'input' and 'output'; .* the keys: x"),
        ([{"input": "1", "output": "2"}, "3"], "an object and, as item 2, '3'; write one object for each test"),
        (["3", {"input": "1", "output": "2"}], "an object and, as item 1, '3'"),
        ([{"input": "1", "output": 2}], "input or output of a program is not text"),
        ([{"input": "1", "output": "2", "testtype": "functional"}], "without metadata.func_name or fn_name"),
        ([{"input": "1", "output": "2", "fn_name": name} for name in "fg"], "call different functions, .*: f, g"),
        ([{"input": "1", "output": "2", "fn_name": "f"}, {"input": "1", "output": "2"}], "or some call none: f"),
        ([{"input": "x", "output": "2", "fn_name": "f"}], "not JSON: 'x'"),
    ],
)
def test_a_list_of_objects_that_are_no_tests_is_never_a_gold(value: list, message: str) -> None:
    for truth in (value, json.dumps(value)):
        with pytest.raises(GroundTruthError, match=message):
            parse_ground_truth(truth)


@pytest.mark.parametrize("value", ["x = 1", "[]", "[1, 2]", '["a"]', [], 5, "x" * 999])
def test_a_column_of_tests_holds_nothing_but_tests(value: object) -> None:
    with pytest.raises(GroundTruthError, match="neither an object nor a list of objects") as caught:
        parse_tests(value)
    assert len(str(caught.value)) < 130


def test_arguments_that_json_cannot_write_are_an_error_of_the_row() -> None:
    with pytest.raises(GroundTruthError, match=r"not JSON: .* bytes"):
        parse_ground_truth({"inputs": [[b"1"]], "outputs": [1], "fn_name": "f"})


@pytest.mark.parametrize(
    ("answer", "golds"),
    [
        ('["1", "2"]', ("1", "2")),
        (["1", 2], ("1", "2")),
        ("[1, 2]", ("[1, 2]",)),
        ('{"a": 1}', ('{"a": 1}',)),
        ("[1, 2", ("[1, 2",)),
        (1e-7, ("0.0000001",)),
    ],
)
def test_an_answer_may_be_json_text_of_a_list_of_texts(answer: object, golds: tuple[str, ...]) -> None:
    assert parse_golds(answer) == golds


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ([], "list of gold answers is empty"),
        ("", "gold answer is empty"),
        (None, "gold answer is a NoneType"),
        (True, "gold answer is a bool"),
        (float("nan"), "gold answer is nan"),
        ("a\0", "NUL"),
        ({"inputs": [], "outputs": []}, "list of tests is empty"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs but 0 outputs"),
        ({"inputs": ["1"], "outputs": [2]}, "is not text"),
        ({"inputs": "1", "outputs": ["2"]}, "'inputs' is a str, not a list"),
        ({"inputs": ["x"], "outputs": ["2"], "fn_name": "f"}, "not JSON: 'x'"),
        ({"assert_case": []}, "list of tests is empty"),
        ({"assert_case": ["print(1)"]}, "asserts nothing"),
        ({"test_code": "def check(candidate):\n    pass"}, "asserts nothing"),
        ({"test_code": "def check("}, "'test_code' is not Python"),
        ({"question_id": "3"}, "'question_id' only"),
        ({"public_test_cases": "[]"}, "list of tests is empty"),
        ({"public_test_cases": "bm8="}, "cannot be unpacked"),
        ({"public_test_cases": base64.b64encode(zlib.compress(b"\x80\x04cos\nsystem\n.")).decode()}, "other than one"),
        ({"public_test_cases": [{"input": "1", "output": "2", "testtype": "functional"}]}, "without metadata"),
        ({}, "none of which holds tests"),
    ],
)
def test_what_cannot_be_tested_is_an_error_of_the_row(truth: object, message: str) -> None:
    with pytest.raises(GroundTruthError, match=message):
        parse_ground_truth(truth)
