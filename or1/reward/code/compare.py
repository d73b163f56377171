"""Comparison of a program's answer with the expected one, outside the sandbox, on text and plain data."""

from __future__ import annotations

import json
from decimal import Decimal, InvalidOperation
from typing import Any


def same_output(actual: str, expected: str) -> bool:
    """Return whether two outputs are equal, line by line without surrounding whitespace.

    Lines of numbers are compared by value, as in LiveCodeBench: "1.0 2" is "1 2.00".
    """
    actual_lines, expected_lines = actual.strip().splitlines(), expected.strip().splitlines()
    return len(actual_lines) == len(expected_lines) and all(map(_same_line, actual_lines, expected_lines))


def _same_line(actual: str, expected: str) -> bool:
    actual, expected = actual.strip(), expected.strip()
    return actual == expected or ((numbers := _numbers(expected)) is not None and _numbers(actual) == numbers)


def _numbers(line: str) -> list[Decimal] | None:
    tokens = line.split()
    # Decimal also parses "1_0" and the digits of every script, which no expected output contains.
    if not all(token.isascii() and "_" not in token for token in tokens):
        return None
    try:
        numbers = [Decimal(token) for token in tokens]
    except InvalidOperation:
        return None
    # A signalling NaN raises when compared.
    return numbers if all(number.is_finite() for number in numbers) else None


def same_result(actual: Any, expected: str) -> bool:
    """Return whether the result of a call is equal to one of the JSON values in the lines of `expected`."""
    return any(same_value(actual, json.loads(line)) for line in expected.split("\n"))


def same_value(actual: Any, expected: Any) -> bool:
    """Return whether two values are equal in JSON, where tuples are lists and integer keys are text.

    Floats have no tolerance.
    """
    try:
        return _as_json(actual) == expected
    except (RecursionError, ValueError):  # ValueError: Python refuses to write a key of more than 4300 digits
        return False


def _as_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        as_text = {key_text(key): _as_json(item) for key, item in value.items()}
        # {1: 2, "1": 2} has no JSON form, since one of the two values would be lost.
        return as_text if len(as_text) == len(value) else value
    return value


def key_text(key: Any) -> Any:
    """Return a key in JSON form: an integer as text, any other key unchanged."""
    return str(key) if isinstance(key, int) and not isinstance(key, bool) else key
