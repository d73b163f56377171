"""Speed of the rewards: `python -m benchmarks.rewards OUT_DIR` writes rewards.json.

Scores 1,000 different answers that math-verify must parse, and 500 different programs with 10 tests each, with two
workers.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from or1.config import RewardConfig
from or1.core.types import CodeTests, Prompt, Response, Status
from or1.reward import make_scorer

ANSWERS, PROGRAMS, TESTS, WORKERS = 1000, 500, 10, 2


def seconds_for(prompt: Prompt, texts: Sequence[str], kind: str) -> float:
    """Return the seconds from the first submission to the last score. Raises ValueError for a wrong score."""
    with make_scorer(RewardConfig(kind=kind, workers=WORKERS), [prompt]) as scorer:
        began = time.perf_counter()
        futures = [scorer.submit(prompt, Response(np.array([1]), np.zeros(1), "stop", 0, text)) for text in texts]
        wrong = [i for i, future in enumerate(futures) if future.result().status is not Status.OK]
        seconds = time.perf_counter() - began
    if wrong:
        raise ValueError(f"{len(wrong)} of {len(texts)} right answers are not accepted, the first: {texts[wrong[0]]!r}")
    return seconds


def measure() -> dict[str, float]:
    """Return the sizes and seconds of both workloads."""
    answers = [f"\\boxed{{\\frac{{{i}}}{{{7 * i}}}}}" for i in range(2, ANSWERS + 2)]
    maths = Prompt("maths", "benchmark", "?", np.array([1]), (r"\frac{1}{7}",))
    inputs = tuple(f"{i} {i + 1}\n" for i in range(TESTS))
    tests = CodeTests("stdin", inputs, tuple(f"{2 * i + 1}\n" for i in range(TESTS)))
    program = "```python\na, b = map(int, input().split())\nprint(a + b)  # {}\n```"
    code = Prompt("code", "benchmark", "?", np.array([1]), tests=tests)
    return {
        "maths_answers": ANSWERS,
        "maths_s": seconds_for(maths, answers, "math"),
        "programs": PROGRAMS,
        "tests_per_program": TESTS,
        "programs_s": seconds_for(code, [program.format(i) for i in range(PROGRAMS)], "code"),
        "workers": WORKERS,
    }


def main(arguments: Sequence[str]) -> int:
    """Measure, print, write rewards.json, and return the exit code."""
    if len(arguments) != 1:
        print("usage: python -m benchmarks.rewards OUT_DIR", file=sys.stderr)
        return 2
    found = measure()
    folder = Path(arguments[0])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards.json").write_text(json.dumps(found, indent=1) + "\n")
    print(
        f"{ANSWERS:,} maths answers in {found['maths_s']:.1f} s, {PROGRAMS} programs with {TESTS} tests in "
        f"{found['programs_s']:.1f} s, {WORKERS} workers"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
