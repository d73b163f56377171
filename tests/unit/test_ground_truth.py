"""Ground truths as data sets write them."""

from __future__ import annotations

import base64
import json
import zlib

import pytest

from or1.reward.ground_truth import GroundTruthError, parse_ground_truth
from or1.types import CodeTests

CHECK = "def check(candidate):\n    assert candidate(1) == 2\n"


def packed(text: str) -> str:
    """As LiveCodeBench packs its private tests: protocol 4 of one str."""
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
        ({"inputs": [[1, [2]]], "outputs": [[3]], "fn_name": "f"}, CodeTests("function", ("1\n[2]",), ("3",), "f")),
        (
            {"import_prefix": "import os\n", "test_code": CHECK, "entry_point": "Solution().f"},
            CodeTests("asserts", script=CHECK + "\ncheck(Solution().f)\n", setup="import os\n", names=("Solution",)),
        ),
        ({"functional": CHECK + "\ncheck(f)"}, CodeTests("asserts", script=CHECK + "\ncheck(f)", names=("f",))),
        ({"assert_case": ["assert f(1) == 2", "assert f(2)"]},
         CodeTests("asserts", script="assert f(1) == 2\nassert f(2)", names=("f",))),
        ({"test_list": ["assert g()"], "test_setup_code": "x = 1"},
         CodeTests("asserts", script="assert g()", setup="x = 1", names=("g",))),
        ({"public_test_cases": '[{"input": "1", "output": "2", "testtype": "stdin"}]',
          "private_test_cases": packed('[{"input": "3", "output": "4", "testtype": "stdin"}]'), "question_id": "q"},
         CodeTests("stdin", ("1", "3"), ("2", "4"))),
        ({"public_test_cases": [{"input": "1", "output": "2", "testtype": "functional"}],
          "metadata": '{"func_name": "f"}'}, CodeTests("function", ("1",), ("2",), "f")),
        ({"input_output": '{"inputs": ["1"], "outputs": ["2"]}'}, CodeTests("stdin", ("1",), ("2",))),
    ],
)  # fmt: skip
def test_code_tests(truth: dict, tests: CodeTests) -> None:
    assert parse_ground_truth(truth) == tests
    assert parse_ground_truth(json.dumps(truth)) == tests
    nulls = dict.fromkeys(("inputs", "assert_case", "test_code", "public_test_cases"))
    assert parse_ground_truth(nulls | truth) == tests


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
