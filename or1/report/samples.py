"""`or1 show`: saved responses of a step, chosen by reward or status, and printed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from or1.core.errors import ReportError
from or1.core.records import number
from or1.core.text import value_text
from or1.report.console import default_console, safe
from or1.report.page_samples import KINDS, check_row, kind_of, require_columns, rollout_files, rows_of
from or1.reward.terms import RIGHT, status_word

if TYPE_CHECKING:
    from rich.console import Console

_MOST = 3000
"""Characters of a prompt or response that are shown without --full."""


@dataclass(frozen=True)
class Shown:
    """The responses to print.

    counts  number of responses of the whole step by status, as words
    mean    mean reward of the step; NaN if no response has a reward
    rows    the chosen rows, with the columns of the rollout file
    """

    step: int
    counts: dict[str, int]
    mean: float
    rows: list[dict[str, Any]]


def load_shown(run_dir: Path, step: int | None = None, order: str = "", status: str = "", count: int = 4) -> Shown:
    """Return responses of a saved rollout.

    step    None: the newest saved step
    order   "best" or "worst": by reward, without responses that have none, and with equal rewards one response of
            each prompt first; "": one of each kind that the step has
            (solved, partial, failed, truncated), or the first ones with `status`
    status  only responses with this status; "": all
    count   the largest number of responses

    Raises ReportError if there is no such rollout, or it cannot be read.
    """
    from pyarrow import ArrowException

    chosen, path = _file(run_dir, step)
    try:
        return _read(chosen, path, order, status, count)
    except (ValueError, OSError, OverflowError, ArrowException) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ReportError(f"{path} cannot be read: {why}; choose another --step") from error


def _file(run_dir: Path, step: int | None) -> tuple[int, Path]:
    files = dict(rollout_files(run_dir))
    if not files:
        raise ReportError(
            f"{run_dir} has no saved rollout; name the run_dir of an `or1 train`, and wait for its first step"
        )
    newest = max(files)
    chosen = newest if step is None else step
    if chosen not in files:
        near = min(files, key=lambda each: abs(each - chosen))
        raise ReportError(
            f"{run_dir} has no saved rollout of step {chosen} (log.rollouts_every_steps); the nearest of its "
            f"{len(files)} is step {near}, the newest step {newest}"
        )
    return chosen, files[chosen]


def _read(step: int, path: Path, order: str, status: str, count: int) -> Shown:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        require_columns(file)
        light = file.read(columns=["reward", "finish", "status", *_names_of(file)]).to_pylist()
        indices = _chosen(light, order, status)[:count]
        found = rows_of(file, set(indices))
    rows = [found[index] for index in indices]
    for row in rows:
        check_row(row)
    counts = Counter(status_word(str(row["status"]), str(row["finish"])) for row in light)
    rewards = [value for row in light if math.isfinite(value := number(row["reward"]))]
    mean = math.fsum(rewards) / len(rewards) if rewards else math.nan
    return Shown(step, dict(counts.most_common()), mean, rows)


def _chosen(light: Sequence[dict[str, Any]], order: str, status: str) -> list[int]:
    indices = [index for index, row in enumerate(light) if not status or row["status"] == status]
    if order:
        graded = [index for index in indices if math.isfinite(number(light[index]["reward"]))]
        sign = -1 if order == "best" else 1
        ranked = sorted(graded, key=lambda index: sign * number(light[index]["reward"]))
        return _varied(ranked, light)
    if status:
        return indices
    kinds = [kind_of(row) for row in light]
    firsts = [kinds.index(kind) for kind in KINDS if kind in kinds]
    return firsts + [index for index in indices if index not in firsts]


def _names_of(file: Any) -> list[str]:
    return [name for name in ("prompt_id",) if name in file.schema_arrow.names]


def _varied(ranked: Sequence[int], light: Sequence[dict[str, Any]]) -> list[int]:
    """Return the ranked rows with those of equal reward in turns: first one of each prompt, then a second."""
    turns: Counter[tuple[float, Any]] = Counter()
    places: dict[int, int] = {}
    for index in ranked:
        key = (number(light[index]["reward"]), light[index].get("prompt_id"))
        places[index] = turns[key]
        turns[key] += 1
    rank = {reward: place for place, reward in enumerate(dict.fromkeys(number(light[i]["reward"]) for i in ranked))}
    return sorted(ranked, key=lambda index: (rank[number(light[index]["reward"])], places[index]))


def print_shown(shown: Shown, full: bool = False, console: Console | None = None) -> None:
    """Print the counts of the step, and every chosen response with its prompt. full: do not shorten texts."""
    from rich.text import Text

    console = console or default_console()
    counts = ", ".join(f"{count:,} {word}" for word, count in shown.counts.items())
    total = sum(shown.counts.values())
    head = f"step {shown.step}: {total:,} responses ({counts}), mean reward {value_text(shown.mean, 'fixed3')}"
    console.print(safe(head, console, "bold"), soft_wrap=True)
    if not shown.rows:
        console.print("no such response in this step", soft_wrap=True)
    for row in shown.rows:
        reward = number(row["reward"])
        style = "green" if reward >= RIGHT else "yellow" if reward > 0 else "red"
        title = safe(row.get("prompt_id") or "response", console, "bold")
        title.append_text(safe(f"  reward {value_text(reward, 'fixed3')}", console, style))
        console.print(Text("\n") + title + safe("".join(f"  {word}" for word in _words(row)), console), soft_wrap=True)
        golds = ", ".join(row.get("golds") or ())
        for name, value in (("prompt", row["prompt"]), ("reference", golds), ("response", row["response"])):
            if value or name == "response":
                console.print(Text(f"  {name}", style="dim"), soft_wrap=True)
                text = "\n".join(f"    {line}" for line in _clipped(value or "", full).split("\n"))
                console.print(safe(text, console), soft_wrap=True)


def _words(row: dict[str, Any]) -> list[str]:
    words = [status_word(row["status"], row["finish"])]
    words += [f"{len(row['token_ids']):,} tokens"] if row.get("token_ids") else []
    if row.get("advantage") is not None:
        words.append(f"advantage {row['advantage']:+.2f}")
    elif row.get("kept") is False:
        words.append("group rejected")
    return words


def _clipped(text: str, full: bool) -> str:
    if full or len(text) <= _MOST:
        return text
    head, tail = text[: 2 * _MOST // 3], text[-_MOST // 3 :]
    return f"{head}\n[{len(text) - len(head) - len(tail):,} characters left out; --full shows them]\n{tail}"
