"""The reward of GSM8K: the last number of a response, compared with the number behind #### of the published answer."""

from __future__ import annotations

import re

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def reward(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """Return 1.0 for each response whose last number equals the answer, else 0.0."""
    return [float(_last(text) == _last(right)) for text, right in zip(completions, answer, strict=True)]


def _last(text: str) -> float | None:
    found = NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None
