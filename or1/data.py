"""Files of problems -> prompts, and the order in which a run takes them.

A broken row costs that row only: it is named (`file:line: reason`), counted and left out. Too many of them, or a file
nothing can be used of, is a DataError before any training.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from or1.data_rows import DataError, Row, RowError, read_rows
from or1.reward.math import last_box
from or1.types import Prompt

_LISTED = 20


class BadRow(NamedTuple):
    """An unusable row: line of a JSONL file or row of a parquet file, counted from 1, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class FileReport:
    """What became of the rows of one file: rows = kept + over_long + len(bad). Blank lines are not rows."""

    path: str
    schema: str
    rows: int
    kept: int
    over_long: int
    bad: tuple[BadRow, ...]

    def summary(self) -> str:
        """One line for a person."""
        return (f"{self.path}: {self.rows} rows ({self.schema}), {self.kept} kept, {self.over_long} over-long, "
                f"{len(self.bad)} bad")

    def listing(self) -> list[str]:
        """`file:line: reason` of the first 20 bad rows, and how many more there are."""
        lines = [f"{self.path}:{row.line}: {row.reason}" for row in self.bad[:_LISTED]]
        return lines + ([f"... and {len(self.bad) - _LISTED} more"] if len(self.bad) > _LISTED else [])


@dataclass(frozen=True)
class PromptSet:
    """The usable problems of all files in file order, and a report per file."""

    prompts: list[Prompt]
    reports: list[FileReport]


def load_prompts(
    paths: Sequence[str | Path],
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    prompt_suffix: str = "",
    max_bad_fraction: float = 0.01,
) -> PromptSet:
    r"""Read JSONL and parquet files of problems with their answers.

    paths              each file's schema is detected from its columns: question/answer (GSM8K: the gold is what
                       follows `####`), problem/answer, TRL's prompt/{answer, ground_truth, solution} and verl's
                       prompt/reward_model.ground_truth; an answer may be a list of equally good ones
    tokenizer          a transformers tokenizer; with a chat template, a question becomes one user message and the
                       prompt ends where the assistant's turn begins; without one it is encoded as it is, without EOS
    max_prompt_tokens  longer prompts are left out and counted
    prompt_suffix      put after the question (of messages: after the last user message), as it is
    max_bad_fraction   limit for each file

    Raises DataError for a file that cannot be read, has more bad rows than the limit, or of which nothing is left.
    """
    encode = _Encoder(tokenizer, prompt_suffix)
    prompts: list[Prompt] = []
    reports: list[FileReport] = []
    errors: list[str] = []
    for path, name in zip(map(str, paths), _names(paths), strict=True):
        try:
            kept, report = _load_file(path, name, encode, max_prompt_tokens)
        except DataError as error:
            errors.append(str(error))
            continue
        prompts += kept
        reports.append(report)
        errors += _complaints(report, max_prompt_tokens, max_bad_fraction)
    if errors:
        raise DataError("\n".join(errors))
    return PromptSet(prompts, reports)


@dataclass(frozen=True)
class SamplerState:
    """Where in the data a run is: `cursor` prompts of `epoch` are taken. Always 0 <= cursor < n."""

    epoch: int = 0
    cursor: int = 0


class Sampler:
    """The order of n prompts: each epoch a permutation that depends on (seed, epoch) only, so a run can resume."""

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise DataError(f"the sampler needs at least 1 prompt, got {n}; check data.train")
        self.n, self.seed = n, seed
        self._cached: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def take(self, state: SamplerState, count: int) -> tuple[np.ndarray, SamplerState]:
        """The next `count` prompt indices, i64[count], and the state after them; runs on into following epochs.

        Raises DataError for a state that is not of this data.
        """
        if not 0 <= state.cursor < self.n or state.epoch < 0:
            raise DataError(f"{state} does not fit {self.n} prompts; resume with the data files the run started with")
        epoch, cursor = state.epoch, state.cursor
        parts = []
        while count > 0:
            part = self._order(epoch)[cursor : cursor + count]
            parts.append(part)
            count -= len(part)
            cursor += len(part)
            if cursor == self.n:
                epoch, cursor = epoch + 1, 0
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64), SamplerState(epoch, cursor)

    def _order(self, epoch: int) -> np.ndarray:
        if self._cached[0] != epoch:
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            self._cached = (epoch, generator.permutation(self.n))
        return self._cached[1]


def _names(paths: Sequence[str | Path]) -> list[str]:
    """How prompt ids call the files: by name, or by path where two share a name."""
    names = [Path(path).name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


def _complaints(report: FileReport, max_prompt_tokens: int, max_bad_fraction: float) -> list[str]:
    if report.rows == 0:
        return [f"{report.path}: has no rows; remove it from the data or fill it"]
    if len(report.bad) > max_bad_fraction * report.rows:
        return [f"{report.path}: {len(report.bad)} of {report.rows} rows are unusable, more than "
                f"max_bad_fraction = {max_bad_fraction:g}; mend or remove them, or raise the limit",
                *(f"  {line}" for line in report.listing())]
    if report.kept == 0:
        return [f"{report.path}: nothing usable is left of {report.rows} rows: {report.over_long} are longer than "
                f"max_prompt_tokens = {max_prompt_tokens}, {len(report.bad)} are bad; raise the limit or mend the file",
                *(f"  {line}" for line in report.listing())]
    return []


def _load_file(path: str, name: str, encode: _Encoder, max_prompt_tokens: int) -> tuple[list[Prompt], FileReport]:
    rows = list(read_rows(path, _COLUMNS))
    schema = _detect(path, [row for _, row in rows if isinstance(row, dict)])
    prompts, bad, over_long = [], [], 0
    for line, row in rows:
        try:
            prompt = _make_prompt(row, schema, f"{name}:{line}", name, encode)
        except RowError as error:
            bad.append(BadRow(line, str(error)))
            continue
        if len(prompt.token_ids) > max_prompt_tokens:
            over_long += 1
        else:
            prompts.append(prompt)
    label = schema.label if schema else "no known schema"
    return prompts, FileReport(path, label, len(rows), len(prompts), over_long, tuple(bad))


def _make_prompt(row: Row | RowError, schema: _Schema | None, row_id: str, name: str, encode: _Encoder) -> Prompt:
    if isinstance(row, RowError):
        raise row
    golds = schema.golds(_column(row, schema.gold))
    text, token_ids = encode(_column(row, schema.prompt), schema.prompt)
    source = row.get("data_source")
    return Prompt(row_id, source if isinstance(source, str) and source else name, text, token_ids, golds)


def _column(row: Row, name: str) -> Any:
    if name not in row:
        raise RowError(f"missing column {name!r}")
    if row[name] is None:
        raise RowError(f"column {name!r} is null")
    return row[name]


# --- schemas


class _Schema(NamedTuple):
    """The columns of one kind of file, and how its gold column is read."""

    prompt: str
    gold: str
    golds: Callable[[Any], tuple[str, ...]]

    @property
    def label(self) -> str:
        return f"{self.prompt}/{self.gold}"


def _detect(path: str, rows: Sequence[Row]) -> _Schema | None:
    """The schema of the first row that has one; None if the file has no row at all."""
    for row in rows:
        for schema in _SCHEMAS:
            if schema.prompt in row and schema.gold in row:
                return schema
    if rows:
        known = ", ".join(schema.label for schema in _SCHEMAS)
        raise DataError(f"{path}: no row has the columns of a known schema; the first has {', '.join(rows[0])}; "
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
        golds.append(_filled(str(item), "gold answer").strip())
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
    truth = _column(dict(value), "ground_truth")
    if isinstance(truth, str) and truth.lstrip().startswith("["):
        try:
            listed = json.loads(truth)
        except (ValueError, RecursionError):
            listed = None
        # Only a list of strings is a list of golds: "[1, 2]" is an interval or a vector.
        if isinstance(listed, list) and listed and all(isinstance(item, str) for item in listed):
            truth = listed
    return _plain_golds(truth)


def _filled(text: str, what: str) -> str:
    if not text.strip():
        raise RowError(f"{what} is empty")
    return _clean(text, what)


def _clean(text: str, what: str) -> str:
    """`text`, if the tokenizer can take it."""
    if "\0" in text:
        raise RowError(f"{what} holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{what} holds half a surrogate pair at character {error.start + 1}") from None
    return text


_SCHEMAS = (
    _Schema("prompt", "reward_model", _verl_golds),
    _Schema("prompt", "answer", _plain_golds),
    _Schema("prompt", "ground_truth", _plain_golds),
    _Schema("prompt", "solution", _solution_golds),
    _Schema("problem", "answer", _plain_golds),
    _Schema("question", "answer", _gsm8k_golds),
)
_COLUMNS = {"data_source"}.union(*(schema[:2] for schema in _SCHEMAS))


# --- encoding


class _Encoder:
    """Question or messages -> (question text, i32 token ids); raises RowError."""

    def __init__(self, tokenizer: Any, suffix: str):
        self._tokenizer, self._suffix = tokenizer, suffix
        self._template_errors: tuple[type[Exception], ...] = ()
        if tokenizer.chat_template:
            from jinja2 import TemplateError

            self._template_errors = (TemplateError, KeyError, TypeError, ValueError)

    def __call__(self, prompt: Any, column: str) -> tuple[str, np.ndarray]:
        messages = self._messages(prompt, column)
        text = "\n\n".join(message["content"] for message in messages)
        if self._tokenizer.chat_template:
            ids = self._apply_template(messages)
        elif len(messages) == 1:
            ids = self._encode(text)
        else:
            raise RowError(f"{len(messages)} messages, but the tokenizer has no chat template")
        if not ids:
            raise RowError(f"column {column!r} has no tokens")
        return text, np.asarray(ids, dtype=np.int32)

    def _messages(self, prompt: Any, column: str) -> list[dict[str, str]]:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(prompt, list) or not all(isinstance(message, Mapping) for message in prompt):
            raise RowError(f"column {column!r} is neither text nor a list of messages")
        messages = [{"role": message.get("role"), "content": message.get("content")} for message in prompt]
        if not all(isinstance(value, str) for message in messages for value in message.values()):
            raise RowError(f"a message in column {column!r} lacks a role or content, or it is not text")
        last = next((message for message in reversed(messages) if message["role"] == "user"), None)
        if last is None:
            raise RowError(f"column {column!r} has no user message")
        for message in messages:
            _clean(message["content"], f"column {column!r}")
        last["content"] = _filled(last["content"], f"column {column!r}") + self._suffix
        return messages

    def _apply_template(self, messages: list[dict[str, str]]) -> list[int]:
        try:
            # transformers 5 returns a BatchEncoding unless told not to.
            return self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except self._template_errors as error:
            raise RowError(f"the chat template refuses it: {error}") from error

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer(text, verbose=False)["input_ids"]
        if ids and ids[-1] == self._tokenizer.eos_token_id and not text.endswith(self._tokenizer.eos_token):
            return ids[:-1]
        return ids
