"""Whether what a program answered is what the test expects. Runs outside the sandbox, on text and plain data."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Any


def same_output(actual: str, expected: str) -> bool:
    """Line by line without surrounding white space, then number by number: "1.0 2" is "1 2.00", as in LiveCodeBench."""
    actual_lines, expected_lines = actual.strip().splitlines(), expected.strip().splitlines()
    return len(actual_lines) == len(expected_lines) and all(map(_same_line, actual_lines, expected_lines))


def _same_line(actual: str, expected: str) -> bool:
    actual, expected = actual.strip(), expected.strip()
    return actual == expected or ((numbers := _numbers(expected)) is not None and _numbers(actual) == numbers)


def _numbers(line: str) -> list[Decimal] | None:
    try:
        numbers = [Decimal(token) for token in line.split()]
    except InvalidOperation:
        return None
    # A signalling NaN raises when compared.
    return numbers if all(number.is_finite() for number in numbers) else None


def same_value(actual: Any, expected: Any) -> bool:
    """Exact equality with tuples taken as lists, as JSON has them; no tolerance for floats."""
    try:
        return _as_lists(actual) == expected
    except RecursionError:
        return False


def _as_lists(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_lists(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_lists(item) for key, item in value.items()}
    return value
