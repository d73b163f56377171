"""Example transcripts for the report: a solved, a partial, a failed and a truncated response of saved rollouts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from or1.core.records import number
from or1.report.page_data import RecordedRun
from or1.reward.terms import RIGHT

if TYPE_CHECKING:
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

_COLUMNS = (
    "step",
    "stage",
    "prompt_id",
    "prompt",
    "golds",
    "response",
    "token_ids",
    "logp",
    "reward",
    "status",
    "finish",
    "version",
    "advantage",
    "kept",
)

KINDS = ("solved", "partial", "failed", "truncated")
# Allowed types of the values of a column, and of the items of its lists.
_TYPES: dict[str, tuple[type, ...]] = {
    "status": (str,),
    "finish": (str,),
    "prompt_id": (str, NoneType),
    "prompt": (str, NoneType),
    "response": (str, NoneType),
    "reward": (int, float, NoneType),
    "advantage": (int, float, NoneType),
    "kept": (bool, NoneType),
    "golds": (list, NoneType),
    "token_ids": (list, NoneType),
    "logp": (list, NoneType),
}
_ITEM_TYPES: dict[str, tuple[type, ...]] = {"golds": (str,), "token_ids": (int,), "logp": (int, float)}


def kind_of(row: dict[str, Any]) -> str:
    """Return the tag of a response by its reward and finish reason (not its status); no reward counts as failed."""
    reward = number(row["reward"])
    if reward >= RIGHT:
        return "solved"
    if row["finish"] != "stop":
        return "truncated"
    return "partial" if reward > 0 else "failed"


@dataclass(frozen=True)
class Sample:
    """One saved response: its columns, and its text by token with log-probs (None if the tokens cannot be decoded)."""

    kind: str
    row: dict[str, Any]
    pieces: tuple[tuple[str, float], ...] | None


@dataclass(frozen=True)
class SampleStep:
    """The transcripts taken from one rollout file."""

    step: int
    samples: tuple[Sample, ...]


def load_samples(run: RecordedRun) -> tuple[list[SampleStep], list[str]]:
    """Return transcripts of the first, middle and last readable rollout, and notes on unreadable files."""
    from pyarrow import ArrowException

    tokenizer = _tokenizer(run)
    files = rollout_files(run.path)
    steps: dict[int, SampleStep] = {}
    notes = []
    while todo := [item for item in _spread(files) if item[0] not in steps]:
        step, path = todo[0]
        try:
            steps[step] = SampleStep(step, tuple(_samples(path, tokenizer)))
        except (ValueError, OSError, OverflowError, ArrowException) as error:
            files.remove((step, path))
            why = (str(error).splitlines() or [type(error).__name__])[0]
            notes.append(f"rollouts/{path.name} cannot be read: {why}")
    return [steps[step] for step, _ in _spread(files)], notes


def rollout_files(run_dir: Path) -> list[tuple[int, Path]]:
    """Return step and path of every saved rollout, ascending."""
    found = (run_dir / "rollouts").glob("step_*.parquet")
    return sorted((int(path.stem[5:]), path) for path in found if re.fullmatch("[0-9]{1,9}", path.stem[5:]))


def _spread(files: list[tuple[int, Path]]) -> list[tuple[int, Path]]:
    """Return the first, middle and last file, without repeats."""
    indices = sorted({0, len(files) // 2, len(files) - 1}) if files else []
    return [files[index] for index in indices]


def _samples(path: Path, tokenizer: Tokenizer | None) -> Iterator[Sample]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        require_columns(file)
        labels = [kind_of(row) for row in file.read(columns=["reward", "finish"]).to_pylist()]
        picks = {}
        for kind in KINDS:
            rows = [index for index, label in enumerate(labels) if label == kind]
            if rows:
                picks[kind] = rows[len(rows) // 2]
        found = rows_of(file, set(picks.values()))
    for kind, index in picks.items():
        check_row(found[index])
        yield Sample(kind, found[index], _pieces(found[index], tokenizer))


def require_columns(file: pq.ParquetFile) -> None:
    """Raise ValueError if a rollout file lacks a column that every sample needs."""
    missing = {"status", "finish", "response", "prompt", "reward"} - set(file.schema_arrow.names)
    if missing:
        raise ValueError(f"missing columns {', '.join(sorted(missing))}")


def check_row(row: dict[str, Any]) -> None:
    """Raise ValueError if a column holds what the page cannot show."""
    for name, wanted in _TYPES.items():
        values = [row.get(name)]
        if type(values[0]) is list and name in _ITEM_TYPES:
            values, wanted = values[0], _ITEM_TYPES[name]
        for value in values:
            if type(value) not in wanted:
                names = " or ".join(each.__name__ for each in wanted if each is not NoneType)
                raise ValueError(f"column {name} holds {type(value).__name__} instead of {names}")


def rows_of(file: pq.ParquetFile, wanted: set[int]) -> dict[int, dict[str, Any]]:
    """Return the wanted rows by index. The file is streamed: a rollout of long responses may not fit into memory."""
    columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
    found, start = {}, 0
    for batch in file.iter_batches(batch_size=64, columns=columns):
        for index in wanted:
            if start <= index < start + batch.num_rows:
                found[index] = batch.slice(index - start, 1).to_pylist()[0]
        start += batch.num_rows
        if len(found) == len(wanted):
            break
    return found


def _tokenizer(run: RecordedRun) -> Tokenizer | None:
    """Load the run's tokenizer from a local tokenizer.json: no network access, no remote code. None if not found."""
    folders = [Path(run.config.model.path)] if run.config is not None else []
    folders += sorted((run.path / "weights").glob("step_*"))
    for file in (folder / "tokenizer.json" for folder in folders):
        if _is_json(file):
            from tokenizers import Tokenizer

            try:
                return Tokenizer.from_file(str(file))
            except Exception:  # noqa: BLE001 - the library raises plain Exception for JSON that is no tokenizer
                continue
    return None


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except (OSError, ValueError, RecursionError):
        return False


def _pieces(row: dict[str, Any], tokenizer: Tokenizer | None) -> tuple[tuple[str, float], ...] | None:
    """Return the response split into tokens, or None if the tokens do not decode to the saved text."""
    ids, logp, response = row.get("token_ids") or [], row.get("logp") or [], row["response"] or ""
    if tokenizer is None or not ids or len(ids) != len(logp) or not 0 <= min(ids) <= max(ids) < 2**32:
        return None
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    plain = tokenizer.decode(ids, skip_special_tokens=True)
    if response.strip() not in (whole.strip(), plain.strip()):
        return None
    pieces = tuple(_split(ids, logp, tokenizer))
    return pieces if "".join(text for text, _ in pieces) == whole else None


def _split(ids: Sequence[int], logp: Sequence[float], tokenizer: Tokenizer) -> Iterator[tuple[str, float]]:
    """Yield text and log-prob of each token. Tokens that share a character are merged, with the lowest log-prob."""
    before, start = 0, 0
    for end in range(1, len(ids) + 1):
        # Decoded after the previous token: sentencepiece drops the leading space of the first token.
        shown = tokenizer.decode(ids[before:start], skip_special_tokens=False)
        text = tokenizer.decode(ids[before:end], skip_special_tokens=False)[len(shown) :]
        if text.endswith("\ufffd") and end < len(ids):
            continue
        yield text, min(logp[start:end])
        before, start = start, end
