"""What an environment cannot be combined with is refused at load, with its name and a reason."""

from __future__ import annotations

from typing import Any

import pytest

from or1.config import Config
from or1.config.rules import Verb, contradictions

STAGE = {"steps": 1, "max_response_tokens": 8, "prompts_per_step": 1, "group_size": 2}
SETS = [{"name": "a", "path": "a.jsonl"}]


def problems(verb: Verb = "train", **sections: Any) -> dict[str, str]:
    raw = {"run_dir": "run", "model": {"path": "m/m"}, "environment": {"id": "sums"}, "stage": [STAGE]} | sections
    return {p.path: p.message for p in contradictions(Config.model_validate(raw), verb, files=False)}


def test_an_environment_needs_no_data() -> None:
    assert "data.train" not in problems()
    assert "data.train" in problems(environment={})


@pytest.mark.parametrize(
    ("where", "section"),
    [
        ("data.train", {"data": {"train": ["a.jsonl"]}}),
        ("data.system_prompt", {"data": {"system_prompt": "x"}}),
        ("eval.sets", {"eval": {"sets": SETS}}),
        ("reward.kind", {"reward": {"kind": "math"}}),
        ("reward.grade_truncated", {"reward": {"grade_truncated": False}}),
        ("rollout.partial_tokens", {"rollout": {"partial_tokens": 4}, "loss": {"is_cap": 2.0}}),
        ("rollout.overlap", {"rollout": {"overlap": True, "engine": "vllm"}, "loss": {"is_cap": 2.0}}),
    ],
)
def test_settings_without_a_meaning_are_refused(where: str, section: dict[str, Any]) -> None:
    assert "cannot be combined with environment.id" in problems(**section)[where]


def test_other_mistakes_of_an_environment() -> None:
    assert (
        "no effect without environment.id"
        in problems(environment={"renderer": {"name": "qwen3"}})["environment.renderer"]
    )
    twice = {"id": "sums", "args": {"taskset": {"id": "other"}}}
    assert "environment.id names the taskset" in problems(environment=twice)["environment.args"]
    assert "only `or1 train`" in problems("eval", eval={"sets": SETS})["environment.id"]
