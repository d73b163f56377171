"""Metrics by source, and the reward of complete responses, against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from or1.core.metric_names import metric
from or1.core.types import Group, Prompt
from or1.train.source_metrics import MOST_SOURCES, OTHERS, Sources, complete_reward
from tests.helpers.hand_run import EOS, ONE, ZERO, group, response


def of(source: str, *rewards: float, finish: str = "stop", entropy: float = 1.0) -> Group:
    """Return responses of 1, 2, ... tokens; the last one has the finish reason."""
    responses = [response(*[ZERO] * n, ONE if n else EOS, entropy=entropy) for n in range(len(rewards))]
    responses[-1] = replace(responses[-1], finish=finish)
    made = group(rewards, responses)
    return replace(made, prompt=replace(made.prompt, source=source))


def prompts(*sources: str) -> list[Prompt]:
    return [Prompt("p", source, "", np.array([5], np.int32)) for source in sources]


def test_each_source_has_its_own_numbers_and_every_name_is_registered() -> None:
    found = Sources(prompts("maths", "data/code.jsonl")).metrics(
        [of("maths", 1, 0, finish="length"), of("maths", 1, 1), of("data/code.jsonl", 0, float("nan"), entropy=0.25)]
    )
    assert found == {
        "source/maths/reward": 0.75,
        "source/maths/entropy": 1.0,
        "source/maths/len_mean": 1.5,
        "source/maths/truncated": 0.25,
        "source/data_code.jsonl/reward": 0.0,
        "source/data_code.jsonl/entropy": 0.25,
        "source/data_code.jsonl/len_mean": 1.5,
        "source/data_code.jsonl/truncated": 0.0,
    }
    assert {metric(name).name.split("/")[1] for name in found} == {"NAME"}


def test_one_source_has_no_metrics_of_its_own() -> None:
    assert Sources(prompts("maths", "maths")).metrics([of("maths", 1, 0)]) == {}


def test_the_number_of_sources_is_bounded_and_the_rest_is_counted_together() -> None:
    many = [f"s{i:03}" for i in range(MOST_SOURCES + 5)]
    sources = Sources(prompts(*many, *many[:MOST_SOURCES]))
    found = sources.metrics([of(name, float(name >= f"s{MOST_SOURCES:03}")) for name in many])
    names = {name.split("/")[1] for name in found}
    assert names == {*many[:MOST_SOURCES], OTHERS}
    assert found[f"source/{OTHERS}/reward"] == 1.0 and found["source/s000/reward"] == 0.0


@pytest.mark.parametrize(("rewards", "finish", "expected"), [((1, 0), "length", 1.0), ((1, 0), "stop", 0.5)])
def test_cut_responses_do_not_count_in_the_reward_of_complete_ones(
    rewards: tuple[float, ...], finish: str, expected: float
) -> None:
    assert complete_reward([of("a", *rewards, finish=finish)]) == {"reward/mean_complete": expected}
    assert complete_reward([of("a", 1.0, finish="deadline")]) == {}
