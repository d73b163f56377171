"""`or1 data build` on rows of GSM8K, MATH and LeetCode: what is dropped and why, resume, and the written file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from or1.cli import main
from or1.config import ColumnsConfig
from or1.core.errors import DataError
from or1.core.types import CodeTests, Prompt
from or1.data import checks
from or1.data.load import load_prompts
from or1.data.mixture import Recipe, build_mixture, report_lines
from or1.data.verl_rows import verl_row
from or1.report.progress import Bar
from tests.helpers.displays import plain_console

CLIPS = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did Natalia sell altogether in April and May?"  # noqa: E501
GSM8K = [
    {"question": CLIPS, "answer": "48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 72 clips altogether.\n#### 72"},
    {"question": "Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes. How much did she earn?",
     "answer": "Working 50 minutes, she earned 0.2 x 50 = $10.\n#### 10"},
    {"question": CLIPS.replace("Natalia", "Natalja", 1), "answer": "#### 72"},
]  # fmt: skip
MATH = [
    {"problem": "Evaluate $\\left\\lceil3\\left(6-\\frac12\\right)\\right\\rceil$.", "answer": "17",
     "solution": "Firstly, $3\\left(6-\\frac12\\right)=17-\\frac12$. Because $0\\le\\frac12<1$, we have \\boxed{17}."},
    {"problem": "What is the sum of $1/2$ and $1/3$?", "answer": "0.8", "solution": "It is $\\boxed{\\frac{5}{6}}$."},
    {"problem": "What is half of three?", "answer": "1.5", "solution": "The answer is $\\frac{3}{2}$."},
    {"problem": "Why is the sky blue?", "answer": "Because short waves are scattered more", "solution": "See there."},
    {"problem": "natalia sold clips to 48 of her friends in April , and then she sold half as many clips in May. How "
                "many clips did Natalia sell altogether in April and May?", "answer": "72", "solution": "\\boxed{72}"},
    {"problem": "Prove that $2 > 1$.", "answer": "proof", "solution": "Clear."},
    {"problem": "Find the number of subsets of a set of three. " * 4, "answer": "8", "solution": "\\boxed{8}"},
    {"answer": "3"},
]  # fmt: skip
AIME = [{"problem": "Yesterday, she just did 50 minutes. How much did she earn?", "answer": "1"}]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    found = {}
    for name, rows in {"gsm8k": GSM8K, "math": MATH, "aime": AIME}.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found[name] = str(path)
    return found


def dropped(recipe: Recipe) -> list[tuple[str, int, str]]:
    lines = map(json.loads, recipe.beside("dropped.jsonl").read_text().splitlines())
    return [(Path(line["source"]).stem, line["line"], line["reason"]) for line in lines]


def test_maths_rows_are_kept_or_dropped_for_one_reason(files: dict[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    sources = (files["gsm8k"], files["math"])
    recipe = Recipe(sources=sources, out=tmp_path / "m.parquet", against=(files["aime"],), longest=150, workers=1)
    report = build_mixture(replace(recipe, longest=200), Bar(plain_console()))
    assert dropped(recipe) == [
        ("gsm8k", 2, "contaminated"),
        ("gsm8k", 3, "near_duplicate"),
        ("math", 2, "answer_differs"),
        ("math", 4, "unparsable"),
        ("math", 5, "duplicate"),
        ("math", 6, "proof"),
        ("math", 8, "unusable"),
    ]
    assert report["rows"] == 11 and report["kept"] == 4 == len(pq.read_table(recipe.out))
    assert report["rows"] == report["kept"] + sum(report["dropped"].values())
    assert next(report_lines(report)).endswith("1 of 3 rows kept; dropped: 1 contaminated, 1 near_duplicate")
    read = load_prompts([recipe.out], None, max_prompt_tokens=10**6).prompts
    assert [(Path(p.source).stem, p.golds) for p in read[:3]] == [
        ("gsm8k", ("72",)),
        ("math", ("17",)),
        ("math", ("1.5",)),
    ]
    assert read[0].text == CLIPS and read[1].row["extra_info"] == {"file": "math.jsonl", "line": 1}

    # The same command repeats no check; another limit writes another file from the same verdicts.
    before, log = recipe.out.read_bytes(), recipe.beside("checks.jsonl").read_bytes()
    monkeypatch.setattr(checks, "_open_checks", None)
    build_mixture(replace(recipe, longest=200), Bar(plain_console()))
    assert (recipe.out.read_bytes(), recipe.beside("checks.jsonl").read_bytes()) == (before, log)
    assert build_mixture(recipe, Bar(plain_console()))["dropped"]["too_long"] == 4


CODE = {
    "problem": "Given two integers num1 and num2, return the sum of the two integers.",
    "solutions": [
        "def sum(",
        "class Solution:\n    def sum(self, num1: int, num2: int) -> int:\n        return num1 + num2",
    ],
    "tests": {
        "functional": "def check(candidate):\n    assert candidate(num1 = 12, num2 = 5) == 17\n\ncheck(Solution().sum)"
    },
}


@pytest.mark.slow
def test_programs_are_run_and_a_killed_build_keeps_its_verdicts(tmp_path: Path, monkeypatch: Any) -> None:
    """Use a LeetCode row as it is, with a wrong reference, and without one."""
    wrong = CODE | {"problem": "Add.", "solutions": CODE["solutions"][1].replace("+", "-")}
    rows = [CODE, wrong, CODE | {"problem": "Add two.", "solutions": []}, CODE | {"problem": "See the figure below."}]
    (tmp_path / "code.json").write_text(json.dumps(rows))
    recipe = Recipe(sources=(str(tmp_path / "code.json"),), out=tmp_path / "m.parquet", workers=1)
    report = build_mixture(recipe, Bar(plain_console()))
    assert dropped(recipe) == [("code", 2, "reference_wrong"), ("code", 3, "no_reference")]
    assert report["notes"] == {"programming problems checked with a reference program": 2}
    (read, _) = load_prompts([recipe.out], None, max_prompt_tokens=10**6).prompts
    assert read.tests == load_prompts([recipe.sources[0]], None, max_prompt_tokens=10**6).prompts[0].tests

    # A power cut in the middle of the last line.
    log = recipe.beside("checks.jsonl")
    log.write_bytes(log.read_bytes()[:-9])
    asked = []
    open_checks = checks._open_checks
    monkeypatch.setattr(
        checks, "_open_checks", lambda prompts, workers: asked.extend(prompts) or open_checks(prompts, workers)
    )
    assert build_mixture(replace(recipe, allow=("no_reference",)), Bar(plain_console()))["kept"] == 3
    assert len(asked) == 1


def problem(row: dict[str, Any], golds: tuple[str, ...] = (), tests: CodeTests | None = None) -> Prompt:
    ask = ({"role": "user", "content": "q"},)
    return Prompt("f:1", "f", "q", np.empty(0, np.int32), golds, tests, row=row, messages=ask)


@pytest.mark.parametrize(
    ("row", "tests", "form"),
    [
        ({}, CodeTests("stdin", ("1\n",), ("2",)), {"inputs": ["1\n"], "outputs": ["2"], "fn_name": ""}),
        ({"inputs": ["1"], "outputs": ["2"]}, CodeTests("stdin", ("1",), ("2",)), {"inputs": ["1"], "outputs": ["2"]}),
        # Tests of LiveCodeBench are no longer in the row, and two equally good results have no form of their own.
        ({"public_test_cases": "[]"}, CodeTests("function", ("1",), ("2\n[2]",), fn_name="f"), None),
    ],
)
def test_tests_are_written_in_a_form_that_is_read_as_the_same_tests(row: dict, tests: CodeTests, form: Any) -> None:
    written = verl_row(problem(row, tests=tests), ColumnsConfig(), ())
    assert (None if written is None else json.loads(written["reward_model"]["ground_truth"])) == form


def test_counts_of_difficulty_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("or1.data.mixture.check_all", lambda prompts, *_: [checks.OK] * len(prompts))
    rows = [
        {"prompt": [{"role": "user", "content": f"What is 1+{i}?"}], "reward_model": {"ground_truth": str(i + 1)},
         "extra_info": {"model_difficulty": counts}}
        for i, counts in enumerate([{"7B": 3}, {"32B": 5, "7B": None}, None])
    ]  # fmt: skip
    source = tmp_path / "s.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_mixture(Recipe(sources=(str(source),), out=tmp_path / "m.parquet", near=1, workers=1), Bar(plain_console()))
    infos = [row["extra_info"]["model_difficulty"] for row in pq.read_table(tmp_path / "m.parquet").to_pylist()]
    assert infos == [{"32B": None, "7B": 3.0}, {"32B": 5.0, "7B": None}, {"32B": None, "7B": None}]


def test_half_a_surrogate_pair_is_listed_like_any_other_row(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("or1.data.mixture.check_all", lambda prompts, *_: [checks.OK] * len(prompts))
    rows = [{"problem": "What is \ud800 plus 1?", "answer": "3"}, {"problem": "What is 2 plus 1?", "answer": "3"}]
    rows[1]["data_source"] = "a\udfff"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(sources=(str(tmp_path / "rows.jsonl"),), out=tmp_path / "out.parquet")
    build_mixture(recipe, Bar(plain_console(), unit="problems"))
    (line,) = map(json.loads, recipe.beside("dropped.jsonl").read_text().splitlines())
    assert (line["line"], line["row"]) == (1, rows[0])
    assert pq.read_table(recipe.out)["data_source"].to_pylist() == ["a?"]


def test_the_verdicts_of_judges_choose(files: dict[str, str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("or1.data.mixture.check_all", lambda prompts, *_: [checks.OK] * len(prompts))
    judged = tmp_path / "judged.parquet"
    pq.write_table(pa.table({"prompt": [CLIPS, GSM8K[1]["question"]], "verdict": ["kept", "rejected"]}), judged)
    recipe = Recipe(sources=(files["gsm8k"],), out=tmp_path / "m.parquet", judged=judged, near=1)
    assert build_mixture(recipe, Bar(plain_console()))["dropped"] == {"not_judged": 1, "rejected": 1}
    with pytest.raises(DataError, match="no file of `or1 filter --judge`"):
        build_mixture(replace(recipe, judged=Path(files["gsm8k"])), Bar(plain_console()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no files; write or1 data build FILE"),
        (["{gsm8k}", "{gsm8k}"], "named twice"),
        (["{gsm8k}", "--against", "{gsm8k}"], "nothing would be left"),
        (["{gsm8k}", "--out", "{gsm8k}"], "is a source and --out"),
        (["{gsm8k}", "--column", "anwser=a"], "unknown key; known keys: prompt"),
        (["{missing}"], "cannot be read"),
    ],
)
def test_what_cannot_be_built_is_refused(
    arguments: list[str], message: str, files: dict[str, str], tmp_path: Path, capsys: Any
) -> None:
    names = {**files, "missing": str(tmp_path / "none.jsonl")}
    assert main(["data", "build", *(each.format(**names) for each in arguments)]) == 65
    assert message in capsys.readouterr().err


def test_a_name_after_a_dataset_is_refused(capsys: Any) -> None:
    assert main(["data", "gsm8k", "other.jsonl"]) == 65
    assert "use `or1 data build`" in capsys.readouterr().err
