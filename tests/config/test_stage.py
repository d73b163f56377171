"""Settings of a stage: what is in effect, what the rules find, and what a resumed run may change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from or1.config import Config
from or1.config.changes import changed_keys, fixed_keys
from or1.config.load import dump_config, load_config
from or1.config.peers import known_as, nearest
from or1.config.rules import contradictions
from or1.config.stage import OVERRIDDEN, StageConfig
from or1.core.errors import ConfigError

STAGE = {"steps": 1, "max_response_tokens": 8, "prompts_per_step": 2, "group_size": 2}
BASE = {"run_dir": "r", "model": {"path": "m"}, "data": {"train": ["t.jsonl"]}, "rollout": {"engine": "hf"}}


def config_of(*stages: dict[str, Any], **sections: Any) -> Config:
    return Config.model_validate(BASE | {"stage": [STAGE | s for s in stages]} | sections)


def problems(config: Config) -> list[tuple[str, str]]:
    return [(p.path, p.message) for p in contradictions(config, files=False)]


def test_a_stage_has_the_settings_of_the_run_and_its_own() -> None:
    second = {
        "loss": {"kl_coef": 0.001, "entropy": {"control": "constant", "coef": 0.005}},
        "rollout": {"temperature": 0.6},
        "optim": {"lr": 1e-5},
    }
    config = config_of({}, second, loss={"clip_high": 0.28})
    assert config.in_stage(0) is config
    there = config.in_stage(1)
    assert (there.loss.kl_coef, there.loss.clip_high, there.loss.entropy.coef) == (0.001, 0.28, 0.005)
    assert (there.loss.entropy.target, there.rollout.temperature, there.rollout.top_p) == (0.2, 0.6, 1.0)
    assert there.optim.lr == 1e-5
    assert config.loss.kl_coef == 0
    assert config.stage[1].own_settings() == {
        "loss.kl_coef": 0.001,
        "loss.entropy.control": "constant",
        "loss.entropy.coef": 0.005,
        "rollout.temperature": 0.6,
        "optim.lr": 1e-5,
    }


def test_each_setting_of_a_stage_has_the_limits_of_the_run() -> None:
    """Compare the two places that hold the bounds: a value that one refuses, the other must refuse."""

    def limits(section: Any, path: str = "") -> dict[str, Any]:
        found = {}
        for name, field in section.model_fields.items():
            if isinstance(inner := field.annotation, type) and hasattr(inner, "model_fields"):
                found |= limits(inner, f"{path}{name}.")
            else:
                schema = section.model_json_schema()["properties"][name]
                schema = next((each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"), schema)
                keys = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "enum", "type")
                found[f"{path}{name}"] = {key: schema[key] for key in keys if key in schema}
        return found

    for name in OVERRIDDEN:
        of_run = limits(Config.model_fields[name].annotation)
        of_stage = limits(StageConfig.model_fields[name].annotation)
        assert of_stage and all(of_run[key] == value for key, value in of_stage.items()), name


@pytest.mark.parametrize(
    ("stage", "sections", "path", "words"),
    [
        (
            {"rollout": {"top_p": 0.9}},
            {"loss": {"entropy": {"control": "adaptive"}}},
            "stage.1.rollout.top_p",
            "in stage 1: 0.9 together with loss.entropy.control",
        ),
        (
            {"loss": {"entropy": {"coef": 0.5}}},
            {"loss": {"entropy": {"control": "adaptive"}}},
            "stage.1.loss.entropy.coef",
            "in stage 1: 0.5 is outside",
        ),
        ({"loss": {"is_cap": 2.0}}, {"loss": {"old_logp": "rollout"}}, "stage.1.loss.is_cap", "in stage 1:"),
        ({"rollout": {"temperature": 0.6}}, {"rollout": {"partial_tokens": 4}}, "rollout.partial_tokens", "same temp"),
    ],
)
def test_the_rules_check_what_is_in_effect(stage: dict, sections: dict, path: str, words: str) -> None:
    sections = {"rollout": {"engine": "hf"} | sections.get("rollout", {})} | {"loss": sections.get("loss", {})}
    alone = problems(config_of({}, {}, **sections))
    found = [each for each in problems(config_of({}, stage, **sections)) if each not in alone]
    assert [each for each in found if each[0] == path and words in each[1]], found


def test_a_stage_may_turn_the_bonus_of_the_run_off() -> None:
    entropy = {"control": "constant", "coef": 1e-3}
    off = {"loss": {"entropy": {"control": "none"}}}
    assert problems(config_of({}, off, loss={"entropy": entropy})) == []


def test_a_reference_needs_a_kl_term_in_some_stage() -> None:
    assert problems(config_of({}, loss={"reference": "ref"})) != []
    assert problems(config_of({}, {"loss": {"kl_coef": 1e-3}}, loss={"reference": "ref"})) == []
    assert problems(config_of({"loss": {"kl_coef": 0}}, loss={"kl_coef": 1e-3, "reference": "ref"})) != []


def test_an_unknown_key_of_a_stage_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="advantage_mask"):
        load_config(root / "examples/quickstart.toml", ["stage.0.loss.reference=x"])
    config = load_config(root / "examples/quickstart.toml", ["stage.1.loss.clip_high=0.28", "stage.1.optim.lr=1e-4"])
    again = Config.model_validate(json.loads(dump_config(config)))
    assert again.in_stage(1).loss.clip_high == 0.28


def test_only_a_stage_that_has_not_begun_may_change() -> None:
    old, new = config_of({}, {}), config_of({"optim": {"lr": 1e-5}}, {"loss": {"kl_coef": 0.001}})
    olds, news = json.loads(dump_config(old)), json.loads(dump_config(new))
    changed = changed_keys(olds, news)
    assert sorted(changed) == ["stage.0.optim.lr", "stage.1.loss.kl_coef"]
    assert fixed_keys(changed, done=0, begun=1, stages=2) == ["stage.0.optim.lr"]


def test_a_run_of_an_older_or1_had_no_settings_of_stages() -> None:
    old = json.loads(dump_config(config_of({}, {})))
    for stage in old["stage"]:
        for name in OVERRIDDEN:
            del stage[name]
    assert changed_keys(old, json.loads(dump_config(config_of({}, {})))) == []
    changed = changed_keys(old, json.loads(dump_config(config_of({"optim": {"lr": 1e-5}}, {}))))
    assert fixed_keys(changed, done=0, begun=1, stages=2) == ["stage.0.optim"]


def test_an_unknown_key_is_not_taken_for_a_setting_of_a_stage_alone() -> None:
    assert known_as(Config, "lr") == ["optim.lr"] and known_as(Config, "clip_low") == ["loss.clip_low"]
    assert nearest(Config, "temprature") == ["rollout.temperature"]
