"""Screens of a data mixture: problems that no answer decides, and problems that repeat another one.

Two problems are equal if they have the same words and symbols, in Unicode's compatibility form and lower case. They are
near if the sets of three consecutive words or symbols have a Jaccard similarity of at least `threshold`. All pairs are
found: a set has a similar partner only if the two share one of their rarest members (prefix filter; Bayardo, Ma and
Srikant, "Scaling up all pairs similarity search", 2007).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

from or1.core.types import Prompt

_TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_")
_SHINGLE = 3
_URL = re.compile(r"https?://|\bwww\.[a-z]", re.IGNORECASE)
_FIGURE = re.compile(
    r"\[asy\]|\\includegraphics|\\begin\{(?:tikzpicture|asy|figure)\}|!\[[^\]]*\]\(|<img\b"
    r"|\b(?:figure|diagram|picture|graph)s? (?:is |are )?(?:shown |given |drawn )?(?:below|above)\b"
    r"|\b(?:shown|pictured|depicted) (?:below|above)\b"
    r"|\b(?:in|from) the (?:accompanying |following )?(?:figure|diagram|picture)\b",
    re.IGNORECASE,
)
_PROOF = re.compile(r"(?:^|[.?!:;,]\s+|\n|\band )(?:prove|show|demonstrate) that\b|^\s*prove\b", re.IGNORECASE)
_NO_ANSWERS = frozenset({"proof", "notfound", "not found"})
_CHOICES = tuple(
    re.compile(r".{1,300}?".join(form.replace("A", letter) for letter in "ABCD"), re.DOTALL)
    for form in (r"\(A\)", r"(?:^|[\s{])A\s?[.):]\s")
)


def screen_reason(prompt: Prompt, allow: Collection[str] = ()) -> str | None:
    """Return why a maths problem cannot be solved from its text or graded by its answer, None if it can.

    "url", "figure": it needs a web page or a picture. "proof": it asks for a proof. "choice": it lists its answers.

    allow  reasons that do not count
    """
    text = prompt.text
    # Columns of NuminaMath-1.5.
    kinds = {str(prompt.row.get(name)).lower() for name in ("question_type", "problem_type")}
    unanswered = _NO_ANSWERS.issuperset(gold.lower() for gold in prompt.golds)
    found = {
        "url": bool(_URL.search(text)),
        "figure": bool(_FIGURE.search(text)),
        "proof": "proof" in kinds or unanswered or bool(_PROOF.search(text)),
        "choice": "mcq" in kinds or any(form.search(text) for form in _CHOICES),
    }
    return next((reason for reason, holds in found.items() if holds and reason not in allow), None)


def normal_form(text: str) -> str:
    """Return the words and symbols of a text, which decide whether two texts are equal."""
    return " ".join(_TOKEN.findall(unicodedata.normalize("NFKC", text).lower()))


def near_duplicates(texts: Sequence[str], threshold: float) -> list[int | None]:
    """Return for each text the index of the first earlier text that is near, None if there is none.

    texts      in normal form
    threshold  smallest Jaccard similarity of near texts, above 0 and at most 1
    """
    sets = [_shingles(text) for text in texts]
    spread = Counter(shingle for each in sets for shingle in each)
    postings: defaultdict[str, list[int]] = defaultdict(list)
    found: list[int | None] = []
    for i, own in enumerate(sets):
        # The rarest members first; the text breaks ties, so that the order is the same in every process.
        ranked = sorted(own, key=lambda shingle: (spread[shingle], shingle))
        prefix = ranked[: len(own) - math.ceil(threshold * len(own) - 1e-9) + 1]
        candidates = {j for shingle in prefix for j in postings[shingle]}
        found.append(next((j for j in sorted(candidates) if _jaccard(own, sets[j]) >= threshold), None))
        for shingle in prefix:
            postings[shingle].append(i)
    return found


def _shingles(text: str) -> frozenset[str]:
    tokens = text.split()
    last = max(len(tokens) - _SHINGLE, 0)
    return frozenset(" ".join(tokens[at : at + _SHINGLE]) for at in range(last + 1))


def _jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
