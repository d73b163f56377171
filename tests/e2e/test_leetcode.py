"""The code reward on real problems: reference solutions are right, the same solutions made wrong are not.

Runs on every 50th of the 1,889 problems in ../shared/data; LEETCODE_STEP=1 runs on all of them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from or1.config import RewardConfig
from or1.core.types import Prompt, Response, Status
from or1.reward import make_scorer
from or1.reward.ground_truth import parse_ground_truth

# Right().name, not super().name: a solution that calls itself must not get its own mistake back, where two cancel.
RETURNS_NONE = """

Right = Solution

class Wrong:
    def {name}(self, *args, **kwargs):
        Right().{name}(*args, **kwargs)
        return None

Solution = Wrong
"""

OFF_BY_ONE = """

Right = Solution

class Wrong:
    def {name}(self, *args, **kwargs):
        value = Right().{name}(*args, **kwargs)
        if value is None or isinstance(value, (bool, str, list)):
            return {{bool: lambda v: not v, str: lambda v: v + "x", list: lambda v: v[1:] if v else [0]}}.get(
                type(value), lambda v: ListNode(1))(value)
        return value + 1 if isinstance(value, (int, float)) else getattr(value, "next", None)

Solution = Wrong
"""


@pytest.fixture(scope="module")
def problems(root: Path) -> list[dict]:
    path = root.parent / "shared" / "data" / "leetcode_train.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    return json.loads(path.read_text())[:: int(os.environ.get("LEETCODE_STEP", "50"))]


def statuses(problems: list[dict], suffix: str = "") -> list[Status]:
    with make_scorer(RewardConfig(kind="code", workers=2)) as scorer:
        futures = []
        for i, row in enumerate(problems):
            tests = parse_ground_truth(row["tests"])
            name = re.search(r"check\(Solution\(\)\.(\w+)\)", tests.script)[1]
            text = f"<think>no</think>\n```python\n{row['solutions']}{suffix.format(name=name)}\n```"
            response = Response(np.array([1]), np.zeros(1), "stop", 0, text)
            futures.append(scorer.submit(Prompt(str(i), "leetcode", "?", np.array([1]), tests=tests), response))
        return [future.result().status for future in futures]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_reference_solutions_are_accepted(problems: list[dict]) -> None:
    found = statuses(problems)
    rejected = {i: status.value for i, status in enumerate(found) if status is not Status.OK}
    print(f"{len(found) - len(rejected)} of {len(found)} accepted; rejected: {rejected}")
    assert len(rejected) <= 0.01 * len(found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("suffix", [RETURNS_NONE, OFF_BY_ONE], ids=["returns None", "off by one"])
def test_solutions_made_wrong_are_not(problems: list[dict], suffix: str) -> None:
    found = statuses(problems, suffix)
    print(Counter(found))
    assert [i for i, status in enumerate(found) if status is Status.OK] == []
    assert Counter(found)[Status.WRONG] >= 0.99 * len(found)
