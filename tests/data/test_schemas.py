"""The forms that rows of problems have: columns, messages, programs with tests, JSON arrays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from or1.data import DataError
from tests.helpers.problem_files import CHAT, GOOD, decoded, load, user, write


@pytest.mark.parametrize(
    ("row", "schema", "golds"),
    [
        ({"question": "q", "answer": "thus\n#### 1,234"}, "question/answer", ("1234",)),
        ({"question": "q", "answer": "####  -5"}, "question/answer", ("-5",)),
        ({"question": "q", "answer": "(1,234)"}, "question/answer", ("(1,234)",)),
        ({"problem": "q", "answer": r"\frac12", "solution": r"\boxed{9}"}, "problem/answer", (r"\frac12",)),
        ({"problem": "q", "answer": ["1/2", 0.5]}, "problem/answer", ("1/2", "0.5")),
        ({"prompt": "q", "answer": "1", "solution": r"\boxed{9}"}, "prompt/answer", ("1",)),
        ({"prompt": user("q"), "ground_truth": "1"}, "prompt/ground_truth", ("1",)),
        (
            {"prompt": user("q"), "solution": r"so \boxed{1} or \boxed{\frac{1}{2}}."},
            "prompt/solution",
            (r"\frac{1}{2}",),
        ),
        ({"prompt": "q", "solution": "$x$"}, "prompt/solution", ("$x$",)),
        ({"prompt": user("q"), "reward_model": {"ground_truth": "34"}}, "prompt/reward_model", ("34",)),
        (
            {"prompt": user("q"), "reward_model": {"ground_truth": '["\\\\frac12", "0.5"]'}},
            "prompt/reward_model",
            (r"\frac12", "0.5"),
        ),
        ({"prompt": user("q"), "reward_model": {"ground_truth": "[1, 2]"}}, "prompt/reward_model", ("[1, 2]",)),
        ({"problem": "q", "answer": '["1", "2"]'}, "problem/answer", ("1", "2")),
        ({"question": "q", "answer": '["1", "2"]'}, "question/answer", ("1", "2")),
        ({"prompt": "q", "answer": '["1", "2"]'}, "prompt/answer", ("1", "2")),
        ({"question": "q", "answer": 1.5e-5}, "question/answer", ("0.000015",)),
        ({"prompt": user("q"), "reward_model": {"ground_truth": "[1, 2)"}}, "prompt/reward_model", ("[1, 2)",)),
    ],
)
def test_schemas_are_detected_and_reported(tmp_path: Path, row: dict, schema: str, golds: tuple[str, ...]) -> None:
    prompts = load(write(tmp_path / "x.jsonl", row))
    assert prompts.reports[0].schema == schema
    assert [(p.text, p.golds) for p in prompts.prompts] == [("q", golds)]


def test_each_file_has_its_own_schema_and_source(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one = write(tmp_path / "a.jsonl", GOOD)
    two = write(tmp_path / "b" / "a.jsonl", {"problem": "q", "answer": "1", "data_source": "train-math-x"})
    prompts = load(one, two)
    assert [r.schema for r in prompts.reports] == ["question/answer", "problem/answer"]
    assert [(p.id, p.source) for p in prompts.prompts] == [(f"{one}:1", str(one)), (f"{two}:1", "train-math-x")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": user("q"), "reward_model": "34"}, "column 'reward_model' is a str"),
        ({"prompt": user("q"), "reward_model": {"style": "rule"}}, "missing column 'ground_truth'"),
        ({"prompt": 5, "reward_model": {"ground_truth": "1"}}, "neither text nor a list of messages"),
        ({"prompt": [{"role": "user"}], "reward_model": {"ground_truth": "1"}}, "lacks a role or content"),
        ({"prompt": [], "reward_model": {"ground_truth": "1"}}, "no user message"),
        ({"prompt": user(" "), "reward_model": {"ground_truth": "1"}}, "column 'prompt' is empty"),
        ({"prompt": user("q") * 2, "reward_model": {"ground_truth": "1"}}, "2 messages, but .* no chat template"),
    ],
)
def test_broken_messages_are_bad_rows(tmp_path: Path, row: dict, reason: str) -> None:
    with pytest.raises(DataError, match=f"x.jsonl:1: .*{reason}"):
        load(write(tmp_path / "x.jsonl", row))


def test_json_text_of_messages_is_read_as_messages(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, *user("1+1=")]
    path = write(tmp_path / "x.jsonl", {"prompt": json.dumps(messages), "answer": "2"})
    prompt = load(path, chat_template=CHAT, prompt_suffix="!").prompts[0]
    assert decoded(prompt.token_ids) == "[system]s[user]1+1=![assistant]" and prompt.text == "s\n\n1+1=!"
    assert prompt.messages[-1] == {"role": "user", "content": "1+1=!"}


@pytest.mark.parametrize("text", ['[{"a": 1}]', '[{"role": "user"}]', '[{"role": 1', "[]", "[1, 2]", "{}"])
def test_other_json_text_is_a_question(tmp_path: Path, text: str) -> None:
    assert load(write(tmp_path / "x.jsonl", {"prompt": text, "answer": "2"})).prompts[0].text == text
