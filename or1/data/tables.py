"""Reading of CSV and TSV files: the first line names the columns, and every value is text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from or1.core.errors import DataError, RowError

MAX_FIELD_CHARS = 256 << 20
"""Largest number of characters of a value; Python's own limit is 131,072, and program tests are longer."""
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def separator_of(path: str) -> str:
    """Return the separator of the values of a file by the ending of its name; "" if the file is no table."""
    return next((mark for ending, mark in _SEPARATORS.items() if path.lower().endswith(ending)), "")


def read_table(path: str, separator: str) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Yield (row number from 1, row) of a table as of RFC 4180: quoted values may hold separators and line breaks.

    An empty value without quotes is a missing one, as in pandas and polars. Text must be UTF-8.

    Raises DataError for a file without a header, with two columns of one name, or that is not UTF-8.
    """
    csv.field_size_limit(MAX_FIELD_CHARS)
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            header = next(reader, [])
            _check(path, header, separator)
            for values in reader:
                if values:
                    number += 1
                    yield number, _row(header, values)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 at byte {error.start}; convert the file with iconv -t UTF-8") from error
    except csv.Error as error:
        raise DataError(
            f"{path}: is not a whole table after {number} rows ({error}); write it anew, for example with pandas: "
            "to_csv(FILE, index=False)"
        ) from error


def _check(path: str, header: list[str], separator: str) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: column {twice[0]!r} appears twice in the first line; rename one")
    if len(header) == 1 and ";" in header[0] and separator == ",":
        raise DataError(f"{path}: its values are separated by semicolons; write the file with commas")


def _row(header: list[str], values: list[str]) -> dict[str, Any] | RowError:
    if len(values) != len(header):
        return RowError(f"has {len(values)} values, and the first line names {len(header)} columns")
    return {name: value or None for name, value in zip(header, values, strict=True)}
