"""Numbers that are estimated from sampled tokens, and settings under which such an estimate would say something else."""

from __future__ import annotations

import pytest

from or1.config import Config
from or1.config.rules import contradictions

STAGE = {"steps": 1, "max_response_tokens": 8, "prompts_per_step": 4, "group_size": 2}
NUCLEUS, LIKELIEST = {"top_p": 0.9}, {"top_k": 20}


def problems_of(rollout: dict, **loss: object) -> dict[str, str]:
    config = Config.model_validate({"run_dir": "r", "model": {"path": "o/m"}, "data": {"train": ["t"]},
                                    "stage": [STAGE], "rollout": rollout, "loss": loss})  # fmt: skip
    return dict(contradictions(config, files=False))


@pytest.mark.parametrize("engine", ["auto", "vllm"])
@pytest.mark.parametrize("truncated", [NUCLEUS, LIKELIEST])
def test_old_log_probs_of_the_engine_need_the_whole_distribution(engine: str, truncated: dict) -> None:
    (where,) = (f"rollout.{name}" for name in truncated)
    said = problems_of(truncated | {"engine": engine}, old_logp="rollout")
    assert list(said) == [where] and "every ratio would be multiplied" in said[where]
    assert not problems_of(truncated | {"engine": "hf"}, old_logp="rollout"), "it reports those among all tokens"
    assert not problems_of(truncated | {"engine": engine}) and not problems_of({"engine": engine}, old_logp="rollout")


@pytest.mark.parametrize("engine", ["hf", "vllm"])
@pytest.mark.parametrize("truncated", [NUCLEUS, LIKELIEST])
def test_adaptive_control_needs_tokens_of_the_whole_distribution(engine: str, truncated: dict) -> None:
    (where,) = (f"rollout.{name}" for name in truncated)
    said = problems_of(truncated | {"engine": engine}, entropy={"control": "adaptive"})
    assert list(said) == [where] and "target would not be held" in said[where]
    assert not problems_of(truncated | {"engine": engine}, entropy={"control": "constant", "coef": 1e-3})
    assert not problems_of({"engine": engine}, entropy={"control": "adaptive"})
