"""The benches of all groups, made in the child."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from or1.tune.attention_bench import AttentionBench
from or1.tune.case import Case
from or1.tune.child import Bench
from or1.tune.head_bench import HeadBench
from or1.tune.mlp_bench import MlpBench


def benches(given: Mapping[str, Any]) -> dict[str, Bench]:
    """Return the bench of every group for the JSON form of a case."""
    values = dict(given)
    index = values.pop("index", 0)
    case = Case(**values)
    if case.device == "cuda":
        torch.cuda.set_device(index)
    head = HeadBench(case)
    made: dict[str, Bench] = {"head": head, "chunk": head}
    if case.intermediate:
        made["mlp"] = MlpBench(case)
    if case.heads:
        made["attention"] = AttentionBench(case)
    if case.device == "cpu":
        made |= {"gemms": head, "threads": Together([*made.values()])}
    return made


class Together:
    """Several benches as one: the sum of their seconds and the largest of their errors."""

    def __init__(self, parts: list[Bench]):
        # Groups may share a bench.
        self._parts = list(dict.fromkeys(parts))

    def prepare(self) -> None:
        """Make the inputs and exact results of the parts."""
        for part in self._parts:
            part.prepare()

    def check(self, options: Mapping[str, Any]) -> float:
        """Return the largest error of the parts."""
        return max(part.check(options) for part in self._parts)

    def seconds(self, options: Mapping[str, Any]) -> float:
        """Return the sum of the seconds of the parts."""
        return sum(part.seconds(options) for part in self._parts)
