"""Files of problems -> prompts.

A broken row costs that row only: it is named (`file:line: reason`), counted and left out. Too many of them, or a file
nothing can be used of, is a DataError before any training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from or1.core.errors import DataError, RowError
from or1.core.types import CodeTests, Prompt
from or1.data.difficulty import UNRATED, DifficultyFilter
from or1.data.encode import Encoder
from or1.data.rows import Row, read_rows
from or1.data.schemas import Schema, detect

_LISTED = 20


class BadRow(NamedTuple):
    """An unusable row: line of a JSONL file or row of another, counted from 1, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class FileReport:
    """What became of the rows of one file: rows = kept + over_long + sum(filtered) + len(bad). Blank lines are no rows.

    filtered  sound rows left out for their difficulty, by reason
    """

    path: str
    schema: str
    rows: int
    kept: int
    over_long: int
    bad: tuple[BadRow, ...]
    filtered: Mapping[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for a person."""
        filtered = "".join(f"{count} {reason}, " for reason, count in self.filtered.items())
        return (
            f"{self.path}: {self.rows} rows ({self.schema}), {self.kept} kept, {self.over_long} over-long, "
            f"{filtered}{len(self.bad)} bad"
        )

    def lines(self) -> list[str]:
        """Summary and listing."""
        return [self.summary(), *self.listing()]

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
    difficulty: DifficultyFilter | None = None,
    answers: bool = True,
) -> PromptSet:
    r"""Read JSONL, JSON-array and parquet files of problems with their answers.

    paths              each file's schema is detected from its columns: question/answer (GSM8K: the gold is what
                       follows `####`), problem/{answer, solution}, TRL's prompt/{answer, ground_truth, solution},
                       verl's prompt/reward_model.ground_truth, and tests of programs as LeetCode, TACO, HumanEval,
                       MBPP and LiveCodeBench write them; an answer may be a list of equally good ones
    tokenizer          a transformers tokenizer; with a chat template, a question becomes one user message and the
                       prompt ends where the assistant's turn begins; without one it is encoded as it is, without EOS.
                       None leaves the prompts without token ids, for a server that has its own tokenizer
    max_prompt_tokens  longer prompts are left out and counted
    prompt_suffix      put after the question (of messages: after the last user message), as it is
    max_bad_fraction   limit for each file
    difficulty         which problems to keep by how often a model solves them; None keeps all
    answers            False: a file that has none is taken too, for a reward that needs none

    Raises DataError for a file that cannot be read, has more bad rows than the limit, or of which nothing is left.
    """
    loader = _Loader(Encoder(tokenizer, prompt_suffix), max_prompt_tokens, difficulty, answers)
    prompts: list[Prompt] = []
    reports: list[FileReport] = []
    errors: list[str] = []
    for path, name in zip(map(str, paths), _names(paths), strict=True):
        try:
            kept, report = loader.load(path, name)
        except DataError as error:
            errors.append(str(error))
            continue
        prompts += kept
        reports.append(report)
        errors += loader.complaints(report, max_bad_fraction)
    if errors:
        raise DataError("\n".join(errors))
    return PromptSet(prompts, reports)


def _names(paths: Sequence[str | Path]) -> list[str]:
    """How prompt ids call the files: by name, or by path where two share a name."""
    names = [Path(path).name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


class _Loader(NamedTuple):
    """One file at a time, under one set of rules."""

    encode: Encoder
    max_prompt_tokens: int
    difficulty: DifficultyFilter | None
    answers: bool

    def load(self, path: str, name: str) -> tuple[list[Prompt], FileReport]:
        rows = list(read_rows(path))
        schema = detect(path, [row for _, row in rows if isinstance(row, dict)], self.answers)
        prompts: list[Prompt] = []
        bad: list[BadRow] = []
        over_long, filtered = 0, Counter()
        if self.difficulty:
            self.difficulty.seen_models.clear()
        for line, row in rows:
            try:
                prompt = _make_prompt(row, schema, f"{name}:{line}", name, self.encode)
                reason = self.difficulty.verdict(row, prompt.text) if self.difficulty else None
            except RowError as error:
                bad.append(BadRow(line, str(error)))
                continue
            if len(prompt.token_ids) > self.max_prompt_tokens:
                over_long += 1
            elif reason is not None:
                filtered[reason] += 1
            else:
                prompts.append(prompt)
        label = schema.label if schema else "no known schema"
        return prompts, FileReport(path, label, len(rows), len(prompts), over_long, tuple(bad), dict(filtered))

    def complaints(self, report: FileReport, max_bad_fraction: float) -> list[str]:
        """Why a file cannot be used, if so."""
        if report.rows == 0:
            return [f"{report.path}: has no rows; remove it from the data or fill it"]
        listing = [f"  {line}" for line in report.listing()]
        if len(report.bad) > max_bad_fraction * report.rows:
            return [
                f"{report.path}: {len(report.bad)} of {report.rows} rows are unusable, more than "
                f"max_bad_fraction = {max_bad_fraction:g}; mend or remove them, or raise the limit",
                *listing,
            ]
        if report.kept == 0:
            filtered = "".join(f"{count} are {reason}, " for reason, count in report.filtered.items())
            return [
                f"{report.path}: nothing usable is left of {report.rows} rows: {report.over_long} are longer than "
                f"max_prompt_tokens = {self.max_prompt_tokens}, {filtered}{len(report.bad)} are bad; "
                f"raise the limit or mend the file{self._known_models(report)}",
                *listing,
            ]
        return []

    def _known_models(self, report: FileReport) -> str:
        if not report.filtered.get(UNRATED) or self.difficulty.rates is not None:
            return ""
        wanted, seen = self.difficulty.model, self.difficulty.seen_models
        if wanted in seen:
            return ""
        found = f"; they have: {', '.join(sorted(map(str, seen)))}" if seen else ", nor for any other model"
        return f". No row has a count for data.difficulty_model = {wanted!r}{found}"


def _make_prompt(row: Row | RowError, schema: Schema | None, row_id: str, name: str, encode: Encoder) -> Prompt:
    if isinstance(row, RowError):
        raise row
    truth = schema.truth(row)
    golds, tests = ((), truth) if isinstance(truth, CodeTests) else (truth, None)
    encoded = encode(schema.ask(row), schema.prompt)
    source = row.get("data_source")
    source = source if isinstance(source, str) and source else name
    # A problem of LiveCodeBench can carry many megabytes of packed tests, which `tests` has already.
    kept = {key: value for key, value in row.items() if key != "private_test_cases"}
    return Prompt(row_id, source, encoded.text, encoded.token_ids, golds, tests, kept, encoded.messages)
