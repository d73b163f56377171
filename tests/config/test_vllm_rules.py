"""Settings of vLLM that are refused when a config is loaded, with the reason and the remedy."""

from __future__ import annotations

from typing import Any

import pytest

from or1.config import Config
from or1.config.changes import changed_keys, fixed_keys
from or1.config.vllm_rules import OWNED, VLLM_RULES
from or1.rollout.vllm.process import server_arguments
from or1.rollout.vllm.setup import VllmSetup


def config_of(vllm: dict[str, Any], **sections: Any) -> Config:
    stage = {"steps": 1, "max_response_tokens": 8, "prompts_per_step": 2, "group_size": 2}
    sections["rollout"] = {"engine": "vllm", "vllm": vllm} | sections.get("rollout", {})
    return Config.model_validate(
        {"run_dir": "r", "model": {"path": "m"}, "data": {"train": ["t"]}, "stage": [stage]} | sections
    )


def problems(vllm: dict[str, Any], **sections: Any) -> list[str]:
    config = config_of(vllm, **sections)
    return [f"{each.path}: {each.message}" for rule in VLLM_RULES for each in rule(config)]


@pytest.mark.parametrize("name", sorted(OWNED))
def test_an_argument_that_or1_sets_is_refused_by_its_name(name: str) -> None:
    (problem,) = problems({"engine": {name: 1, "max_num_batched_tokens": 4096}})
    assert problem == f"rollout.vllm.engine.{name}: is set by or1; {OWNED[name]}"


def test_every_argument_that_or1_passes_is_owned_or_a_default_for_the_cpu() -> None:
    setup = VllmSetup.of(config_of({"speculative": {"method": "ngram"}, "quantization": "fp8"}), True, None)
    assert set(setup.engine_options()) <= OWNED.keys()
    on_cpu = VllmSetup.of(config_of({}), False, None).engine_options()
    own_there = {"enable_chunked_prefill", "max_num_batched_tokens", "enforce_eager", "block_size"}
    assert set(on_cpu) - OWNED.keys() == own_there


@pytest.mark.parametrize(
    ("vllm", "sections", "told"),
    [
        ({"quantization": "fp8"}, {}, "needs importance weights; set loss.is_cap"),
        ({"kv_cache_dtype": "fp8"}, {}, "needs importance weights; set loss.is_cap"),
        (
            {"quantization": "fp8"},
            {"model": {"path": "m", "dtype": "float32"}, "loss": {"is_cap": 2.0}},
            "quantizes 16-bit weights",
        ),
        ({"speculative": {"method": "draft"}}, {}, "missing; name the folder of a small model"),
        ({"speculative": {"method": "mtp", "model": "small"}}, {}, 'set method = "draft"'),
        ({"speculative": {"method": "ngram", "ngram_min": 5}}, {}, "5 is above ngram_max = 4"),
        ({"speculative": {"method": "suffix"}}, {}, "set rollout.reproducible = false"),
    ],
)
def test_a_contradiction_is_told_with_its_remedy(vllm: dict[str, Any], sections: dict[str, Any], told: str) -> None:
    (problem,) = problems(vllm, **sections)
    assert told in problem


@pytest.mark.parametrize(
    ("vllm", "sections"),
    [
        ({"quantization": "fp8", "kv_cache_dtype": "fp8"}, {"loss": {"is_cap": 2.0}}),
        ({"speculative": {"method": "suffix"}}, {"rollout": {"reproducible": False}}),
        ({"speculative": {"method": "draft", "model": "small"}, "engine": {"performance_mode": "throughput"}}, {}),
    ],
)
def test_what_can_be_had_is_accepted(vllm: dict[str, Any], sections: dict[str, Any]) -> None:
    sections["rollout"] = {"engine": "vllm", "vllm": vllm} | sections.get("rollout", {})
    assert problems(vllm, **sections) == []


def test_a_draft_model_keeps_its_weights_while_the_engine_sleeps() -> None:
    small = {"method": "draft", "model": "small"}
    levels = [VllmSetup.of(config_of({"speculative": s}), True, None).sleep_level for s in ({}, small)]
    assert levels == [2, 1]


def test_a_server_gets_tables_lists_and_switches_as_words() -> None:
    extra = {"enforce_eager": True, "enable_prefix_caching": False, "cudagraph_capture_sizes": [1, 2]}
    config = config_of({"speculative": {"method": "ngram", "tokens": 2}, "engine": extra})
    words = server_arguments(VllmSetup.of(config, True, None), "127.0.0.1", 8000)
    assert {"--enforce-eager", "--no-enable-prefix-caching"} <= set(words)
    at = words.index("--cudagraph-capture-sizes")
    assert words[at + 1 : at + 3] == ["1", "2"]
    drafts = words[words.index("--speculative-config") + 1]
    assert drafts == '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 2, "prompt_lookup_max": 4}'
    # vLLM counts accepted tokens only with its statistics on, and has no --no-disable-log-stats.
    assert not any("disable-log-stats" in word for word in words)
    plain = server_arguments(VllmSetup.of(config_of({}), True, None), "127.0.0.1", 8000)
    assert "--disable-log-stats" in plain and "--speculative-config" not in plain


def test_a_run_of_an_older_or1_resumes_with_the_new_settings_at_their_defaults() -> None:
    new = config_of({}).model_dump(mode="json")
    old = config_of({}).model_dump(mode="json")
    for name in ("speculative", "engine", "quantization", "kv_cache_dtype"):
        del old["rollout"]["vllm"][name]
    assert [key for key in changed_keys(old, new) if "quantization" not in key] == []
    assert fixed_keys(changed_keys(old, new), 0, 1, 1) == []
