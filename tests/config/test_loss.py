"""`[loss]`: presets are defaults that the resolved config shows, bounds follow the kind, contradictions are refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from or1.config import Config, LossConfig
from or1.config.load import dump_config, load_config
from or1.config.loss import MismatchConfig
from or1.config.rules import contradictions
from or1.train.stage import objective_of
from or1_kernels import PolicyObjective

STAGE = {"steps": 1, "max_response_tokens": 8, "prompts_per_step": 4, "group_size": 2}


def problems_of(stage: dict[str, Any] | None = None, **sections: dict[str, Any]) -> list[str]:
    base = {"run_dir": "r", "model": {"path": "m"}, "data": {"train": ["t"]}, "stage": [STAGE | (stage or {})]}
    found = contradictions(Config.model_validate(base | sections), files=False)
    return [f"{problem.path}: {problem.message}" for problem in found]


def test_a_preset_sets_defaults_and_given_settings_win(tmp_path: Path) -> None:
    dapo, dr_grpo, gspo = (LossConfig(preset=name) for name in ("dapo", "dr_grpo", "gspo"))
    assert (dapo.clip_low, dapo.clip_high, dapo.normaliser, dapo.refill_rounds) == (0.2, 0.28, "token", 10)
    assert (dr_grpo.normaliser, dr_grpo.advantage_std, dr_grpo.reject_zero_advantage) == ("dr_grpo", False, False)
    assert (gspo.kind, gspo.clip_low, gspo.clip_high, gspo.normaliser) == ("gspo", 3e-4, 4e-4, "sequence")
    assert LossConfig(preset="dapo", clip_high=0.2, refill_rounds=0).model_dump(exclude={"preset"}) == (
        LossConfig().model_dump(exclude={"preset"})
    )
    path = tmp_path / "c.toml"
    stage = "\n".join(f"{name} = {value}" for name, value in STAGE.items())
    path.write_text(f'run_dir = "r"\nmodel.path = "m"\ndata.train = "t"\nloss.preset = "dapo"\n[[stage]]\n{stage}\n')
    config = load_config(path, ["loss.clip_high=0.3"], files=False)
    assert (config.loss.clip_high, config.loss.refill_rounds) == (0.3, 10)
    resolved = tmp_path / "config.resolved.json"
    resolved.write_text(dump_config(config))
    assert json.loads(resolved.read_text())["loss"]["refill_rounds"] == 10
    assert load_config(resolved, files=False).loss == config.loss


@pytest.mark.parametrize(
    ("kind", "bounds"),
    [
        ("none", (None, None)),
        ("tis", (None, 2.0)),
        ("mis", (None, 2.0)),
        ("icepop", (0.5, 5.0)),
        ("sequence_tis", (None, 2.0)),
        ("sequence_mis", (None, 2.0)),
        ("geometric", (0.999, 1.001)),
    ],
)
def test_bounds_follow_the_kind(kind: str, bounds: tuple[float | None, float | None]) -> None:
    mismatch = MismatchConfig.model_validate({"kind": kind})
    assert (mismatch.lower, mismatch.upper) == bounds
    assert MismatchConfig.model_validate(mismatch.model_dump()) == mismatch, "as a resumed run reads it"
    assert not problems_of(loss={"mismatch": {"kind": kind}})


def test_rloo_divides_by_nothing() -> None:
    assert not LossConfig(advantage="rloo").advantage_std and LossConfig(advantage="reinforce_pp").advantage_std


@pytest.mark.parametrize(
    ("loss", "objective"),
    [
        ({"is_cap": 3.0}, PolicyObjective(is_cap=3.0)),
        ({"mismatch": {"kind": "tis", "upper": 3.0}}, PolicyObjective(is_cap=3.0)),
        ({"mismatch": {"kind": "mis"}}, PolicyObjective(is_cap=2.0, is_mask=True)),
        ({"mismatch": {"kind": "icepop"}}, PolicyObjective(is_cap=5.0, is_floor=0.5, is_mask=True)),
        ({"mismatch": {"kind": "geometric"}, "is_cap": 3.0}, PolicyObjective(is_cap=3.0)),
        ({"mismatch": {"kind": "sequence_mis"}, "kind": "cispo"}, PolicyObjective(kind="cispo")),
    ],
    ids=str,
)
def test_the_objective_of_a_token(loss: dict[str, Any], objective: PolicyObjective) -> None:
    assert objective_of(LossConfig.model_validate(loss)) == objective


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"loss": {"mismatch": {"upper": 2.0}}}, 'loss.mismatch.upper: 2 has no effect with kind = "none"'),
        ({"loss": {"mismatch": {"kind": "tis"}, "is_cap": 3.0}}, "second importance weight beside loss.is_cap = 3"),
        ({"loss": {"mismatch": {"kind": "mis", "lower": 0.5}}}, 'set kind = "icepop"'),
        (
            {"loss": {"mismatch": {"kind": "icepop"}, "old_logp": "rollout"}},
            'loss.mismatch.kind: "icepop" has no effect',
        ),
        ({"loss": {"mismatch": {"kind": "geometric"}}, "rollout": {"top_p": 0.9}}, "rollout.top_p: 0.9 together with"),
        (
            {"loss": {"mismatch": {"kind": "geometric"}}, "rollout": {"partial_tokens": 4}},
            "rollout.partial_tokens: 4 trains on tokens of older policies",
        ),
        ({"loss": {"advantage": "rloo", "advantage_std": True}}, "divides by nothing"),
        ({"loss": {"advantage": "reinforce_pp", "refill_rounds": 1}}, "loss.refill_rounds: 1 has no effect"),
        (
            {"loss": {"kind": "gspo"}, "dist": {"sequence_parallel": 2}, "stage": {"reuse": 2}},
            'loss.kind: "gspo" needs a whole response on one rank',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contradictions_are_named(sections: dict[str, Any], said: str) -> None:
    found = problems_of(**sections)
    assert len(found) == 1 and said in found[0], found


def test_what_is_no_contradiction() -> None:
    gspo = {"loss": {"kind": "gspo"}}
    assert not problems_of(**gspo, dist={"sequence_parallel": 2}), "on-policy the ratio of a response is 1"
    assert not problems_of({"reuse": 2}, **gspo)
    assert not problems_of(loss={"mismatch": {"kind": "icepop"}}, rollout={"partial_tokens": 4})
    assert not problems_of(loss={"mismatch": {"kind": "geometric"}, "is_cap": 2.0}, rollout={"partial_tokens": 4})


@pytest.mark.parametrize("bad", [{"lower": 1.5}, {"upper": 0.5}, {"upper": math.inf}, {"kind": "opsm"}])
def test_bounds_that_leave_out_a_ratio_of_1_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        MismatchConfig.model_validate({"kind": "icepop"} | bad)
