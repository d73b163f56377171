"""Programming problems: columns of tests, packed tests, JSON arrays."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import pytest

from or1.data import DataError
from tests.helpers.problem_rows import load, write

CASES = [{"input": "1\n", "output": "2\n"}]


@pytest.mark.parametrize(
    ("row", "schema", "kind"),
    [
        (
            {"problem": "p", "tests": {"functional": "def check(c):\n    assert c(1) == 2\n\ncheck(f)"}},
            "problem/tests",
            "asserts",
        ),
        (
            {"question": "p", "input_output": json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})},
            "question/input_output",
            "stdin",
        ),
        (
            {"prompt": "def f():", "test": "def check(c):\n    assert c() == 1", "entry_point": "f"},
            "prompt/test",
            "asserts",
        ),
        ({"text": "p", "test_list": ["assert f() == 1"]}, "text/test_list", "asserts"),
        (
            {
                "prompt": [{"role": "user", "content": "p"}],
                "reward_model": {"ground_truth": json.dumps({"inputs": ["1"], "outputs": ["2"]})},
            },
            "prompt/reward_model",
            "stdin",
        ),
        ({"prompt": "p", "reward_model": {"ground_truth": CASES}}, "prompt/reward_model", "stdin"),
        ({"prompt": "p", "reward_model": {"ground_truth": json.dumps(CASES)}}, "prompt/reward_model", "stdin"),
        ({"prompt": "p", "ground_truth": json.dumps(CASES)}, "prompt/ground_truth", "stdin"),
        ({"problem": "p", "tests": CASES}, "problem/tests", "stdin"),
        ({"problem": "p", "tests": json.dumps(CASES)}, "problem/tests", "stdin"),
        ({"problem": "p", "tests": json.dumps({"inputs": ["1"], "outputs": ["2"]})}, "problem/tests", "stdin"),
        ({"prompt": "p", "tests": json.dumps(CASES)}, "prompt/tests", "stdin"),
        ({"question": "p", "tests": CASES}, "question/tests", "stdin"),
    ],
)
def test_rows_with_tests_become_programming_problems(tmp_path: Path, row: dict, schema: str, kind: str) -> None:
    found = load(write(tmp_path / "x.jsonl", row))
    assert (found.reports[0].schema, found.prompts[0].tests.kind, found.prompts[0].golds) == (schema, kind, ())


def test_a_column_of_tests_that_holds_none_is_a_bad_row_with_its_content(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "x.jsonl", {"problem": "p", "tests": "see above"}))
    assert "x.jsonl:1: tests are 'see above', neither an object nor a list of objects" in str(caught.value)


def test_live_code_bench_rows_carry_format_and_packed_tests(tmp_path: Path) -> None:
    hidden = json.dumps([{"input": "2\n", "output": "4\n", "testtype": "stdin"}]).encode()
    packed = base64.b64encode(zlib.compress(b"\x80\x04X" + len(hidden).to_bytes(4, "little") + hidden + b"\x94."))
    row = {
        "question_content": "Double it.",
        "question_id": "1",
        "starter_code": "",
        "metadata": "{}",
        "public_test_cases": json.dumps([{"input": "1\n", "output": "2\n", "testtype": "stdin"}]),
        "private_test_cases": packed.decode(),
    }
    prompt = load(write(tmp_path / "lcb.jsonl", row)).prompts[0]
    assert prompt.tests.inputs == ("1\n", "2\n") and prompt.tests.outputs == ("2\n", "4\n")
    assert "Double it." in prompt.text and "stdin" in prompt.text and "```python" in prompt.text
    assert "private_test_cases" not in prompt.row and prompt.row["question_id"] == "1"
    with_starter = load(write(tmp_path / "b.jsonl", row | {"starter_code": "class Solution:"})).prompts[0]
    assert "class Solution:" in with_starter.text and "stdin" not in with_starter.text


def test_a_broken_element_of_a_json_array_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(
        b'\xef\xbb\xbf [{"problem": "a", "answer": "1"},\n {"problem": "\xff", "answer": "1"}, 5,\n'
        b' {"problem": "b", "problem": "c", "answer": "1"}, {"problem": "", "answer": "1"},'
        b' {"problem": "d", "answer": 2}]'
    )
    found = load(path, max_bad_fraction=1)
    assert [(p.id, p.golds) for p in found.prompts] == [("x.json:1", ("1",)), ("x.json:6", ("2",))]
    assert [f"{line}: {reason}" for line, reason in found.reports[0].bad] == [
        "2: column 'problem' holds a byte that is not UTF-8 at character 1",
        "3: is a JSON int, not an object",
        "4: key 'problem' appears twice",
        "5: column 'problem' is empty",
    ]


@pytest.mark.parametrize(
    ("name", "rows", "kept", "tested"),
    [("leetcode_train.json", 1889, 1889, True), ("math_train.json", 7474, 7470, False)],
)
def test_real_json_arrays(root: Path, name: str, rows: int, kept: int, tested: bool) -> None:
    path = root.parent / "shared" / "data" / name
    if not path.exists():
        pytest.skip(f"no {name}: this test reads it from shared/data beside the repository")
    found = load(path)
    assert (found.reports[0].rows, found.reports[0].kept) == (rows, kept)
    assert all((p.tests is not None) == tested and bool(p.golds) != tested for p in found.prompts)
