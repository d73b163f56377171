"""The engine in or1/rollout/README.md is complete: `collect` runs with it, and partial rollouts work."""

from __future__ import annotations

import importlib.util
import re
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from or1.core.types import Prompt, Response, Score, Status
from or1.model.load import load_tokenizer
from or1.rollout.collect import collect
from or1.rollout.engine import Engine, Sampling


class LengthScorer:
    """The number of tokens as the reward."""

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        future: Future[Score] = Future()
        future.set_result(Score(float(len(response.token_ids)), Status.OK))
        return future


@pytest.fixture
def engine(root: Path, tmp_path: Path) -> Any:
    text = (root / "or1" / "rollout" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    path = tmp_path / "uniform_engine.py"
    path.write_text(block)
    spec = importlib.util.spec_from_file_location("uniform_engine", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.UniformEngine(load_tokenizer(str(root / "examples" / "tiny-adder")))


def test_the_example_has_every_member_of_the_protocol(engine: Any) -> None:
    members = {name for name in [*vars(Engine), *Engine.__annotations__] if not name.startswith("_")}
    assert {name for name in members if not hasattr(engine, name)} == set()


def test_the_example_continues_unfinished_responses(engine: Any) -> None:
    prompts = [Prompt(str(i), "made", "", np.array([5, 6], np.int32), ("0",)) for i in range(3)]
    first = collect(engine, LengthScorer(), prompts, Sampling(1.0, 5, 2, seed=1, new_tokens=3))
    assert not first.groups and len(first.open) == 3
    engine.update_weights(1)
    second = collect(engine, LengthScorer(), [], Sampling(1.0, 5, 2, seed=2, new_tokens=3), carried=first.open)
    assert [group.prompt for group in second.groups] == prompts and not second.open
    for group in second.groups:
        assert [score.reward for score in group.scores] == [5.0, 5.0]
        assert all(response.token_versions.tolist() == [0, 0, 0, 1, 1] for response in group.responses)
