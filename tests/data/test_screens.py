"""What a mixture leaves out by its text, and near duplicates against all pairs."""

from __future__ import annotations

import random

import numpy as np
import pytest

from or1.core.types import Prompt
from or1.data.screens import near_duplicates, normal_form, screen_reason

# Rows of MATH and AIME, shortened.
CHOICES = r"$\textbf{(A)}\ 2128 \qquad\textbf{(B)}\ 2148 \qquad\textbf{(C)}\ 2160 \qquad\textbf{(D)}\ 2200$"


def problem(text: str, gold: str = "1", **row: str) -> Prompt:
    return Prompt("a:1", "a", text, np.empty(0, np.int32), (gold,), row=row)


@pytest.mark.parametrize(
    ("text", "row", "reason"),
    [
        ("Find $y$. Graph https://www.desmos.com/calculator/wml09giaun", {}, "url"),
        ("The graph of $y=f(x)$ is shown below. [asy] draw((0,0)--(7,0)); [/asy] Find $f(1)$.", {}, "figure"),
        ("In the diagram, what is $x$?", {}, "figure"),
        ("Let $n > 1$. Prove that $n^2 > n$.", {}, "proof"),
        ("What is $x$?", {"gold": "proof"}, "proof"),
        ("What is $x$?", {"question_type": "proof"}, "proof"),
        ("What is $x$?", {"question_type": "MCQ"}, "choice"),
        (f"How many triangles have all their vertices at points $(i,j)$? {CHOICES}", {}, "choice"),
        ("Which may be the first term? Type the letter.\nA. $-1$\nB. $-2$\nC. $-3$\nD. $-4$", {}, "choice"),
        ("Let $A$, $B$, $C$ and $D$ be points. (A) and (B) hold. A graph has 5 edges. Find $a+b$.", {}, None),
        ("Nils wants to prove himself. In how many ways can he show 5 cards?", {}, None),
        ("Natalia sold 48 clips. How many clips did Natalia sell altogether?", {}, None),
    ],
)
def test_screens(text: str, row: dict[str, str], reason: str | None) -> None:
    prompt = problem(text, **row)
    assert screen_reason(prompt) == reason
    assert reason is None or screen_reason(prompt, (reason,)) is None


def test_an_allowed_reason_does_not_hide_another() -> None:
    both = problem("Prove that the figure below is a square.")
    assert screen_reason(both) == "figure" and screen_reason(both, ("figure",)) == "proof"


def test_the_normal_form_keeps_what_a_problem_depends_on() -> None:
    assert normal_form("Find  $X+1$.\n") == normal_form("find $x + 1$ .")
    assert normal_form("\uff13 + 4") == normal_form("3+4") != normal_form("3-4")


@pytest.mark.parametrize("threshold", [0.3, 0.55, 0.8, 1.0])
def test_near_duplicates_are_those_of_all_pairs(threshold: float) -> None:
    rng = random.Random(0)
    base = [[rng.choice("abcdefgh") for _ in range(rng.randint(1, 20))] for _ in range(12)]
    texts = []
    for _ in range(150):
        words = list(rng.choice(base))
        for _ in range(rng.randint(0, 3)):
            words[rng.randrange(len(words))] = rng.choice("abcdefgh")
        texts.append(" ".join(words))

    def shingles(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[i : i + 3]) for i in range(max(len(words) - 2, 1))}

    def near(one: str, other: str) -> bool:
        a, b = shingles(one), shingles(other)
        return len(a & b) >= threshold * len(a | b) - 1e-9

    expected = [next((j for j in range(i) if near(texts[j], texts[i])), None) for i in range(len(texts))]
    assert near_duplicates(texts, threshold) == expected
    assert 10 < sum(at is not None for at in expected) <= 150
