"""Which columns of a file hold the problem and its answer, and how an answer is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from or1.data.rows import DataError, Row, RowError
from or1.reward.math import last_box


class Schema(NamedTuple):
    """The columns of one kind of file, and how its gold column is read."""

    prompt: str
    gold: str
    golds: Callable[[Any], tuple[str, ...]]

    @property
    def label(self) -> str:
        """How reports call it."""
        return f"{self.prompt}/{self.gold}"


def column(row: Row, name: str) -> Any:
    """A value that must be there. Raises RowError if it is missing or null."""
    if name not in row:
        raise RowError(f"missing column {name!r}")
    if row[name] is None:
        raise RowError(f"column {name!r} is null")
    return row[name]


def detect(path: str, rows: Sequence[Row]) -> Schema | None:
    """The schema of the first row that has one; None if the file has no row at all."""
    for row in rows:
        for schema in _SCHEMAS:
            if schema.prompt in row and schema.gold in row:
                return schema
    if rows:
        known = ", ".join(schema.label for schema in _SCHEMAS)
        columns = ", ".join(rows[0]) or "none"
        raise DataError(f"{path}: no row has the columns of a known schema; the first has {columns}; "
                        f"rename them to one of: {known}")
    return None


def _plain_golds(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    golds = []
    for item in values:
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            raise RowError(f"gold answer is a {type(item).__name__}, not text or a number")
        if isinstance(item, float) and not math.isfinite(item):
            raise RowError(f"gold answer is {item}")
        golds.append(filled(str(item), "gold answer").strip())
    if not golds:
        raise RowError("list of gold answers is empty")
    return tuple(golds)


def _gsm8k_golds(value: Any) -> tuple[str, ...]:
    if not isinstance(value, str) or "####" not in value:
        return _plain_golds(value)
    gold = value.rpartition("####")[2].strip()
    return _plain_golds(gold.replace(",", "") if re.fullmatch(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", gold) else gold)


def _solution_golds(value: Any) -> tuple[str, ...]:
    r"""A worked solution's gold is its last \boxed{}."""
    return _plain_golds(last_box(value) or value if isinstance(value, str) else value)


def _verl_golds(value: Any) -> tuple[str, ...]:
    if not isinstance(value, Mapping):
        raise RowError(f"column 'reward_model' is a {type(value).__name__}, not an object with 'ground_truth'")
    truth = column(dict(value), "ground_truth")
    if isinstance(truth, str) and truth.lstrip().startswith("["):
        try:
            listed = json.loads(truth)
        except (ValueError, RecursionError):
            listed = None
        # Only a list of strings is a list of golds: "[1, 2]" is an interval or a vector.
        if isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed):
            truth = listed
    return _plain_golds(truth)


def filled(text: str, what: str) -> str:
    """`text`, if it is more than white space. Raises RowError."""
    if not text.strip():
        raise RowError(f"{what} is empty")
    return clean(text, what)


def clean(text: str, what: str) -> str:
    """`text`, if the tokenizer can take it. Raises RowError."""
    if "\0" in text:
        raise RowError(f"{what} holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # How `or1.data.rows` keeps a byte of a JSON array that is not UTF-8.
        found = "a byte that is not UTF-8" if 0xDC80 <= code <= 0xDCFF else "half a surrogate pair"
        raise RowError(f"{what} holds {found} at character {error.start + 1}") from None
    return text


_SCHEMAS = (
    Schema("prompt", "reward_model", _verl_golds),
    Schema("prompt", "answer", _plain_golds),
    Schema("prompt", "ground_truth", _plain_golds),
    Schema("prompt", "solution", _solution_golds),
    Schema("problem", "answer", _plain_golds),
    Schema("question", "answer", _gsm8k_golds),
)
COLUMNS = {"data_source", "extra_info"}.union(*(schema[:2] for schema in _SCHEMAS))
