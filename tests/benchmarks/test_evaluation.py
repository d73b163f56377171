"""The comparison of `or1 eval` with lm-evaluation-harness: graders, rows, page, and where two responses part."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.evaluation.__main__ import compare, without_texts
from benchmarks.evaluation.harness import Answered, Setting, graded
from benchmarks.evaluation.page import write_page
from benchmarks.evaluation.ties import explain

GOLDS = ["7 + 5 = 12\n#### 12", "#### 1,200"]
BOXED = "so \\boxed{12}"


def answered(text: str, gold: str, **verdicts: bool) -> Answered:
    found = {name: values[0] for name, values in graded([text], [gold]).items()}
    return Answered((1, 2, 3), text, found | verdicts)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 1,200", True, True),
        ("it is $1200.", False, True),
        ("#### 12 and 1200", False, True),
        ("1200 of 3", False, False),
    ],
)
def test_the_graders_are_those_of_the_task_gsm8k(text: str, strict: bool, flexible: bool) -> None:
    assert graded([text], GOLDS[1:]) == {"strict-match": [strict], "flexible-extract": [flexible]}


def test_a_verdict_that_is_not_repeated_here_is_refused() -> None:
    theirs = answered("12", GOLDS[0])
    wrong = dataclasses.replace(theirs, verdicts=theirs.verdicts | {"strict-match": True})
    with pytest.raises(ValueError, match="problem 0: lm-eval's verdicts"):
        compare([theirs], [wrong], GOLDS[:1])


def test_rows_and_page_count_and_name_what_differs(adder: Path, tmp_path: Path) -> None:
    ours = [Answered((1, 2, 3), text, {"math-verify": right}) for text, right in ((BOXED, True), ("12+34", False))]
    theirs = [answered(BOXED + "\n", GOLDS[0]), answered("12+56", GOLDS[1])]
    setting = Setting(adder, Path("none"), 2, 8, 1, "")
    rows = compare(ours, theirs, GOLDS)
    explain(setting, rows, ours)
    assert [row["same_but_for_space"] for row in rows] == [True, False] and "parted" not in rows[0]
    tokenizer = AutoTokenizer.from_pretrained(adder)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in ("12+34", "12+56")]
    assert rows[1]["parted"]["token"] == next(i for i, (a, b) in enumerate(zip(*ids, strict=True)) if a != b)
    assert rows[1]["parted"]["below_largest"] >= 0
    about = {"data": "d", "max_response_tokens": 8, "batch": 1, "lm_eval": "0", "math_verify": "0", "suffix": ""}
    write_page(tmp_path / "README.md", rows, about)
    page = (tmp_path / "README.md").read_text()
    assert "| math-verify | 1 (50.0%) | 1 (50.0%) |" in page and "| strict-match | 0 (0.0%) | 0 (0.0%) |" in page
    assert "- 1: token" in page and "- 0: right for flexible-extract, math-verify" in page
    public = without_texts(rows)
    assert public[0]["or1_sha256"] == public[0]["lm_eval_sha256"] and "gold" not in public[0]
    assert BOXED not in str(public)
