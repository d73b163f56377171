"""The places where the Skywork-OR1 report and its released code disagree, by number, with numbers computed by hand.

Conflict N is test_conflict_N_*; each shows the paper's setting and, where both are offered, the released code's, on the
code that a training step runs. docs/magic.md has the same numbers.

     1  entropy step and bounds                 8  schedules of the 7B and 32B models
     2  when the entropy bonus is gated         9  reuse, clip-higher, advantage masks, KL
     3  over which tokens e_k is measured      10  solved prompts are dropped between stages
     4  what the loss is divided by            11  the report's average gains: no setting
     5  what rejection does to the step size   12  GPUs of its baseline: no setting
     6  what a truncated response is worth     13  numbering of its ablations: no setting
     7  temperature of evaluations

Of 11 to 13 there is nothing to test, since they are about the report's text. 11: the abstract's averages are not those
of its Table 13, so scores are quoted per benchmark. 12: one baseline is given 32 GPUs and 64, which cannot be
resolved; examples/recipes/README.md plans for the 32 of Table 8. 13: captions and headings count the ablations
differently; or1 names them by their headings.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from or1.config import Config, EntropyConfig, RewardConfig
from or1.config.load import load_config
from or1.core.types import Group, Score, Status
from or1.eval.accuracy import evaluate_set
from or1.magic.advantage import group_advantages
from or1.magic.entropy import EntropyController
from or1.reward import make_scorer
from or1.reward.math import screen
from or1.train.metrics import rollout_metrics
from tests.helpers.hand_run import (
    ENTROPY,
    EOS,
    ONE,
    ZERO,
    Unsolved,
    config_of,
    entropies_on_two_ranks,
    group,
    learn,
    response,
    save_policy,
    trainer_of,
    uneven_groups,
)
from tests.helpers.ranks import run_ranks

# Advantage of the right one of two responses: (1 - 1/2) / sqrt(1/2), but for the 1e-6 under the fraction.
A = math.sqrt(0.5)
ALONE = [{"prompts_per_step": 1}]


def close(value: float) -> object:
    return pytest.approx(value, rel=1e-5, abs=1e-9)


def uneven_pair() -> Group:
    """Return a right response of one token and a wrong one of three; its token losses are -A and three times A."""
    return group([1, 0], [response(ZERO), response(ZERO, ONE, EOS)])


@pytest.mark.parametrize(
    ("variant", "after_3", "after_80", "above"), [("script", 3e-4, 5e-3, 0.0), ("paper", 0.015, 0.4, 0.0)]
)
def test_conflict_1_entropy_step_and_bounds(variant: str, after_3: float, after_80: float, above: float) -> None:
    """Code: steps of 1e-4 within [0, 5e-3]. Paper: 5e-3, no bounds named (or1: [0, 1])."""
    settings = EntropyConfig(control="adaptive", variant=variant)
    low, high = EntropyController.start(settings), EntropyController.start(settings)
    coefs = []
    for _ in range(80):
        low.update(0.1)
        high.update(0.9)
        coefs.append(low.coef)
    assert (coefs[2], coefs[-1], high.coef) == (pytest.approx(after_3), pytest.approx(after_80), above)


def test_conflict_1_the_reports_own_controller_for_math_7b_is_a_recipe(root: Path) -> None:
    """Fig. 10: steps of 0.005, no script for that model. All else is as in the recipe with the scripts' controller."""
    script, paper = (
        load_config(root / "examples" / "recipes" / f"or1-math-7b{name}.toml", files=False).model_dump()
        for name in ("", "-paper")
    )
    entropy = paper["loss"].pop("entropy")
    assert (entropy["variant"], entropy["delta"], entropy["target"]) == ("paper", 5e-3, 0.2)
    assert script["loss"].pop("entropy")["variant"] == "script" and script.pop("run_dir") != paper.pop("run_dir")
    assert script == paper


def test_conflict_1_the_papers_coefficient_may_be_let_below_zero() -> None:
    """Eq. 3.2 to the letter: three steps above the target leave c = -0.015, a penalty once entropy is low."""
    c = EntropyController.start(EntropyConfig(control="adaptive", variant="paper", coef_min=-1.0))
    for _ in range(3):
        c.update(0.9)
    assert c.alpha(0.9) == 0.0 and c.alpha(0.1) == pytest.approx(-0.015)


@pytest.mark.parametrize(
    ("variant", "alphas"), [("paper", [0.004, 0.0, 0.004, 0.005]), ("script", [0.004, 0.005, 0.0, 0.005])]
)
def test_conflict_2_gating_time(variant: str, alphas: list[float], tmp_path: Path) -> None:
    """e_k is 0.125, 0.5, 0.125 and, on target, 0.25. Paper: the gate is that of e_k. Code: that of e_{k-1}."""
    entropy = {"control": "adaptive", "variant": variant, "target": 0.25, "delta": 0.001, "coef": 0.004}
    trainer = trainer_of(config_of(tmp_path, ALONE, loss={"entropy": entropy}))
    steps = [
        learn(trainer, group([1, 0], [response(ZERO, EOS, entropy=e)] * 2), step=k)
        for k, e in enumerate((0.125, 0.5, 0.125, 0.25), 1)
    ]
    assert [s["policy/entropy_coef"] for s in steps] == pytest.approx(alphas)
    # The policy gradient of equally long responses is 0 at the start, so the loss is the bonus alone.
    assert [s["optim/loss"] for s in steps] == pytest.approx([-alpha * ENTROPY for alpha in alphas])
    # On target the paper's c stays, the code's falls, and its gate shuts.
    c = trainer.state.entropy
    assert (c.coef, c.alpha(0.1)) == (pytest.approx(0.005),) * 2 if variant == "paper" else (pytest.approx(0.004), 0.0)


@pytest.mark.slow
def test_conflict_3_entropy_is_measured_over_the_kept_tokens_of_all_ranks(tmp_path: Path) -> None:
    """2 kept tokens of 0.125 nats on one rank, 6 of 0.5 nats on the other: e_k = (2/8 + 6/2) / 8."""
    expected, rank_0, mean_of_ranks, with_rejected = 3.25 / 8, 0.125, (0.125 + 0.5) / 2, (3.25 + 8) / 10
    alone = learn(trainer_of(config_of(tmp_path)), *uneven_groups())
    assert alone["policy/entropy"] == expected == 0.40625
    ranks = run_ranks(entropies_on_two_ranks, 2)
    for found in ranks:
        assert found["trainer"] == found["magic"] == expected
    # What the released code reads, and the other ways to get it wrong.
    assert ranks[0]["alone"] == rank_0
    assert len({expected, rank_0, mean_of_ranks, with_rejected}) == 4


@pytest.mark.parametrize("row_tokens", [5, 100])
def test_conflict_4_the_loss_is_divided_by_the_tokens_of_the_update(row_tokens: int, tmp_path: Path) -> None:
    """Paper: (-A + 3 A) / 4. Code, with a response a micro-batch: (-A + A) / 2 = 0; or1 has that as "sequence"."""
    optim = {"max_tokens_per_rank": row_tokens}
    trainer = trainer_of(config_of(tmp_path, ALONE, optim=optim))
    assert learn(trainer, uneven_pair())["optim/loss"] == close(A / 2)
    trainer = trainer_of(config_of(tmp_path, ALONE, optim=optim, loss={"normaliser": "sequence"}))
    assert learn(trainer, uneven_pair())["optim/loss"] == close(0.0)


def test_conflict_5_rejection_and_the_step_size(tmp_path: Path) -> None:
    """One of two groups is rejected. Paper: divide by the kept tokens. Code: the step has the kept half of its size."""
    failed = group([0, 0], [response(ZERO, ZERO, ZERO, ZERO)] * 2)
    settings = {"kept": {}, "sampled": {"denominator": "sampled"}, "all": {"reject_zero_advantage": False}}
    found = {
        name: learn(trainer_of(config_of(tmp_path, loss=loss)), uneven_pair(), failed)
        for name, loss in settings.items()
    }
    assert found["kept"]["group/kept"] == found["sampled"]["group/kept"] == 1 and found["all"]["group/kept"] == 2
    assert found["kept"]["optim/loss"] == close(A / 2)
    assert found["sampled"]["optim/loss"] == close(A / 4)
    assert found["sampled"]["optim/grad_norm"] == close(found["kept"]["optim/grad_norm"] / 2)
    # Without rejection the 8 tokens of the failed group are in the denominator: 2 A / 12.
    assert found["all"]["optim/loss"] == close(A / 6)


CUT = r"<think>maybe \boxed{0}, but"


@pytest.mark.parametrize(
    ("settings", "score"),
    [
        ({}, Score(0.0, Status.TRUNCATED)),
        ({"grade_truncated": False, "require_think_close": True}, Score(0.0, Status.TRUNCATED)),
        ({"grade_truncated": True, "require_think_close": True}, Score(0.0, Status.TRUNCATED)),
        ({"grade_truncated": True}, Score(1.0, Status.OK)),
    ],
)
def test_conflict_6_reward_of_a_truncated_response(settings: dict, score: Score, tmp_path: Path) -> None:
    """Paper: 0. Code: the whole text is graded, and a box within the thoughts can score 1 (grade_truncated)."""
    whole, wrong = r"</think>\boxed{0}", r"</think>\boxed{1}"
    responses = [
        response(ZERO, text=whole),
        response(ZERO, text=wrong),
        response(ZERO, text=wrong),
        response(ZERO, finish="length", text=CUT),
    ]
    prompt = group([], []).prompt
    with make_scorer(RewardConfig(workers=1, **settings), [prompt]) as scorer:
        scores = tuple(scorer.submit(prompt, r).result(60) for r in responses)
    assert scores == (Score(1.0, Status.OK), Score(0.0, Status.WRONG), Score(0.0, Status.WRONG), score)
    rollout = Group(prompt, tuple(responses), scores)
    metrics = rollout_metrics([rollout])
    # It was cut either way; its status says what came of it: one of four is truncated, or two of four are right.
    assert metrics["completion/truncated"] == 0.25
    assert metrics[f"reward/status/{score.status}"] == (0.5 if score.reward else 0.25)
    # (0 - 1/4) / sqrt(1/4), or paid, (1 - 1/2) / sqrt(1/3).
    cut = group_advantages(rollout.rewards[None])[0, 3]
    assert cut == close(math.sqrt(3) / 2 if score.reward else -0.5)
    trainer = trainer_of(config_of(tmp_path, ALONE))
    learn(trainer, rollout)
    assert trainer.state.totals["graded_truncated"] == score.reward


# One text of each kind in which the graders differ, with or1's reward and the released one.
ANSWERS = [
    ("x</think> The answer is 42.", 0.0, 1.0),  # no box
    (r"x</think> \boxed{41}, no, \boxed{42}", 1.0, 0.0),  # two different ones: the last decides
    (r"x</think> \boxed{42} </think> or rather \boxed{41}", 0.0, 1.0),  # after the last </think>, or before it
    (r"x</think> \boxed{42}", 1.0, 1.0),
]


@pytest.mark.parametrize(("text", "ours", "released"), ANSWERS)
def test_which_answer_of_a_text_is_graded(text: str, ours: float, released: float, root: Path) -> None:
    """Code: `parse` of what stands between the first and the second </think>, box or not; docs/magic.md has both."""
    from math_verify import parse, verify

    assert screen(text, ["42"]).reward == ours
    found = parse(text.split("</think>")[1], parsing_timeout=None)
    gold = parse(r"\boxed{42}", parsing_timeout=None)
    assert float(len(found) >= 2 and verify(gold, found, timeout_seconds=None)) == released
    (row,) = [
        line for line in (root / "docs" / "magic.md").read_text().splitlines() if "| which answer is graded |" in line
    ]
    assert r"last `\boxed{}` after the last `</think>`" in row


@pytest.mark.parametrize("recipe", ["or1-math-7b", "or1-7b", "or1-32b", "eval-aime", "eval-livecodebench"])
def test_conflict_7_evaluations_are_at_both_temperatures(recipe: str, root: Path) -> None:
    """Paper: 1.0. Code: 0.6 for the 7B models. Every benchmark of a recipe is sampled at both."""
    config = load_config(
        root / "examples" / "recipes" / f"{recipe}.toml",
        verb="eval" if recipe.startswith("eval") else "train",
        files=False,
    )
    temperatures: dict[str, set[float]] = {}
    for each in config.eval.sets:
        temperatures.setdefault(each.path, set()).add(each.temperature)
        assert each.top_p == 1.0
    assert temperatures and all(found == {1.0, 0.6} for found in temperatures.values())


@pytest.mark.parametrize(("temperature", "p"), [(1.0, 0.5), (0.6, 1 / (1 + 2 * 0.5 ** (5 / 3)))])
def test_conflict_7_temperature_reaches_the_samples(temperature: float, p: float, root: Path, tmp_path: Path) -> None:
    """Odds of 2 : 1 : 1 become 2^(5/3) : 1 : 1 at 0.6, so the likeliest token has 0.6135 instead of 1/2."""
    recipe = load_config(root / "examples" / "recipes" / "or1-7b.toml", files=False)
    settings = next(s for s in recipe.eval.sets if s.temperature == temperature)
    trainer, scorer = trainer_of(config_of(tmp_path)), Unsolved()
    evaluate_set(trainer.engine, scorer, trainer.parts.data.prompts, settings, 4)
    assert len(scorer.seen) == 3 * settings.samples
    (found,) = {float(x) for r in scorer.seen for token, x in zip(r.token_ids, r.logp, strict=True) if token == ZERO}
    assert found == pytest.approx(math.log(p), rel=1e-6)


# Recipe, step: response limit, prompts a step, prompts an update, group size. Tables 10 to 12 of the report.
SCHEDULE = [
    ("or1-7b", 660, (16_384, 256, 256, 16)),
    ("or1-7b", 661, (32_768, 160, 160, 32)),
    ("or1-32b", 760, (16_384, 256, 256, 16)),
    ("or1-32b", 761, (24_576, 160, 160, 32)),
    ("or1-math-7b", 740, (8_192, 256, 128, 16)),
    ("or1-math-7b", 741, (16_384, 256, 128, 16)),
    ("or1-math-7b", 1741, (32_768, 256, 128, 16)),
    ("or1-math-7b", 2160, (32_768, 128, 64, 64)),
]


@pytest.mark.parametrize(("recipe", "step", "paper"), SCHEDULE)
def test_conflict_8_schedules_are_the_papers(recipe: str, step: int, paper: tuple[int, ...], root: Path) -> None:
    """Code: scripts for 8K, 16K and 32K alone, all with batches of 256 and groups of 16; --set gives those."""

    def batch(config: Config) -> tuple[int, ...]:
        ends = np.cumsum([stage.steps for stage in config.stage])
        stage = config.stage[int(np.searchsorted(ends, step))]
        per_update = stage.prompts_per_step // stage.updates_per_step
        return (stage.max_response_tokens, stage.prompts_per_step, per_update, stage.group_size)

    path = root / "examples" / "recipes" / f"{recipe}.toml"
    assert batch(load_config(path, files=False)) == paper
    if recipe == "or1-7b":
        scripts = ("stage.1.prompts_per_step=256", "stage.1.group_size=16")
        assert batch(load_config(path, scripts, files=False)) == (paper[0], 256, 256, 16)


@pytest.mark.parametrize(("reuse", "minibatch", "updates"), [(1, 2, 1), (2, 2, 2), (2, 1, 4)])
def test_conflict_9_a_rollout_can_be_reused(reuse: int, minibatch: int, updates: int, tmp_path: Path) -> None:
    """Paper: N_SGD = D_R / D_T N_reuse. Code: a rollout is passed once, whatever `ppo_epochs` says."""
    stage = {"reuse": reuse, "minibatch_prompts": minibatch}
    trainer = trainer_of(config_of(tmp_path, [stage], optim={"lr": 1e-2}))
    pairs = [group([1, 0], [response(ZERO, EOS), response(ONE, EOS)]) for _ in range(2)]
    metrics = learn(trainer, *pairs)
    assert metrics["optim/updates"] == trainer.optimizer.updates == updates == 2 // minibatch * reuse
    # The first update moves the policy away from the one that the ratio compares with.
    assert (metrics["policy/ratio_mean"] == 1.0) is (updates == 1)


@pytest.mark.parametrize(
    ("clip_high", "loss", "clipped"), [(0.2, -0.1 * A, 0.5), (0.28, -0.14 * A, 0.5), (0.6, -0.25 * A, 0.0)]
)
def test_conflict_9_clip_higher(clip_high: float, loss: float, clipped: float, tmp_path: Path) -> None:
    """Ratios 3/2 and 1: the loss is -(min(3/2, 1 + clip_high) A - A) / 2. Code: one bound for both sides."""
    right = response(ZERO, entropy=math.log(3))  # sampled with probability 1/3, now 1/2
    wrong = response(ONE, entropy=math.log(4))
    trainer = trainer_of(config_of(tmp_path, ALONE, loss={"old_logp": "rollout", "clip_high": clip_high}))
    metrics = learn(trainer, group([1, 0], [right, wrong]))
    assert (metrics["optim/loss"], metrics["policy/clip_frac"]) == (close(loss), clipped)


@pytest.mark.parametrize(("mask", "loss"), [("none", 1 / 6), ("before", 0.0), ("after", -1 / 12)])
def test_conflict_9_advantage_masks(mask: str, loss: float, tmp_path: Path) -> None:
    """Rewards 1, 0, 0 of one token each and 0 of three, which was cut. Code: no mask.

    none: advantages 1.5 and three of -0.5, so -(1.5 - 0.5 - 0.5 - 3 * 0.5) / 6. before: 2, -1, -1 and 0 over sqrt(3).
    after: -(1.5 - 0.5 - 0.5) / 6.
    """
    trainer = trainer_of(config_of(tmp_path, ALONE, loss={"advantage_mask": mask}))
    cut = response(ZERO, ONE, ONE, finish="length")
    assert learn(trainer, group([1, 0, 0, 0], [*[response(ZERO)] * 3, cut]))["optim/loss"] == close(loss)


@pytest.mark.parametrize(("kl_coef", "loss"), [(0.0, 0.0), (0.1, 0.025)])
def test_conflict_9_kl_with_a_reference(kl_coef: float, loss: float, tmp_path: Path) -> None:
    """k3 = e^d - d - 1 with d = -log 2 for one token and log 2 for the other: their mean is (1/2 + 2 - 2) / 2 = 1/4.

    Paper: 0, and its ablation 5 a KL term. Code: the reference is never made.
    """
    other = save_policy(tmp_path / "reference", {ZERO: 0.25, ONE: 0.5, EOS: 0.25})
    loss_config = {"kl_coef": kl_coef} | ({"reference": str(other)} if kl_coef else {})
    trainer = trainer_of(config_of(tmp_path, ALONE, loss=loss_config))
    assert (trainer.reference is None) is (kl_coef == 0)
    assert learn(trainer, group([1, 0], [response(ZERO), response(ONE)]))["optim/loss"] == close(loss)


@pytest.mark.parametrize("drop", [True, False])
def test_conflict_10_solved_prompts_are_dropped_at_the_start_of_a_stage(drop: bool, tmp_path: Path) -> None:
    """Of three prompts one is always solved. Paper: the next stage does without it. Code: nothing of the kind."""
    config = config_of(tmp_path, [{}, {"steps": 9, "prompts_per_step": 6}], data={"drop_solved": drop})
    trainer = trainer_of(config)
    solved, mixed, failed = (prompt.id for prompt in trainer.parts.data.prompts)
    rewards = {solved: [1, 1], mixed: [1, 0], failed: [0, 0]}
    learn(trainer, *(group(r, [response(ZERO)] * 2, name) for name, r in rewards.items()))
    trainer.rollouts.skip(trainer.state.stages.step(2))
    rollout = trainer.rollouts.take(trainer.state.stages.step(3))
    names = [g.prompt.id for g in rollout.groups]
    assert trainer.state.solved.dropped == ({solved} if drop else set())
    assert set(names) == ({mixed, failed} if drop else {solved, mixed, failed})
    assert np.unique(names, return_counts=True)[1].tolist() == ([3, 3] if drop else [2, 2, 2])
