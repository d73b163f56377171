"""Loading of prompts from files of problems.

A broken row costs only that row: it is named (`file:line: reason`), counted and skipped. Too many broken rows, or a
file without any usable row, raise DataError before training starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from or1.config import ColumnsConfig
from or1.config.data_paths import HUB
from or1.core.errors import DataError, RowError
from or1.core.types import CodeTests, Prompt
from or1.data.difficulty import UNRATED, DifficultyFilter
from or1.data.encode import Encoder
from or1.data.rows import Row, read_rows
from or1.data.schemas import Schema, detect, has_columns

_LISTED = 20


class BadRow(NamedTuple):
    """One unusable row with the reason. `line` counts the lines of a JSONL file or the rows of another file, from 1."""

    line: int
    reason: str


@dataclass(frozen=True)
class FileReport:
    """Counts of one file: rows = kept + over_long + sum(filtered) + len(bad). Blank lines do not count as rows.

    filtered  number of valid rows dropped for their difficulty, by reason
    """

    path: str
    schema: str
    rows: int
    kept: int
    over_long: int
    bad: tuple[BadRow, ...]
    filtered: Mapping[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """Return the counts in one line."""
        filtered = "".join(f"{count} {reason}, " for reason, count in self.filtered.items())
        return (
            f"{self.path}: {self.rows} rows ({self.schema}), {self.kept} kept, {self.over_long} over-long, "
            f"{filtered}{len(self.bad)} bad"
        )

    def lines(self) -> list[str]:
        """Return the summary and the listing."""
        return [self.summary(), *self.listing()]

    def listing(self) -> list[str]:
        """Return `file:line: reason` of the first 20 bad rows, and the number of the others."""
        lines = [f"{self.path}:{row.line}: {row.reason}" for row in self.bad[:_LISTED]]
        return lines + ([f"... and {len(self.bad) - _LISTED} more"] if len(self.bad) > _LISTED else [])


@dataclass(frozen=True)
class PromptSet:
    """Usable problems of all files in file order, and one report per file."""

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
    columns: ColumnsConfig | None = None,
    columns_required: bool = True,
    system_prompt: str = "",
    chat_template: Mapping[str, Any] | None = None,
) -> PromptSet:
    """Read JSONL, JSON-array, parquet, CSV and TSV files, and datasets of the hub, of problems with their answers.

    paths              the schema of each file is detected from its columns: question/answer (GSM8K: the gold answer
                       follows `####`), problem/{answer, solution}, TRL's prompt/{answer, ground_truth, solution},
                       verl's prompt/reward_model.ground_truth, and program tests in the formats of LeetCode, TACO,
                       HumanEval, MBPP and LiveCodeBench; an answer may be a list of equally correct ones
    tokenizer          a transformers tokenizer. With a chat template, a question becomes one user message and the
                       prompt ends where the assistant's turn begins. Without one, the text is encoded without EOS.
                       None leaves the prompts without token ids, for a server that has its own tokenizer
    max_prompt_tokens  longer prompts are dropped and counted
    prompt_suffix      appended verbatim to the question (to the last user message of a chat)
    max_bad_fraction   largest allowed fraction of bad rows in each file
    difficulty         filter by how often a model solves the problems; None keeps all
    answers            False accepts files without answers, for a reward that does not need them
    columns            names of the columns of questions, answers or tests, and sources, where a user gave some
    columns_required   False: a file without these columns is read by the schema that it has
    system_prompt      a system message for every chat that has none
    chat_template      arguments of the tokenizer's chat template

    Raises DataError for a file that cannot be read, has too many bad rows, or has no usable row.
    """
    encode = Encoder(tokenizer, prompt_suffix, system_prompt, chat_template or {})
    loader = _Loader(encode, max_prompt_tokens, difficulty, answers, columns or ColumnsConfig(), columns_required)
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
    """Return the name of each file in prompt ids: its base name, or its path if two files share a base name."""
    names = [str(path).removeprefix(HUB) if str(path).startswith(HUB) else Path(path).name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


class _Loader(NamedTuple):
    """Settings shared by all files of one `load_prompts` call."""

    encode: Encoder
    max_prompt_tokens: int
    difficulty: DifficultyFilter | None
    answers: bool
    columns: ColumnsConfig
    columns_required: bool

    def load(self, path: str, name: str) -> tuple[list[Prompt], FileReport]:
        rows = list(read_rows(path))
        whole = [row for _, row in rows if isinstance(row, dict)]
        named = self.columns if self.columns_required or has_columns(whole, self.columns) else None
        schema = detect(path, whole, self.answers, named)
        prompts: list[Prompt] = []
        bad: list[BadRow] = []
        over_long = 0
        filtered: Counter[str] = Counter()
        if self.difficulty:
            self.difficulty.seen_models.clear()
        for line, row in rows:
            try:
                if isinstance(row, RowError):
                    raise row
                if schema is None:
                    raise RowError("the file has no known schema")
                prompt = self._prompt(row, schema, f"{name}:{line}", name)
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
        report = FileReport(
            path=path,
            schema=schema.label if schema else "no known schema",
            rows=len(rows),
            kept=len(prompts),
            over_long=over_long,
            bad=tuple(bad),
            filtered=dict(filtered),
        )
        return prompts, report

    def _prompt(self, row: Row, schema: Schema, row_id: str, file: str) -> Prompt:
        truth = schema.truth(row)
        golds, tests = ((), truth) if isinstance(truth, CodeTests) else (truth, None)
        encoded = self.encode(schema.ask(row), schema.prompt)
        source = row.get(self.columns.source or "data_source")
        source = source if isinstance(source, str) and source else file
        return Prompt(
            id=row_id,
            # Half a surrogate pair cannot be written to a file.
            source=source.encode("utf-8", "replace").decode("utf-8"),
            text=encoded.text,
            token_ids=encoded.token_ids,
            golds=golds,
            tests=tests,
            # A problem of LiveCodeBench may have many megabytes of packed tests, which `tests` already contains.
            row={key: value for key, value in row.items() if key != "private_test_cases"},
            messages=encoded.messages,
        )

    def complaints(self, report: FileReport, max_bad_fraction: float) -> list[str]:
        """Return the reasons why a file is unusable; empty if it is usable."""
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
        if not report.filtered.get(UNRATED) or self.difficulty is None or self.difficulty.rates is not None:
            return ""
        wanted, seen = self.difficulty.model, self.difficulty.seen_models
        if wanted in seen:
            return ""
        found = f"; they have: {', '.join(sorted(map(str, seen)))}" if seen else ", nor for any other model"
        return f". No row has a count for data.difficulty_model = {wanted!r}{found}"
