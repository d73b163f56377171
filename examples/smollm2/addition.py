"""Two-digit additions as chat questions, and their reward."""

from __future__ import annotations

import random
import re

HELD_OUT = 400
NUMBER = re.compile(r"\d+")


def problems(seed: int = 0) -> list[dict[str, str]]:
    """Return all 8,100 sums of two two-digit numbers, shuffled."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    return [{"question": f"What is {a} + {b}? Reply with the number only.", "answer": str(a + b)} for a, b in pairs]


def held_out_and_train() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return 400 held-out problems and the training problems.

    A pair and its swap (a + b, b + a) are on the same side, so no held-out sum is trained in either order.
    """
    rows = problems()
    held_out = rows[:HELD_OUT]
    operands = {frozenset(NUMBER.findall(row["question"])) for row in held_out}
    return held_out, [row for row in rows if frozenset(NUMBER.findall(row["question"])) not in operands]


def reward(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """Return 1.0 for each response whose last number is the answer, else 0.0 (the form of TRL's reward functions)."""
    return [float(NUMBER.findall(text)[-1:] == [right]) for text, right in zip(completions, answer, strict=True)]
