"""Schemas of data files: the columns of the problem and of its ground truth, and how to read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from or1.config import ColumnsConfig
from or1.core.errors import DataError, GroundTruthError, RowError
from or1.core.types import CodeTests
from or1.data.rows import Row
from or1.reward.ground_truth import parse_golds, parse_ground_truth, parse_tests, plain_golds
from or1.reward.math import last_box

Truth = tuple[str, ...] | CodeTests


class Schema(NamedTuple):
    """Columns of one kind of file, and how to read them.

    prompt    column of the question
    gold      column that must exist besides; "" if no ground truth is needed
    read      row -> gold answers or tests; raises RowError or GroundTruthError
    question  row -> the question as text or messages; None: the value of the prompt column
    """

    prompt: str
    gold: str
    read: Callable[[Row], Truth]
    question: Callable[[Row], Any] | None = None

    @property
    def label(self) -> str:
        """Name in reports."""
        return f"{self.prompt}/{self.gold}" if self.gold else f"{self.prompt}, no answers"

    def truth(self, row: Row) -> Truth:
        """Return the gold answers or tests of a row. Raises RowError."""
        if not self.gold:
            return ()
        column(row, self.gold)
        try:
            return self.read(row)
        except GroundTruthError as error:
            raise RowError(str(error)) from error

    def ask(self, row: Row) -> Any:
        """Return the question of a row, text or messages. Raises RowError."""
        value = column(row, self.prompt)
        return value if self.question is None else self.question(row)


def column(row: Row, name: str) -> Any:
    """Return the value of a required column. Raises RowError if it is missing or null."""
    if name not in row:
        raise RowError(f"missing column {name!r}")
    if row[name] is None:
        raise RowError(f"column {name!r} is null")
    return row[name]


def detect(path: str, rows: Sequence[Row], answers: bool = True, columns: ColumnsConfig | None = None) -> Schema | None:
    """Return the schema of the first row that matches one; None for a file without rows.

    answers  as for `load_prompts`
    columns  names that a user gave; what they leave out is detected

    Raises DataError if no row matches a schema.
    """
    if columns is not None and columns.names_problems:
        return _named(path, rows, answers, columns)
    for row in rows:
        for schema in _SCHEMAS:
            if schema.prompt in row and schema.gold in row:
                return schema
    if not answers:
        for row in rows:
            if (name := next((name for name in _QUESTIONS if name in row), None)) is not None:
                return Schema(name, "", lambda _: ())
    if rows:
        known = ", ".join([schema.label for schema in _SCHEMAS] + ([] if answers else list(_QUESTIONS)))
        present = ", ".join(rows[0]) or "none"
        remedy = ", or write a reward function of your own, which needs no answers" if answers else ""
        raise DataError(
            f"{path}: no row has the columns of a known schema; the first has {present}; "
            f"rename them to one of: {known}{remedy}"
        )
    return None


def has_columns(rows: Sequence[Row], columns: ColumnsConfig) -> bool:
    """Return True if some row has every named column of questions, answers and tests."""
    names = [name for name in (columns.prompt, columns.answer, columns.tests) if name is not None]
    return any(all(name in row for name in names) for row in rows)


def _named(path: str, rows: Sequence[Row], answers: bool, columns: ColumnsConfig) -> Schema | None:
    """Return the schema of the columns that a user named. Raises DataError if no row has them."""
    if rows and not has_columns(rows, columns):
        given = {"prompt": columns.prompt, "answer": columns.answer, "tests": columns.tests}
        wanted = {key: name for key, name in given.items() if name is not None}
        key = next((key for key in wanted if not any(wanted[key] in row for row in rows)), next(iter(wanted)))
        raise DataError(
            f"{path}: no row has the column {wanted[key]!r} that columns.{key} names; the first has "
            f"{', '.join(rows[0]) or 'none'}; correct the name"
        )
    prompt = columns.prompt
    if prompt is None:
        prompt = next((name for row in rows for name in _QUESTIONS if name in row), _QUESTIONS[0])
    if columns.tests is not None:
        tests = columns.tests
        return Schema(prompt, tests, lambda row: parse_tests(row[tests]))
    if columns.answer is not None:
        answer = columns.answer
        return Schema(prompt, answer, lambda row: _marked(row[answer]))
    known = [schema for schema in _SCHEMAS if any(schema.gold in row for row in rows)]
    if known:
        return Schema(prompt, known[0].gold, known[0].read)
    if answers and rows:
        raise DataError(f"{path}: name the column of the answers too, as columns.answer or columns.tests")
    return Schema(prompt, "", lambda _: ()) if rows else None


def filled(text: str, what: str) -> str:
    """Return `text` if it is more than white space. Raises RowError."""
    if not text.strip():
        raise RowError(f"{what} is empty")
    return clean(text, what)


def clean(text: str, what: str) -> str:
    """Return `text` if a tokenizer can encode it. Raises RowError."""
    if "\0" in text:
        raise RowError(f"{what} holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # `or1.data.rows` decodes an invalid byte of a JSON array to a surrogate in this range.
        found = "a byte that is not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half a surrogate pair"
        raise RowError(f"{what} holds {found} at character {error.start + 1}") from None
    return text


def _golds(name: str) -> Callable[[Row], Truth]:
    return lambda row: parse_golds(row[name])


def _gsm8k(row: Row) -> Truth:
    return _marked(row["answer"])


def _marked(value: Any) -> Truth:
    """Return the text after #### as the gold answer, without separators of thousands; other values as they are."""
    if not isinstance(value, str) or "####" not in value:
        return parse_golds(value)
    gold = value.rpartition("####")[2].strip()
    return plain_golds(gold.replace(",", "") if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", gold) else gold)


def _solution(row: Row) -> Truth:
    r"""Return the last \boxed{} of a worked solution as the gold answer."""
    value = row["solution"]
    return plain_golds((last_box(value) or value) if isinstance(value, str) else value)


def _verl(row: Row) -> Truth:
    value = row["reward_model"]
    if not isinstance(value, Mapping):
        raise RowError(f"column 'reward_model' is a {type(value).__name__}, not an object with 'ground_truth'")
    return parse_ground_truth(column(dict(value), "ground_truth"))


def _tests_column(row: Row) -> Truth:
    return parse_tests(row["tests"])


def _tests(row: Row) -> Truth:
    """Read tests from separate columns."""
    return parse_tests({key: value for key, value in row.items() if key in TEST_COLUMNS})


def _live_code_bench_question(row: Row) -> str:
    """Return the problem with the input format and the code block to complete."""
    starter = row.get("starter_code")
    if isinstance(starter, str) and starter.strip():
        how = "Complete the starter code below; its signature stays as it is."
        code = starter.rstrip()
    else:
        how = "The program reads its input from stdin, solves the problem and prints the answer to stdout."
        code = "# the whole program"
    question = column(row, "question_content")
    if not isinstance(question, str):
        raise RowError("column 'question_content' is not text")
    filled(question, "column 'question_content'")
    return (
        f"### Question\n{question.strip()}\n\n### Format\n{how} Write it in one code block:\n"
        f"```python\n{code}\n```\n\n### Answer\n"
    )


TEST_COLUMNS = frozenset(
    {
        "inputs",
        "outputs",
        "fn_name",
        "test_code",
        "import_prefix",
        "entry_point",
        "functional",
        "test",
        "assert_case",
        "test_list",
        "test_setup_code",
        "test_imports",
        "public_test_cases",
        "private_test_cases",
        "metadata",
        "input_output",
        # These columns show which names in a script of asserts belong to the program.
        "code",
        "canonical_solution",
        "prompt",
    }
)

_QUESTIONS = ("prompt", "question", "problem")
_SCHEMAS = (
    Schema("prompt", "reward_model", _verl),
    Schema("question_content", "public_test_cases", _tests, _live_code_bench_question),
    Schema("problem", "tests", _tests_column),
    Schema("question", "input_output", _tests),
    Schema("prompt", "test", _tests),
    Schema("prompt", "test_list", _tests),
    Schema("text", "test_list", _tests),
    Schema("prompt", "answer", _golds("answer")),
    Schema("prompt", "ground_truth", lambda row: parse_ground_truth(row["ground_truth"])),
    Schema("prompt", "solution", _solution),
    Schema("problem", "answer", _golds("answer")),
    Schema("problem", "solution", _solution),
    Schema("question", "answer", _gsm8k),
    Schema("prompt", "tests", _tests_column),
    Schema("question", "tests", _tests_column),
)
