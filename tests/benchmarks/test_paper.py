"""The ladder: its statistics and rule, both tiers in small, and the committed verdicts."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.paper import larger, measures, model, page, study, tabular
from benchmarks.paper.arms import ARMS, MODEL_ARMS
from benchmarks.paper.ladder import LENGTHS, level, score
from benchmarks.paper.rule import DECIDED, Question, decide
from benchmarks.paper.statistics import LOOKS, holm, interval, sign_test, spending, t_quantile
from or1.config import Config, LossConfig, RewardConfig, StageConfig
from or1.core.types import Group, Prompt, Response, Score, Status
from or1.magic.selection import minibatches, select


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (3, 0), (0, 5), (4, 4), (7, 2), (6, 3)])
def test_the_sign_test_counts_all_outcomes(won: int, lost: int) -> None:
    """Compare with the share of all sequences of signs that are at least as one-sided."""
    n = won + lost
    outcomes = [abs(2 * sum(signs) - n) for signs in itertools.product((0, 1), repeat=n)]
    share = sum(x >= abs(won - lost) for x in outcomes) / len(outcomes)
    assert sign_test(won, lost) == pytest.approx(share, abs=1e-12)


def test_holms_correction() -> None:
    # 4 x 0.005; 3 x 0.01; 2 x 0.03; and no smaller than the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_the_levels_of_the_looks_sum_to_alpha() -> None:
    levels = spending(LOOKS)
    assert sum(levels) == pytest.approx(0.05)
    assert levels == sorted(levels) and levels[0] < 0.001
    assert spending((16,)) == pytest.approx([0.05])


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 6.3138), (5, 2.0150), (15, 1.7531), (47, 1.6779)])
def test_students_quantile(freedom: int, quantile: float) -> None:
    assert t_quantile(0.95, freedom) == pytest.approx(quantile, abs=1e-4)


def test_the_interval_is_students() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert (found.mean, found.high - found.mean) == (2.0, pytest.approx(2.91999 / math.sqrt(3), abs=1e-4))
    with pytest.raises(ValueError, match="there are 1"):
        interval([1.0])


def spread(mean: float, sd: float = 0.01) -> list[float]:
    """Return 48 differences with this mean."""
    return [mean + sd * (-1) ** i for i in range(48)]


# d is 0.1; a seed is won from any difference.
@pytest.mark.parametrize(
    ("question", "verdict", "look"),
    [
        (Question("higher", spread(0.2), 0.1), "claimed direction", 16),
        (Question("lower", spread(-0.2), 0.1), "claimed direction", 16),
        (Question("higher", spread(0.05), 0.1), "claimed direction but small", 16),
        (Question("higher", spread(-0.2), 0.1), "opposite", 16),
        (Question("higher", spread(-0.05), 0.1), "equivalent", 16),
        (Question("higher", spread(0.0), 0.1), "equivalent", 0),
        (Question("higher", spread(0.0, 1.0), 0.1), "undecided", 0),
        (Question("higher", spread(0.2), 0.1, tested=False), "not tested", 16),
        (Question("same", spread(0.05), 0.1), "equivalent", 16),
        (Question("same", spread(0.2), 0.1), "opposite", 16),
        (Question("same", spread(0.0, 1.0), 0.1), "undecided", 0),
        # Won by less than the margin: ties.
        (Question("higher", spread(0.2), 0.1, margin=0.3), "undecided", 0),
        # The last seeds alone decide: 16 and 32 seeds are even.
        (Question("higher", [*spread(0.0, 0.3)[:32], *[0.5] * 16], 0.1), "claimed direction", 48),
    ],
)
def test_every_verdict_is_reached(question: Question, verdict: str, look: int) -> None:
    (found,) = decide([question], LOOKS)
    assert (found.verdict, found.look) == (verdict, look)


def test_a_family_of_statements_makes_each_stricter() -> None:
    """10 of 10 untied seeds decide alone, but not among 20 statements without an effect."""
    weak = Question("higher", [0.2] * 10 + [0.0] * 38, 0.04)
    null = Question("higher", spread(0.0), 0.04)
    assert decide([weak], LOOKS)[0].verdict == "claimed direction"
    assert decide([weak, *[null] * 20], LOOKS)[0].look == 0


def test_looks_beyond_the_seeds_are_left_out() -> None:
    (found,) = decide([Question("higher", spread(0.2)[:20], 0.1)], LOOKS)
    assert (found.look, found.seeds) == (16, 20)
    assert decide([Question("higher", [0.2] * 8, 0.1)], LOOKS)[0].look == 0


def test_rewards_of_the_ladder() -> None:
    assert [level(c) for c in (0, 9, 10, 59)] == [0, 0, 1, 5]
    assert score("07", "0") == score("2777", "1") == 1.0
    for text, needed in (("07", "1"), ("0", "0"), ("077", "0"), ("2776", "1"), ("", "0"), ("6" + "7" * 7, "0")):
        assert score(text, needed) == 0.0, text


def test_every_claim_names_arms_with_valid_settings(tmp_path: Path) -> None:
    named = {arm for tier in "AB" for claim in study.claims_of(tier) for arm in claim.arms}
    assert named == set(ARMS)
    for name, arm in ARMS.items():
        config = Config.model_validate(model.settings(arm, 1, 1e-3, tmp_path, tmp_path / "run"))
        n_sgd, d_r, d_t, reuse = map(int, name.partition(" ")[0].strip("()").split(","))
        stage = config.stage[0]
        found = (stage.updates_per_step, stage.prompts_per_step, stage.minibatch_prompts, stage.reuse)
        assert found == (n_sgd, d_r, d_t, reuse), name


def test_the_tables_optimizer_is_adamw() -> None:
    torch.manual_seed(0)
    tables = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    copies = [t.detach()[1:2].clone().requires_grad_() for t in tables]
    ours, theirs = tabular.Adam(tables, 0.1), torch.optim.AdamW(copies, lr=0.1, weight_decay=0.0)
    for active in ([True, True, False], [True, False, True], [False, True, True]):
        before = [t.detach().clone() for t in tables]
        for t, c in zip(tables, copies, strict=True):
            t.grad = 3 * torch.randn_like(t)
            c.grad = t.grad[1:2].clone()
        if active[1]:
            torch.nn.utils.clip_grad_norm_(copies, 1.0)
            theirs.step()
        ours.step(torch.tensor(active))
        for t, c, old in zip(tables, copies, before, strict=True):
            torch.testing.assert_close(t[1:2], c, rtol=1e-10, atol=1e-12)
            assert all(torch.equal(t[i], old[i]) != on for i, on in enumerate(active))


@pytest.mark.parametrize(("kept", "nominal"), [(0, 4), (1, 4), (7, 4), (9, 4), (13, 4), (16, 16)])
def test_minibatches_are_those_of_or1(kept: int, nominal: int) -> None:
    rewards = [[1.0, 0.0]] * kept + [[0.0, 0.0]] * (16 - kept)
    np.random.default_rng(0).shuffle(rewards)
    response = Response(np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", 0, "")
    groups = [
        Group(Prompt(str(i), "", "", np.full(1, i)), [response] * 2, [Score(r, Status.OK) for r in pair])
        for i, pair in enumerate(rewards)
    ]
    stage = StageConfig(steps=1, max_response_tokens=4, prompts_per_step=16, minibatch_prompts=nominal, group_size=2)
    chosen = select(groups, LossConfig(), RewardConfig(kind="math"), stage)
    wanted = [{int(s.prompt_ids[0]) for s in part.sequences} for part in minibatches(chosen, LossConfig(), stage)]
    keep_RP = np.array([[a != b for a, b in rewards]])
    arm = replace(ARMS["(1,16,16,1)"], minibatch=nominal, filled=True)
    part_P = tabular.parts(keep_RP, tabular.numbers(keep_RP, arm))[0]
    assert [set(np.flatnonzero(part_P == i)) for i in range(part_P.max() + 1)] == wanted


SHORT = replace(ARMS["(4,64,64,4)"], prompts=12, minibatch=12, rollouts=4)


def test_a_seed_of_tier_a_depends_on_no_other_seed() -> None:
    both, alone = tabular.train(SHORT, [3, 4], 0.05, points=2), tabular.train(SHORT, [4], 0.05, points=2)
    assert both[1] == alone[0] and both[0]["series"] != both[1]["series"]
    assert len(both[0]["series"]["accuracy"]) == 3 and sum(both[0]["series"]["updates"]) > 0


def test_the_exact_numbers_of_tier_a_are_those_of_samples() -> None:
    policies = tabular.Policies([5, 6])
    batch = tabular.sample(policies, [np.random.default_rng(s) for s in (1, 2)], 1500, 8)
    found = policies.exact()
    half = len(batch.rewards_GM) // 2
    for run in (0, 1):
        rewards = batch.rewards_GM[run * half : (run + 1) * half]
        assert rewards.mean() == pytest.approx(float(found["accuracy"][run]), abs=0.015)
    # Tokens of both runs: the mean of -log p estimates the entropy.
    assert float(-batch.logp_N.mean()) == pytest.approx(float(found["entropy"].mean()), abs=0.02)


def test_on_policy_training_of_tier_a_climbs() -> None:
    (record,) = tabular.train(replace(ARMS["(1,64,64,1)"], rollouts=12), [7], 0.2, points=2)
    accuracy = record["series"]["accuracy"]
    assert accuracy[-1] > accuracy[0] + 0.2
    assert record["series"]["clipped"] == [0.0, 0.0]


def test_a_bonus_raises_the_entropy_of_tier_a() -> None:
    bonus = {"control": "constant", "coef": 2.0}
    plain, raised = (
        tabular.train(replace(SHORT, entropy=e, rollouts=8), [8], 0.05, points=1)[0]["series"] for e in ({}, bonus)
    )
    assert raised["entropy"][-1] > plain["entropy"][-1]
    assert raised["bonus"] == [1.0] and plain["bonus"] == [0.0]


def test_tier_b_runs(tmp_path: Path) -> None:
    model.make_base(tmp_path / "base", steps=2)
    arm = replace(ARMS["(4,64,64,4)"], prompts=4, minibatch=4, rollouts=2)
    record = model.train(arm, 1, 1e-3, tmp_path / "base", tmp_path / "run", every=1)
    series = record["series"]
    assert {len(series[name]) for name in ("accuracy", "entropy", "top")} == {3}
    assert 0 < series["entropy"][0] < math.log(20)


def test_the_accuracy_of_tier_b_is_a_sum_of_probabilities(tmp_path: Path) -> None:
    """Compare a model with equal probabilities of all tokens: rung s has s + 3 tokens with the end of the text."""
    model.make_base(tmp_path / "base", steps=0)
    net = model.Qwen2ForCausalLM.from_pretrained(tmp_path / "base")
    torch.nn.init.zeros_(net.model.norm.weight)
    rows = model.right_responses(model.AutoTokenizer.from_pretrained(tmp_path / "base"))
    found = model.exact(net, rows)
    vocab = net.config.vocab_size
    ways = [sum(vocab ** -(LENGTHS[s] + 2.0) for s in range(k, 6)) for k in range(6)]
    assert found["accuracy"] == pytest.approx(sum(ways) / 6)
    assert found["entropy"] == pytest.approx(math.log(vocab), rel=1e-5)
    assert found["top"] == pytest.approx(1 / vocab)


def series_of(arm: str, seed: int, **series: list[float]) -> dict:
    """Return a record."""
    return {"arm": arm, "seed": seed, "series": series}


def test_manipulation_checks_pass_and_fail() -> None:
    on = series_of("(1,64,64,1)", 1, entropy=[1.0] * 11, accuracy=[0.1, *[0.9] * 10])
    many = series_of("(4,64,16,1)", 1, entropy=[1.0, *[0.1] * 10], clipped=[0.01] * 10)
    records = {(r["arm"], r["seed"]): r for r in (on, many)}
    assert measures.learns(records).passed and not measures.falls(records).passed
    assert measures.collapses(records, "(4,64,16,1)").passed
    assert not measures.collapses(records, "(1,64,64,1)").passed
    assert measures.clips(records, "(4,64,16,1)").passed
    assert "x10" in measures.ranges(records, ["(1,64,64,1)", "(4,64,16,1)"]).text
    with pytest.raises(KeyError, match="no run of arm lost"):
        measures.of_arm(records, "lost")


def test_the_bonus_is_counted_until_the_top_rung_is_decided() -> None:
    record = series_of("x", 1, top=[0.01, 0.01, 0.0005, 0.0], bonus=[0.0, 1.0, 1.0])
    assert measures.bonus_before_decision(record) == 0.5
    assert measures.bonus_before_decision(series_of("x", 1, top=[0.01] * 4, bonus=[0.0, 0.0, 1.0])) == pytest.approx(
        1 / 3
    )


def test_the_page_shows_every_statement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "plot", lambda path, claim, records: path.write_text(claim.key))
    (tmp_path / "remarks.md").write_text("## A remark\n")
    names = ("accuracy", "entropy", "top", "updates", "clipped", "alpha", "bonus")
    rng = np.random.default_rng(0)
    records = [
        series_of(arm, seed, **{name: rng.uniform(0.1, 0.9, 41).tolist() for name in names})
        | {"tier": tier, "cpu_s": 1.0}
        for tier in "AB"
        for arm in (ARMS if tier == "A" else MODEL_ARMS)
        for seed in (1, 2)
    ]
    text = " ".join(page.write_page(tmp_path, records, 2.0, 1).read_text().split())
    assert "2 seeds, rate 0.02" in text and "## A remark" in text
    found = json.loads((tmp_path / "study.json").read_text())["claims"]
    for tier in "AB":
        for claim in study.claims_of(tier):
            rows = found[claim.key]["statements"]
            assert len(rows) == len(claim.statements) and all(len(row["differences"]) == 2 for row in rows)
            assert all(f"| {row['words']}" in text and row["check"] in text for row in rows)


def committed(root: Path) -> dict:
    """Return the study whose page is committed."""
    return json.loads((root / "benchmarks" / "results" / "paper-ladder" / "study.json").read_text())


def test_the_committed_verdicts_follow_from_the_committed_differences(root: Path) -> None:
    study_json, text = committed(root), (root / "benchmarks" / "results" / "paper-ladder" / "README.md").read_text()
    claims = {claim.key: (tier, claim) for tier in "AB" for claim in study.claims_of(tier)}
    assert set(study_json["claims"]) == set(claims)
    for key, (tier, claim) in claims.items():
        rows = study_json["claims"][key]["statements"]
        assert [row["words"] for row in rows] == [s.words() for s in claim.statements]
        questions = [Question(r["expect"], r["differences"], r["least"], r["margin"], r["tested"]) for r in rows]
        seeds = len(rows[0]["differences"])
        found = decide(questions, LOOKS if tier == "A" else (seeds,))
        assert [(f.verdict, f.won, f.lost) for f in found] == [(r["verdict"], r["won"], r["lost"]) for r in rows], key
        assert all(f"**{f.verdict}**" in text for f in found)
        assert (root / "benchmarks" / "results" / "paper-ladder" / f"{key}.svg").exists()


def test_the_larger_runs_page_is_of_both_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(larger, "plot", lambda path, claim, records: path.write_text(claim.key))
    rng = np.random.default_rng(0)
    names = ("accuracy", "entropy", "top", "updates", "clipped", "alpha", "bonus")
    records = [
        series_of(arm, seed, **{name: rng.uniform(0.1, 0.9, 41).tolist() for name in names})
        | {"tier": "A", "cpu_s": 1.0}
        for arm in dict.fromkeys(arm for claim in study.CLAIMS if claim.key in larger.KEYS for arm in claim.arms)
        for seed in (1, 2)
    ]
    text = larger.write_page(tmp_path, records, 2).read_text()
    assert "at 2 seeds" in text and "## C3" in text and "## C4" in text
    assert set(json.loads((tmp_path / "larger.json").read_text())["claims"]) == set(larger.KEYS)


def test_the_larger_runs_verdicts_follow_from_its_differences(root: Path) -> None:
    found = json.loads((root / "benchmarks" / "results" / "paper-ladder" / "larger" / "larger.json").read_text())
    for claim in found["claims"].values():
        rows = claim["statements"]
        questions = [Question(r["expect"], r["differences"], r["least"], r["margin"], r["tested"]) for r in rows]
        assert [f.verdict for f in decide(questions, (found["seeds"],))] == [row["verdict"] for row in rows]


def agree(first: str, second: str) -> bool:
    """Return False if two verdicts on a statement contradict each other. A small effect is near equivalence."""
    if not {first, second} <= set(DECIDED) or first == second:
        return True
    return "claimed direction but small" in (first, second) and "opposite" not in (first, second)


def test_verdicts_that_contradict() -> None:
    assert agree("claimed direction", "claimed direction but small") and agree("equivalent", "undecided")
    assert not agree("claimed direction", "equivalent") and not agree("opposite", "claimed direction but small")


@pytest.mark.nightly
def test_other_seeds_agree_on_every_decided_statement(root: Path, tmp_path: Path) -> None:
    """Run the whole study again, from seed 3001: a quarter of an hour on two cores."""
    command = [sys.executable, "-m", "benchmarks.paper", str(tmp_path), "--first-seed", "3001", "--jobs", "2"]
    subprocess.run(command, check=True, cwd=root)
    second = json.loads((tmp_path / "study.json").read_text())
    contradictions = [
        (key, a["words"], a["verdict"], b["verdict"])
        for key, claim in committed(root)["claims"].items()
        for a, b in zip(claim["statements"], second["claims"][key]["statements"], strict=True)
        if not agree(a["verdict"], b["verdict"])
    ]
    assert contradictions == []
