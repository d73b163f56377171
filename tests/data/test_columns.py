"""Columns that a user names, tables, system prompts, and arguments of chat templates."""

from __future__ import annotations

from pathlib import Path

import pytest

from or1.config import ColumnsConfig
from or1.data import DataError
from tests.helpers.problem_files import CHAT, load, make_tokenizer, write

ROWS = [{"q": "1+1=", "a": "Two.\n#### 1,002", "from": "easy"}, {"q": "3+3=", "a": 6, "from": None}]


def columns(**names: str) -> ColumnsConfig:
    return ColumnsConfig(**names)


def test_named_columns_are_read_and_a_row_without_them_is_bad(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *ROWS, {"q": "no answer"})
    named = columns(prompt="q", answer="a", source="from")
    found = load(path, columns=named, max_bad_fraction=0.5)
    assert [(p.text, p.golds, p.source) for p in found.prompts] == [
        ("1+1=", ("1002",), "easy"),
        ("3+3=", ("6",), "x.jsonl"),
    ]
    assert found.reports[0].schema == "q/a" and found.reports[0].bad[0].reason == "missing column 'a'"
    assert found.prompts[0].row == ROWS[0], "a reward function reads the file's own columns"


def test_a_named_column_that_no_row_has_is_an_error_with_the_columns_that_are_there(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *ROWS)
    with pytest.raises(DataError, match=r"no row has the column 'answr' that columns\.answer names; .* q, a, from;"):
        load(path, columns=columns(prompt="q", answer="answr"))
    with pytest.raises(DataError, match=r"name the column of the answers too"):
        load(path, columns=columns(prompt="q"))
    assert len(load(path, columns=columns(prompt="q"), answers=False).prompts) == 2


def test_what_is_not_named_is_detected(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"instruction": "1+1=", "solution": r"so \boxed{2}"})
    assert load(path, columns=columns(prompt="instruction")).prompts[0].golds == ("2",)
    path = write(tmp_path / "y.jsonl", {"problem": "1+1=", "gold": ["2", "two"]})
    assert load(path, columns=columns(answer="gold")).prompts[0].golds == ("2", "two")


def test_columns_of_the_training_files_are_optional_in_other_files(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"question": "1+1=", "answer": "2"})
    with pytest.raises(DataError, match="no row has the column 'q'"):
        load(path, columns=columns(prompt="q"))
    assert load(path, columns=columns(prompt="q"), columns_required=False).reports[0].schema == "question/answer"


def test_programs_are_read_from_a_named_column(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {"task": "Echo.", "checks": {"inputs": ["1\n"], "outputs": ["1\n"]}})
    assert load(path, columns=columns(prompt="task", tests="checks")).prompts[0].tests is not None


def test_a_table_has_quoted_values_missing_values_and_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes(b'\xef\xbb\xbfquestion,answer,note\r\n"1, then\n2?","a ""b""",\r\n\r\n3+3=,6\r\n4+4=,,x\r\n')
    found = load(path, max_bad_fraction=1.0)
    assert [(p.id, p.text, p.golds) for p in found.prompts] == [("x.csv:1", "1, then\n2?", ('a "b"',))]
    assert found.prompts[0].row["note"] is None
    assert [tuple(bad) for bad in found.reports[0].bad] == [
        (2, "has 2 values, and the first line names 3 columns"),
        (3, "column 'answer' is null"),
    ]
    tabs = tmp_path / "x.TSV"
    tabs.write_text("question\tanswer\n1,1\t2\n")
    assert load(tabs).prompts[0].text == "1,1"


def test_a_system_prompt_is_added_where_there_is_none(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "1+1="}]
    path = write(tmp_path / "x.jsonl", {"prompt": "1+1=", "answer": "2"}, {"prompt": own, "answer": "2"})
    first, second = load(path, chat_template=CHAT, template_options={"system_prompt": "Be brief."}).prompts
    decode = make_tokenizer(CHAT).decode
    assert decode(first.token_ids) == "[system]Be brief.[user]1+1=[assistant]" and first.text == "1+1="
    assert first.messages[0] == {"role": "system", "content": "Be brief."}, "a server gets it too"
    assert decode(second.token_ids) == "[system]Own.[user]1+1=[assistant]" and second.text == "Own.\n\n1+1="
    with pytest.raises(DataError, match=r"data\.system_prompt needs a chat template"):
        load(path, template_options={"system_prompt": "Be brief."})


def test_arguments_reach_the_chat_template(tmp_path: Path) -> None:
    template = CHAT + "{% if not enable_thinking %}<think></think>{% endif %}"
    path = write(tmp_path / "x.jsonl", {"prompt": "1+1=", "answer": "2"})
    texts = [
        make_tokenizer(template).decode(
            load(path, chat_template=template, template_options={"chat_template": {"enable_thinking": value}})
            .prompts[0]
            .token_ids
        )
        for value in (True, False)
    ]
    assert texts == ["[user]1+1=[assistant]", "[user]1+1=[assistant]<think></think>"]
