"""A data mixture from several files: every row is kept, or dropped for one reason that is counted and written down.

The steps are those of the Skywork-OR1 report (section 6): duplicates within a file, answers extracted anew from worked
solutions, tests checked with a reference program, problems with URLs or figures, duplicates across files, problems of
evaluation sets.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from or1.config import ColumnsConfig
from or1.config.section import MOST_TOKENS
from or1.core.display import Display
from or1.core.errors import DataError
from or1.core.files import file_entry, replacing, write_whole
from or1.core.types import Prompt
from or1.data import PromptSet, load_prompts
from or1.data.contamination import EvalIndex
from or1.data.fingerprint import fingerprint
from or1.data.rows import Row, read_rows
from or1.data.screens import near_duplicates, normal_form, screen_reason
from or1.eval.checks import OK, UNCHECKED, open_checks
from or1.eval.store import PartStore, move_aside

_PART = 256
_VERDICT = pa.schema({"prompt_id": pa.string(), "verdict": pa.string()})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a mixture is made of.

    sources    files in the order of their priority: of two equal problems the first is kept
    out        folder for kept/, dropped.jsonl and report.json
    against    files whose problems the mixture must not repeat
    near       smallest similarity of two problems that count as one, if their answers are equal too; 1: equal texts
    ngram      consecutive words that a problem must share with one of `against`
    columns    names of columns that or1 does not know
    quality    parquet file of `or1 filter --judge`; its rejected and undecided problems are dropped
    workers    processes that check answers, and as many that run programs
    timeout_s  limit in seconds for the check of one answer
    """

    sources: tuple[str, ...]
    out: Path
    against: tuple[str, ...] = ()
    near: float = 0.8
    ngram: int = 13
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    quality: Path | None = None
    workers: int = 2
    timeout_s: float = 10.0


class _Fates:
    """The reason and the detail for which each problem is dropped, by prompt id; the first reason counts."""

    def __init__(self, prompts: Sequence[Prompt]):
        self._prompts = prompts
        self.of: dict[str, tuple[str, str]] = {}

    @property
    def left(self) -> list[Prompt]:
        return [prompt for prompt in self._prompts if prompt.id not in self.of]

    def drop(self, prompt: Prompt, reason: str, detail: str = "") -> None:
        self.of.setdefault(prompt.id, (reason, detail))


def build_mixture(recipe: Recipe, display: Display, fresh: bool = False) -> dict[str, Any]:
    """Write the mixture, and return its report. The same command resumes, and equal inputs give equal files.

    Verdicts on answers and programs are kept in `out`/checks.parts, from which the same command resumes.
    Raises DataError, StoreError, ScorerError.
    """
    if fresh and (message := move_aside(recipe.out)):
        display.message(message)
    loaded = _load(recipe.sources, columns=recipe.columns, columns_required=False)
    if len(set(recipe.sources)) < len(recipe.sources):
        raise DataError("a file is named twice among the sources; name each once")
    fates, source_of = _Fates(loaded.prompts), {}
    firsts = iter(loaded.prompts)
    for path, report in zip(recipe.sources, loaded.reports, strict=True):
        source_of |= {next(firsts).id: path for _ in range(report.kept)}
    for prompt in loaded.prompts:
        if prompt.tests is None and (reason := screen_reason(prompt.text)):
            fates.drop(prompt, reason)
    if recipe.quality is not None:
        _drop_poor(recipe.quality, fates)
    forms = {prompt.id: normal_form(prompt.text) for prompt in loaded.prompts}
    notes: Counter[str] = Counter()
    _drop_equal(fates, forms, source_of, notes, same_truth=True)
    _drop_unproven(recipe, fates, display, notes)
    _drop_equal(fates, forms, source_of, notes, same_truth=False)
    _drop_near(recipe, fates, forms, source_of, notes)
    _drop_contaminated(recipe, fates)
    bad = {
        (path, each.line): each.reason for path, r in zip(recipe.sources, loaded.reports, strict=True) for each in r.bad
    }
    lines = {(source_of[p.id], int(p.id.rpartition(":")[2])): fates.of.get(p.id) for p in loaded.prompts}
    sources = _write_rows(recipe, {**lines, **{at: ("unusable", reason) for at, reason in bad.items()}})
    report = _report(recipe, sources, notes)
    write_whole(recipe.out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def _load(paths: Sequence[str], **options: Any) -> PromptSet:
    """Load files of any length of problem, whatever the number of unusable rows."""
    return load_prompts(paths, None, max_prompt_tokens=MOST_TOKENS, max_bad_fraction=1.0, **options)


def _truth(prompt: Prompt) -> str:
    return repr(prompt.tests) if prompt.tests is not None else normal_form(" ; ".join(sorted(prompt.golds)))


def _repeat(one: str, other: str) -> str:
    return "in_file" if one == other else "across_files"


def _drop_equal(
    fates: _Fates, forms: Mapping[str, str], source_of: Mapping[str, str], notes: Counter[str], *, same_truth: bool
) -> None:
    """Drop problems whose text an earlier one has; with `same_truth`, only those with its answer or tests."""
    first: dict[tuple[str, str], Prompt] = {}
    for prompt in fates.left:
        one = first.setdefault((forms[prompt.id], _truth(prompt) if same_truth else ""), prompt)
        if one is not prompt:
            fates.drop(prompt, f"duplicate_{_repeat(source_of[one.id], source_of[prompt.id])}", one.id)
            notes["duplicates with another answer"] += not same_truth


def _drop_near(
    recipe: Recipe, fates: _Fates, forms: Mapping[str, str], source_of: Mapping[str, str], notes: Counter[str]
) -> None:
    """Drop problems that an earlier one nearly repeats. With another answer it is another problem, and stays."""
    if recipe.near >= 1:
        return
    left = fates.left
    for prompt, at in zip(left, near_duplicates([forms[p.id] for p in left], recipe.near), strict=True):
        if at is None:
            continue
        if _truth(one := left[at]) == _truth(prompt):
            fates.drop(prompt, f"near_duplicate_{_repeat(source_of[one.id], source_of[prompt.id])}", one.id)
        else:
            notes["near duplicates with another answer, kept"] += 1


def _drop_contaminated(recipe: Recipe, fates: _Fates) -> None:
    if not recipe.against:
        return
    sets = {path: _load([path], answers=False).prompts for path in recipe.against}
    left = fates.left
    by_id = {prompt.id: prompt for prompt in left}
    for found in EvalIndex(sets, recipe.ngram).find(left):
        fates.drop(by_id[found.prompt_id], "contaminated", f"{found.eval_id}: {found.words[:200]}")


def _drop_poor(path: Path, fates: _Fates) -> None:
    """Drop the problems that judges rejected, could not decide, or never saw."""
    try:
        table = pq.read_table(path, columns=["prompt", "verdict"], page_checksum_verification=True)
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: is no result of `or1 filter --judge` ({error}); name its parquet file") from error
    verdicts = dict(zip(*(table[name].to_pylist() for name in ("prompt", "verdict")), strict=True))
    for prompt in fates.left:
        if (verdict := verdicts.get(prompt.text, "not_judged")) != "kept":
            fates.drop(prompt, f"judges_{verdict}")


def _drop_unproven(recipe: Recipe, fates: _Fates, display: Display, notes: Counter[str]) -> None:
    """Check answers and programs in parts that are kept, and drop what fails."""
    left = fates.left
    folder = recipe.out / "checks.parts"
    settings = {"problems": fingerprint(left, columns=True), "timeout_s": recipe.timeout_s, "checks": 1}
    store = PartStore(folder, recipe.out / "checks.parquet", settings, _VERDICT, _PART)
    progress = display.progress("checks")
    starts = range(0, len(left), store.size)
    missing = [start for index, start in enumerate(starts) if index not in store]
    if missing:
        with open_checks(left, recipe.workers, recipe.timeout_s) as check:
            for start in missing:
                part = left[start : start + store.size]
                waits = [check(prompt) for prompt in part]
                rows = [{"prompt_id": p.id, "verdict": wait()} for p, wait in zip(part, waits, strict=True)]
                store.write(start // store.size, rows)
                progress(start + len(part), len(left))
    if left:
        store.merge()
    verdicts = [row["verdict"] for table in store.tables() for row in table.to_pylist()] if left else []
    for prompt, verdict in zip(left, verdicts, strict=True):
        if verdict == UNCHECKED:
            notes["answers without a worked solution, not checked"] += 1
        elif verdict == OK:
            notes["programs checked" if prompt.tests is not None else "answers checked"] += 1
        else:
            fates.drop(prompt, verdict)


def _write_rows(recipe: Recipe, fates: Mapping[tuple[str, int], tuple[str, str] | None]) -> list[dict[str, Any]]:
    """Write kept/NAME.jsonl of every source, and dropped.jsonl. Return the counts of every source."""
    sources = []
    kept_folder = recipe.out / "kept"
    kept_folder.mkdir(parents=True, exist_ok=True)
    with replacing(recipe.out / "dropped.jsonl") as partial, open(partial, "w", encoding="utf-8") as dropped:
        for number, path in enumerate(recipe.sources, 1):
            counts: Counter[str] = Counter()
            name = kept_folder / f"{number:02d}-{Path(path).stem.replace(':', '-')}.jsonl"
            with replacing(name) as kept_partial, open(kept_partial, "w", encoding="utf-8") as kept:
                for line, row in read_rows(path):
                    reason, detail = fates.get((path, line)) or ("kept", "")
                    counts[reason] += 1
                    if reason == "kept":
                        kept.write(_line(row))
                    else:
                        shown = row if isinstance(row, dict) else None
                        where = {"source": path, "line": line, "reason": reason, "detail": detail}
                        dropped.write(_line({**where, "row": shown}))
            sources.append({"path": path, "file": name.name, **_counts(counts)})
    stale = {path.name for path in kept_folder.glob("*.jsonl")} - {source["file"] for source in sources}
    for old in stale:
        (kept_folder / old).unlink()
    return sources


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _counts(counts: Counter[str]) -> dict[str, Any]:
    dropped = {reason: count for reason, count in sorted(counts.items()) if reason != "kept"}
    return {"rows": counts.total(), "kept": counts["kept"], "dropped": dropped}


def _report(recipe: Recipe, sources: Sequence[dict[str, Any]], notes: Counter[str]) -> dict[str, Any]:
    total: Counter[str] = Counter()
    for source in sources:
        total.update({"kept": source["kept"], **source["dropped"]})
        source["sha256"] = file_entry(recipe.out / "kept" / source["file"])["sha256"]
    settings = {"near": recipe.near, "ngram": recipe.ngram, "against": list(recipe.against)}
    whole = _counts(total)
    return {**whole, "notes": dict(sorted(notes.items())), "settings": settings, "sources": list(sources)}


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the counts of a report for a person."""
    for source in (*report["sources"], {"path": "all", **report}):
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in source["dropped"].items()) or "nothing"
        yield f"{source['path']}: {source['kept']:,} of {source['rows']:,} rows kept; dropped: {dropped}"
    for note, count in report["notes"].items():
        yield f"  {count:,} {note}"
