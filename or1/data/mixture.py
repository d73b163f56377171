"""One parquet file of training problems from several files; every dropped row is counted and listed with its reason.

The steps are those of the Skywork-OR1 report (section 6). It screens problems by their text, and compares answers with
worked solutions. It runs reference programs, and removes repetitions and problems of evaluation sets.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from or1.config import ColumnsConfig
from or1.config.section import MOST_TOKENS
from or1.core.display import Display
from or1.core.errors import DataError, RowError
from or1.core.files import file_entry, replacing, write_whole
from or1.core.result_log import ResultLog
from or1.core.types import Prompt
from or1.data.checks import MATCHED, NO_REFERENCE, OK, check_all
from or1.data.contamination import EvalIndex
from or1.data.load import PromptSet, load_prompts
from or1.data.rows import read_rows
from or1.data.screens import near_duplicates, normal_form, screen_reason
from or1.data.verl_rows import difficulty_models, verl_row, write_rows

NGRAM = 13
"""Consecutive words that a problem must share with one of an evaluation set to be dropped."""
_CHECKS = {"checks": 1}
"""Version of the checks, for the file of their verdicts."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a mixture is made of.

    sources    files in the order of their priority: of two equal problems the first is kept
    out        parquet file to write. Beside the file: OUT.dropped.jsonl, OUT.report.json, OUT.checks.jsonl
    against    files of evaluation problems that the mixture must not repeat
    near       smallest Jaccard similarity of near duplicates with equal answers; 1 keeps them
    longest    longest statement in characters
    allow      reasons of `or1.config.mixture.SCREENS` for which nothing is dropped
    columns    names of columns that or1 does not know
    judged     file of `or1 filter --judge`: only what it keeps is kept
    workers    processes that check answers, and as many that run programs
    """

    sources: tuple[str, ...]
    out: Path
    against: tuple[str, ...] = ()
    near: float = 0.8
    longest: int = 8000
    allow: tuple[str, ...] = ()
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    judged: Path | None = None
    workers: int = 2

    def beside(self, name: str) -> Path:
        """Return the path of a file that belongs to the mixture."""
        return self.out.with_name(f"{self.out.name}.{name}")


class _Fates:
    """The reason and the detail for which each problem is dropped; the first reason counts."""

    def __init__(self, prompts: Sequence[Prompt]):
        self._prompts = prompts
        self.of: dict[str, tuple[str, str]] = {}

    @property
    def left(self) -> list[Prompt]:
        return [prompt for prompt in self._prompts if prompt.id not in self.of]

    def drop(self, prompt: Prompt, reason: str, detail: str = "") -> None:
        self.of.setdefault(prompt.id, (reason, detail))


def build_mixture(recipe: Recipe, display: Display) -> dict[str, Any]:
    """Write the mixture, and return its report. Equal inputs give equal files.

    Verdicts of checks are kept beside the file, so that the same command resumes, and another source costs only itself.
    Raises DataError, StoreError, ScorerError.
    """
    _require_named_once(recipe)
    loaded = _load(recipe.sources, columns=recipe.columns, columns_required=False)
    fates, notes = _Fates(loaded.prompts), Counter[str]()
    _screen(recipe, fates)
    _check(recipe, fates, notes, display)
    forms = {prompt.id: normal_form(prompt.text) for prompt in fates.left}
    _drop_equal(fates, forms, notes)
    if recipe.near < 1:
        _drop_near(recipe.near, fates, forms, notes)
    _drop_contaminated(recipe.against, fates)
    if recipe.judged is not None:
        _drop_poor(recipe.judged, fates)
    kept = []
    models = difficulty_models(fates.left)
    for prompt in fates.left:
        row = verl_row(prompt, recipe.columns, models)
        if row is None:
            fates.drop(prompt, "tests_not_writable")
        else:
            kept.append(row)
    write_rows(recipe.out, kept, models)
    report = _report(recipe, loaded, fates, notes)
    write_whole(recipe.beside("report.json"), json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def _require_named_once(recipe: Recipe) -> None:
    for path in recipe.sources:
        if recipe.sources.count(path) > 1:
            raise DataError(f"{path}: is named twice among the sources; name each file once")
        if path in recipe.against:
            raise DataError(f"{path}: is a source and a set of --against, so nothing would be left; remove one of them")
        if Path(path).resolve() == recipe.out.resolve():
            raise DataError(f"{path}: is a source and --out; write the mixture to another file")


def _load(paths: Sequence[str], **options: Any) -> PromptSet:
    """Load files of any length of problem, whatever the number of unusable rows."""
    return load_prompts(paths, None, max_prompt_tokens=MOST_TOKENS, max_bad_fraction=1.0, **options)


def _truth(prompt: Prompt) -> str:
    return repr(prompt.tests) if prompt.tests is not None else normal_form(" ; ".join(sorted(prompt.golds)))


def _screen(recipe: Recipe, fates: _Fates) -> None:
    for prompt in fates.left:
        if len(prompt.text) > recipe.longest:
            fates.drop(prompt, "too_long", f"{len(prompt.text)} characters")
        elif prompt.tests is None and (reason := screen_reason(prompt, recipe.allow)):
            fates.drop(prompt, reason)


def _drop_poor(path: Path, fates: _Fates) -> None:
    """Drop the problems that judges rejected, could not decide, or never saw."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=["prompt", "verdict"], page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise DataError(f"{path}: is no file of `or1 filter --judge` ({cause}); name its parquet file") from error
    verdicts = dict(zip(*(table[name].to_pylist() for name in ("prompt", "verdict")), strict=True))
    for prompt in fates.left:
        if (verdict := verdicts.get(prompt.text, "not_judged")) != "kept":
            fates.drop(prompt, verdict)


def _check(recipe: Recipe, fates: _Fates, notes: Counter[str], display: Display) -> None:
    left = fates.left
    with ResultLog(recipe.beside("checks.jsonl"), _CHECKS) as results:
        verdicts = check_all(left, results, recipe.workers, display.progress("checks"))
    for prompt, verdict in zip(left, verdicts, strict=True):
        if verdict == NO_REFERENCE and NO_REFERENCE in recipe.allow:
            notes["programming problems without a reference program, not checked"] += 1
        elif verdict == MATCHED:
            notes["answers checked with their worked solution"] += 1
        elif verdict == OK:
            known = prompt.tests is not None
            notes[
                "programming problems checked with a reference program"
                if known
                else "answers without a worked solution of their own"
            ] += 1
        else:
            fates.drop(prompt, verdict)


def _drop_equal(fates: _Fates, forms: Mapping[str, str], notes: Counter[str]) -> None:
    """Drop problems whose text an earlier one has."""
    first: dict[str, Prompt] = {}
    for prompt in fates.left:
        one = first.setdefault(forms[prompt.id], prompt)
        if one is not prompt:
            fates.drop(prompt, "duplicate", one.id)
            notes["duplicates whose answer or tests differ in form"] += _truth(one) != _truth(prompt)


def _drop_near(threshold: float, fates: _Fates, forms: Mapping[str, str], notes: Counter[str]) -> None:
    """Drop problems that an earlier one nearly repeats. With another answer it is another problem, and stays."""
    left = fates.left
    for prompt, at in zip(left, near_duplicates([forms[p.id] for p in left], threshold), strict=True):
        if at is None:
            continue
        if _truth(left[at]) == _truth(prompt):
            fates.drop(prompt, "near_duplicate", left[at].id)
        else:
            notes["near duplicates with another answer, kept"] += 1


def _drop_contaminated(against: Sequence[str], fates: _Fates) -> None:
    if not against:
        return
    sets = {path: _load([path], answers=False).prompts for path in against}
    left = fates.left
    by_id = {prompt.id: prompt for prompt in left}
    for found in EvalIndex(sets, NGRAM).find(left):
        fates.drop(by_id[found.prompt_id], "contaminated", f"{found.eval_id}: {found.words[:200]}")


def _report(recipe: Recipe, loaded: PromptSet, fates: _Fates, notes: Counter[str]) -> dict[str, Any]:
    """Write the list of dropped rows, and return the counts of every source."""
    ids = iter(loaded.prompts)
    total, sources = Counter[str](), []
    # A row may hold half a surrogate pair, which has no UTF-8; `backslashreplace` writes the escape of JSON.
    list_file = recipe.beside("dropped.jsonl")
    with replacing(list_file) as made, open(made, "w", encoding="utf-8", errors="backslashreplace") as dropped:
        for path, report in zip(recipe.sources, loaded.reports, strict=True):
            of_line = {int(p.id.rpartition(":")[2]): p for p in islice(ids, report.kept)}
            bad = {row.line: row.reason for row in report.bad}
            counts: Counter[str] = Counter()
            for line, row in read_rows(path):
                prompt = of_line.get(line)
                fate = ("unusable", bad.get(line, "")) if prompt is None else fates.of.get(prompt.id)
                counts[fate[0] if fate else "kept"] += 1
                if fate:
                    where = {"source": path, "line": line, "reason": fate[0], "detail": fate[1]}
                    shown = None if isinstance(row, RowError) else row
                    dropped.write(json.dumps({**where, "row": shown}, ensure_ascii=False, default=str) + "\n")
            total += counts
            sources.append({"path": path, **_counts(counts)})
    settings = {"near": recipe.near, "longest": recipe.longest, "allow": sorted(recipe.allow), "ngram": NGRAM}
    settings |= {"against": list(recipe.against), "judged": None if recipe.judged is None else str(recipe.judged)}
    own = {**file_entry(recipe.out), "path": str(recipe.out)}
    return {
        **_counts(total),
        "notes": dict(sorted(notes.items())),
        "settings": settings,
        "sources": sources,
        "file": own,
    }


def _counts(counts: Counter[str]) -> dict[str, Any]:
    dropped = {reason: count for reason, count in sorted(counts.items()) if reason != "kept"}
    return {"rows": counts.total(), "kept": counts["kept"], "dropped": dropped}


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the counts of a report for a person."""
    for source in (*report["sources"], {**report, "path": "all"}):
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in source["dropped"].items()) or "nothing"
        yield f"{source['path']}: {source['kept']:,} of {source['rows']:,} rows kept; dropped: {dropped}"
    for note, count in report["notes"].items():
        if count:
            yield f"  {count:,} {note}"
