"""The task of the study, the ladder: early gains compete with rare, long ways that solve more.

600 prompts `c+j` with c in 0..59. The level of a prompt is c // 10, 0 to 5. A response is a rung digit s, then s + 1
content digits. The response is right if s >= level and every content digit is the right one. Rung 0 is common and
short, and solves a sixth of the prompts. Each further rung is rarer, longer and clumsier, and solves one level more.

Gains that are quick push the rare rungs down before training has found their use. So the score counts the rungs that a
policy climbed before it committed. The best policy scores 1 at entropy 0: no entropy is good or bad in itself.
"""

from __future__ import annotations

RUNGS = 6
LEVELS = 6
CLASSES = 60
VARIANTS = 10  # prompts of a class
DIGITS = 8  # a content digit is one of 0..7
RIGHT = 7
LENGTHS = tuple(s + 1 for s in range(RUNGS))  # content digits after rung s


def level(c: int) -> int:
    """Return the lowest rung that solves the prompts of class c."""
    return c * LEVELS // CLASSES


def score(solution_str: str, ground_truth: str) -> float:
    """Return the reward of a response, with verl's arguments. ground_truth: the level of the prompt."""
    text = solution_str.strip()
    if not text or text[0] not in "0123456789"[:RUNGS]:
        return 0.0
    s = int(text[0])
    return float(s >= int(ground_truth) and text[1:] == str(RIGHT) * LENGTHS[s])
