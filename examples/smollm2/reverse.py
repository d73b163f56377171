"""A task whose reward is a matter of taste: spell a word backwards, and get a share of the reward for a share of it."""

from __future__ import annotations

import random
import re

HELD_OUT = 200
TRAIN = 4000
CONSONANTS, VOWELS = "bcdfghjklmnprstvwz", "aeiou"
LETTERS = re.compile(r"[a-z]+")


def held_out_and_train(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return 200 held-out and 4,000 training problems: different invented words of three or four letters."""
    rng = random.Random(seed)
    words: dict[str, None] = {}
    while len(words) < HELD_OUT + TRAIN:
        letters = [rng.choice(CONSONANTS if i % 2 == 0 else VOWELS) for i in range(rng.choice((3, 4)))]
        words["".join(letters)] = None
    rows = [
        {
            "question": f"Write the letters of {'-'.join(word)} in reverse order, like a-b-c.",
            "answer": "-".join(word[::-1]),
        }
        for word in words
    ]
    return rows[:HELD_OUT], rows[HELD_OUT:]


def reward(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """Return for each response the share of letters at the right place, halved unless all are right."""
    return [_score(text, right) for text, right in zip(completions, answer, strict=True)]


def _score(text: str, right: str) -> float:
    if text.strip().rstrip(".") == right:
        return 1.0
    found, wanted = LETTERS.findall(text.lower()), right.split("-")
    if len(found) != len(wanted):
        return 0.0
    return 0.5 * sum(a == b for a, b in zip(found, wanted, strict=True)) / len(wanted)
