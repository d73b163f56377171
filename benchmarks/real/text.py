"""Text for real inputs: rows of a JSONL file or the repository's own pages, and addition questions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.lib.paths import ROOT

_NUMBER = re.compile(r"-?\d[\d,]*")


class Question(NamedTuple):
    """A question and the number that answers it."""

    text: str
    answer: str


def pages(files: Sequence[Path] = ()) -> tuple[list[str], str]:
    """Return documents, and one line that names them with their hash.

    files  JSONL with "question" and "answer", as GSM8K has, a document a row; any other file is one document. None
           given: README.md, docs/ and kernels/README.md of this repository, which every machine has
    """
    chosen = list(files) or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "kernels" / "README.md"]
    documents: list[str] = []
    digest = hashlib.sha256()
    for path in chosen:
        text = path.read_text(encoding="utf-8")
        digest.update(text.encode())
        if path.suffix == ".jsonl":
            documents += [f"{q.text}\n{whole}" for q, whole in _rows(text)]
        else:
            documents.append(text)
    what = ", ".join(path.name for path in files) if files else "the repository's own pages"
    return documents, f"{what} (SHA-256 {digest.hexdigest()[:12]})"


def questions(path: Path) -> list[Question]:
    """Return the questions of a JSONL file with "question" and "answer"; the last number of the answer counts."""
    return [q for q, _ in _rows(path.read_text(encoding="utf-8"))]


def additions(count: int, seed: int = 0) -> list[Question]:
    """Return questions for the sum of two numbers of two digits."""
    pairs = np.random.default_rng(seed).integers(10, 100, (count, 2))
    return [Question(f"What is {a} + {b}? Reply with the number only.", str(a + b)) for a, b in pairs]


def is_right(response: str, answer: str) -> bool:
    """Return True if the last number of a response is the answer."""
    return last_number(response) == answer


def last_number(text: str) -> str:
    """Return the last number in a text without thousands separators, "" if there is none."""
    found = _NUMBER.findall(text)
    return found[-1].replace(",", "") if found else ""


def _rows(text: str) -> list[tuple[Question, str]]:
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [(Question(row["question"], last_number(row["answer"])), row["answer"]) for row in rows]
