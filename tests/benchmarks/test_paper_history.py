"""The study of the report's claims: its rule, its arms, a run of one, and the page that is committed."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.paper.history import arms, page, runs
from benchmarks.paper.history.arms import ARMS
from benchmarks.paper.history.claims import CLAIMS, Claim, Statement, conclude, decide
from benchmarks.paper.history.reward import score
from or1.config import Config


def records_of(**accuracies: list[float]) -> dict:
    """Return runs whose only content is a final test accuracy, in percent."""
    return {
        (arm, seed): {"arm": arm, "evals": [(0, 0.3), (1, a / 100), (2, a / 100)]}
        for arm, values in accuracies.items()
        for seed, a in enumerate(values, 1)
    }


# Three differences x - 1, x, x + 1 have a half-width of 4.303 / sqrt(3) = 2.48; an accuracy matters from 2 points on.
@pytest.mark.parametrize(
    ("expect", "mean", "verdict"),
    [
        ("higher", 10, "reproduced"),
        ("higher", 1, "inconclusive"),
        ("higher", -1, "not reproduced"),
        ("lower", -10, "reproduced"),
        ("lower", 10, "not reproduced"),
        ("no higher", -1, "reproduced"),
        ("no higher", 1, "inconclusive"),
        ("no higher", 10, "not reproduced"),
        ("same", 1, "reproduced"),
        ("same", 4, "inconclusive"),
        ("same", -10, "not reproduced"),
    ],
)
def test_the_rule(expect: str, mean: float, verdict: str) -> None:
    records = records_of(a=[49 + mean, 50 + mean, 51 + mean], b=[50, 50, 50])
    assert decide(Statement("a", "accuracy", expect, "b"), records).verdict == verdict


def test_the_interval_is_students_over_the_common_seeds() -> None:
    records = records_of(a=[60, 60, 60, 99], b=[49, 50, 51])
    found = decide(Statement("a", "accuracy", "higher", "b"), records)
    half = 4.303 / math.sqrt(3)
    assert (found.seeds, found.mean) == (3, pytest.approx(10))
    assert (found.low, found.high) == (pytest.approx(10 - half), pytest.approx(10 + half))
    with pytest.raises(ValueError, match="1 common seeds"):
        decide(Statement("a", "accuracy", "higher", "b"), records_of(a=[60, 60], b=[50]))


def test_every_statement_names_arms_whose_settings_are_valid(tmp_path: Path) -> None:
    for claim in CLAIMS:
        for name in claim.arms:
            config = Config.model_validate(ARMS[name].config(tmp_path, tmp_path / "run", 1))
            assert config.stage[0].minibatch_prompts <= config.stage[0].prompts_per_step, name
            if name.startswith("("):
                n_sgd, d_r, d_t, reuse = map(int, name.partition(" ")[0].strip("()").split(","))
                stage = config.stage[0]
                assert (stage.updates_per_step, stage.prompts_per_step) == (n_sgd, d_r), name
                assert (stage.minibatch_prompts, stage.reuse) == (d_t, reuse), name


def test_steps_without_kept_groups_take_the_entropy_before_them() -> None:
    assert runs._filled([None, 0.5, None, 0.25]) == [0.5, 0.5, 0.5, 0.25]


def test_the_reward_wants_the_box_at_the_end() -> None:
    assert score("12</think>\\boxed{132}", "132") == 1.0
    for text in ("12</think>\\boxed{13", "\\boxed{132}", "</think>\\boxed{132}+", "</think>\\boxed{1132}"):
        assert score(text, "132") == 0.0, text


@pytest.mark.nightly
def test_an_arm_runs_and_its_page_shows_it(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(root / "examples" / "tiny-adder", tmp_path / "base")
    monkeypatch.chdir(root)
    short = {
        name: replace(ARMS[name], steps=2, prompts=4, minibatch=d_t, seeds=2)
        for name, d_t in (("(1,32,32,1)", 4), ("(4,32,8,1)", 1))
    }
    monkeypatch.setattr(arms, "EVALUATIONS", 2)
    monkeypatch.setitem(ARMS, "(1,32,32,1)", short["(1,32,32,1)"])
    monkeypatch.setitem(ARMS, "(4,32,8,1)", short["(4,32,8,1)"])
    settings = {(n, seed): runs._settings(tmp_path, n, seed, "cpu", 1e-4) for n in short for seed in (1, 2)}
    records = {(name, seed): runs._run(name, seed, s) for (name, seed), s in settings.items()}
    assert all(len(r["series"]["entropy"]) == 2 and len(r["evals"]) == 3 for r in records.values())
    assert runs._finished(settings["(1,32,32,1)", 1]) == records["(1,32,32,1)", 1]
    claim = Claim("C0", "A trial", (Statement("(4,32,8,1)", "entropy", "lower", "(1,32,32,1)"),))
    written = page.write_page(tmp_path / "out", [claim], records, {"runs": 4}, 1e-4)
    assert "(4,32,8,1): mean entropy of the run, lower than (1,32,32,1)" in written.read_text()
    assert (tmp_path / "out" / "C0.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("name", ["paper", "paper-lr3e-4"])
def test_the_committed_verdicts_follow_from_the_committed_runs(name: str, root: Path) -> None:
    folder = root / "benchmarks" / "results" / name
    study, text = json.loads((folder / "study.json").read_text()), (folder / "README.md").read_text()
    records = {(run["arm"], run["seed"]): run for run in study["runs"]}
    assert {run["arm"] for run in study["runs"]} == {name for claim in CLAIMS for name in claim.arms}
    for claim in CLAIMS:
        verdict = conclude([decide(s, records) for s in claim.statements])
        assert study["claims"][claim.key]["verdict"] == verdict
        assert f"{claim.title} | {page._MARKS[verdict]} |" in text
        assert (folder / f"{claim.key}.svg").exists()
