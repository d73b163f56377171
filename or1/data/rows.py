"""Reading of JSONL, JSON-array, parquet, CSV and TSV files row by row. A broken row is a value, not an exception."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Any, BinaryIO

from or1.config.data_paths import HUB
from or1.core.errors import DataError, RowError
from or1.data.hub import files_of
from or1.data.kinds import HEAD_BYTES, foreign_kind
from or1.data.tables import read_table, separator_of

MAX_LINE_BYTES = 256 << 20
"""Size limit of a JSONL line. A longer line is a bad row and is never held in memory as a whole. LiveCodeBench packs
the tests of a problem into its line; or1.reward.ground_truth.MAX_TEST_BYTES limits those too."""

Row = dict[str, Any]


def read_rows(path: str) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (line or row number from 1, the row or a RowError). Blank lines are skipped.

    A file that begins with `[` is one JSON array of rows. A path such as hf:openai/gsm8k:main/train is a dataset of the
    hub, whose files are numbered through. Raises DataError if the file as a whole cannot be read, or has an
    unsupported format.
    """
    if path.startswith(HUB):
        before = 0
        for part in files_of(path):
            number = before
            for line, row in read_rows(part):
                number = before + line
                yield number, row
            before = number
        return
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
            file.seek(0)
            if foreign := foreign_kind(path, head):
                raise DataError(f"{path}: {foreign}")
            if head.startswith(b"PAR1") or path.endswith(".parquet"):
                yield from _read_parquet(path)
            elif separator := separator_of(path):
                yield from read_table(path, separator)
            elif head.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
                yield from _read_array(path, file.read())
            else:
                yield from _read_lines(file)
    except IsADirectoryError as error:
        raise DataError(f"{path}: is a folder; name the files in it") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _read_lines(file: BinaryIO) -> Iterator[tuple[int, Row | RowError]]:
    line = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        line += 1
        if len(raw) > MAX_LINE_BYTES:
            size = len(raw) if raw.endswith(b"\n") else len(raw) + _skip_line(file)
            yield (
                line,
                RowError(
                    f"line of {size} bytes is over the limit of {MAX_LINE_BYTES}; leave out columns that "
                    "are not needed, or write the file as parquet"
                ),
            )
        elif raw.strip():
            yield line, _parse_line(raw.removeprefix(BOM_UTF8) if line == 1 else raw)


def _skip_line(file: BinaryIO) -> int:
    """Skip the rest of a line; return its size in bytes."""
    size = 0
    while part := file.readline(1 << 20):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def _parse_line(raw: bytes) -> Row | RowError:
    if b"\0" in raw:
        return RowError(f"NUL byte at byte {raw.index(bytes(1)) + 1} of the line")
    try:
        row = json.loads(raw.rstrip().decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return RowError(f"not JSON: {error.msg.removesuffix(' at')} at character {error.colno}")
    except ValueError as error:
        return RowError(str(error))
    except RecursionError:
        return RowError("JSON nested too deeply")
    return _an_object(row)


def _read_array(path: str, raw: bytes) -> Iterator[tuple[int, Row | RowError]]:
    """Yield the elements of one JSON array, numbered from 1."""
    try:
        # A byte that is not UTF-8 becomes a lone surrogate, for which `or1.data.schemas.clean` rejects the row later.
        text = raw.removeprefix(BOM_UTF8).decode("utf-8", "surrogateescape")
        rows = json.loads(text, object_pairs_hook=_unique_or_error)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(
            f"{path}: is not a whole JSON array ({error.msg} at {where}); write it anew, or "
            "as JSONL, of which a broken line costs itself only"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: JSON nested too deeply") from error
    for number, row in enumerate(rows, 1):
        if isinstance(row, dict):
            row = next((value for value in row.values() if isinstance(value, RowError)), row)
        yield number, _an_object(row)


def _an_object(row: Any) -> Row | RowError:
    if isinstance(row, dict | RowError):
        return row
    return RowError(f"is a JSON {type(row).__name__}, not an object")


def _unique(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:60]!r} appears twice")
            seen.add(key)
    return row


def _unique_or_error(pairs: list[tuple[str, Any]]) -> Row | RowError:
    try:
        return _unique(pairs)
    except ValueError as error:
        return RowError(str(error))


def _read_parquet(path: str) -> Iterator[tuple[int, Row | RowError]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            count = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in _batch_rows(batch):
                    count += 1
                    yield count, row
    except (pyarrow.ArrowException, OSError) as error:
        cause = str(error).partition("\n")[0]
        raise DataError(f"{path}: is not a whole parquet file ({cause}); write it anew") from error


def _batch_rows(batch: Any) -> list[Row | RowError]:
    """Return the rows of a record batch; they are converted one by one if the conversion of the whole batch fails."""
    try:
        rows: list[Row | RowError] = batch.to_pylist()
        return rows
    except (ValueError, OverflowError):
        return [_batch_row(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _batch_row(batch: Any) -> Row | RowError:
    try:
        row: Row = batch.to_pylist()[0]
        return row
    except UnicodeDecodeError as error:
        return RowError(f"text is not UTF-8 at byte {error.start + 1}")
    except (ValueError, OverflowError) as error:
        return RowError(f"a value cannot be read: {str(error).partition(chr(10))[0][:80]}")
