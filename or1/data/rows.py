"""JSONL, JSON-array and parquet files -> rows, each with its number; a broken row is a value, not an exception."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from typing import Any, BinaryIO

MAX_LINE_BYTES = 32 << 20
"""A longer JSONL line is a bad row."""

Row = dict[str, Any]


class DataError(ValueError):
    """Data that cannot be trained on; the message names every offending file and its bad rows."""


class RowError(ValueError):
    """Why one row is unusable."""


def read_rows(path: str) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (line or row number from 1, the row or what is wrong with it). Blank lines are left out.

    A file that begins with `[` is one JSON array of rows. Raises DataError if the file as a whole cannot be read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
            file.seek(0)
            if head.startswith(b"PAR1") or path.endswith(".parquet"):
                yield from _read_parquet(path)
            elif head.removeprefix(BOM_UTF8).lstrip().startswith(b"["):
                yield from _read_array(path, file.read())
            else:
                yield from _read_lines(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error


def _read_lines(file: BinaryIO) -> Iterator[tuple[int, Row | RowError]]:
    for line, raw in enumerate(file, 1):
        if raw.strip():
            yield line, _parse_line(raw.removeprefix(BOM_UTF8) if line == 1 else raw)


def _parse_line(raw: bytes) -> Row | RowError:
    if len(raw) > MAX_LINE_BYTES:
        return RowError(f"line of {len(raw)} bytes is over the limit of {MAX_LINE_BYTES}")
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
    """The elements of one JSON array, counted from 1."""
    try:
        # A byte that is not UTF-8 becomes half a surrogate pair, which costs its own row when the text is looked at.
        text = raw.removeprefix(BOM_UTF8).decode("utf-8", "surrogateescape")
        rows = json.loads(text, object_pairs_hook=_unique_or_error)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}: is not a whole JSON array ({error.msg} at {where}); write it anew, or "
                        "as JSONL, of which a broken line costs itself only") from error
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
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} appears twice")
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
                for i in range(batch.num_rows):
                    count += 1
                    yield count, _parquet_row(batch.slice(i, 1))
    except (pyarrow.ArrowException, OSError) as error:
        cause = str(error).partition("\n")[0]
        raise DataError(f"{path}: is not a whole parquet file ({cause}); write it anew") from error


def _parquet_row(batch: Any) -> Row | RowError:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return RowError(f"text is not UTF-8 at byte {error.start + 1}")
