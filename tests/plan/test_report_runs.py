"""The report's runs as `or1 plan` sees them: they fit its machines, and the page that compares times is true."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks.plan import report as plan_report
from benchmarks.plan.report import AS_RELEASED, DEVICE, ENGINE, MACHINES, RUNS, TABLE_9, plan, planned
from or1.plan.generation import Decoding, drain_seconds, rollout_seconds

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(("recipe", "gpus"), MACHINES.items())
def test_the_recipes_fit_the_reports_machines(recipe: str, gpus: int, or1: Run) -> None:
    command = ("plan", f"examples/recipes/{recipe}.toml", "--device", "H800", "--gpus", str(gpus), "--json")
    found = json.loads(or1(*command).stdout)
    assert found["fits"] and found["gpus"] == gpus and found["device"]["name"] == "H800"
    for stage in found["stages"]:
        assert stage["peak_bytes"] < found["usable_bytes"] < 80 * 10**9 * 1.02
        assert sum(stage["split_seconds"].values()) == pytest.approx(sum(stage["seconds"].values()))
        assert list(stage["split_seconds"]) == ["rollout", "update", "other"]
    assert found["largest_max_tokens_per_rank"] >= 34_816


def test_the_32b_model_needs_two_gpus_a_copy_on_80_gb() -> None:
    assert not plan("or1-32b", 256, ("rollout.vllm.tensor_parallel=1",)).fits


def test_the_page_has_the_tables_of_its_command() -> None:
    page = plan_report.PAGE.read_text(encoding="utf-8")
    written = page.partition(plan_report.BEGIN)[2].partition(plan_report.END)[0].strip()
    assert written == plan_report.tables(), "python -m benchmarks.plan_report --write"


def test_the_table_that_or1_plan_prints_has_the_pages_numbers(or1: Run) -> None:
    overrides = [part for setting in (*AS_RELEASED, *RUNS[1].overrides) for part in ("--set", setting)]
    done = or1("plan", "examples/recipes/or1-7b.toml", "--device", "H800", "--gpus", "32", *overrides)
    (row,) = (line for line in done.stdout.splitlines() if line.split()[:3] == ["1", "1,024", "16,384"])
    split = planned(RUNS[1])
    shares = [f"{seconds / sum(split.values()):.0%}" for seconds in split.values()]
    assert " ".join(row.split()).find(" ".join(shares)) > 0, (row, shares)
    page = plan_report.PAGE.read_text(encoding="utf-8")
    for seconds in split.values():
        assert f" {seconds:,.0f} (" in page


def test_the_reports_numbers_add_up() -> None:
    """309 h, 72.1 % and 8.7 %; 116, 114 and 118 h: what Tables 7 and 8 print, to the rounding of their hours."""
    totals = [run.rollout + run.update + run.other for run in RUNS]
    assert totals == [309, 116, 114, 118]
    shares = [(72.1, 8.7), (77.6, 6.9), (76.3, 8.7), (76.3, 10.2)]
    for run, total, (rollout, update) in zip(RUNS, totals, shares, strict=True):
        assert (100 * run.rollout / total, 100 * run.update / total) == (
            pytest.approx(rollout, abs=0.3),
            pytest.approx(update, abs=0.3),
        )
    assert list(TABLE_9.values()) == [375, 270, 225, 205]


def test_what_the_page_concludes() -> None:
    ratios: dict[str, list[float]] = {"rollout": [], "update": [], "other": []}
    for run in RUNS:
        ours, with_engine = planned(run), planned(run, ENGINE)
        assert ours["rollout"] / sum(ours.values()) > 0.75 < with_engine["rollout"] / sum(with_engine.values())
        assert ours["rollout"] < 0.5 * run.seconds["rollout"]
        assert with_engine["rollout"] == pytest.approx(run.seconds["rollout"], rel=0.2)
        for name, seconds in run.seconds.items():
            ratios[name].append(ours[name] / seconds)
    assert [f"{bound(ratios[name]):.0%}" for name in ("update", "other") for bound in (min, max)] == [
        "68%",
        "101%",
        "10%",
        "13%",
    ]
    for gpus, seconds in TABLE_9.items():
        rollout = plan("or1-7b", gpus, RUNS[1].overrides, engine=ENGINE).stages[0].time.split["rollout"]
        assert rollout == pytest.approx(seconds, rel=0.032)


def test_a_rollout_drains_as_the_curve_of_lengths_says() -> None:
    """Uniform lengths to L = 1000 with prompts of 100: cache reads are n (100 L / 2 + L^2 / 6) token-times."""
    work = replace(plan("or1-7b", 32).stages[0].work, mean_prompt=100, max_response=1000, mean_response=500)
    cache = Decoding(weights_s=0.0, cache_token_s=1.0, token_s=0.0, least_s=0.0)
    assert drain_seconds(cache, 1e6, work) == pytest.approx(1e6 * (100 * 500 + 1000**2 / 6), rel=1e-3)
    # All at the limit: n (100 L + L^2 / 2). Weights are read once a step, however few responses are left.
    longest = replace(work, mean_response=1000)
    assert drain_seconds(cache, 1e6, longest) == pytest.approx(1e6 * (100 * 1000 + 1000**2 / 2), rel=1e-3)
    assert drain_seconds(Decoding(2.0, 0.0, 0.0, 0.0), 7, work) == pytest.approx(2000)
    assert drain_seconds(Decoding(0.0, 0.0, 0.0, 3.0), 7, work) == pytest.approx(3000)
    busy = Decoding(0.0, 0.0, 0.0, 3.0, 0.1)
    assert drain_seconds(busy, 1e4, work) == pytest.approx(3000 + 0.1 * 1e4 * 500, rel=1e-3)


def test_a_rollout_is_bound_by_its_longest_response() -> None:
    """However many GPUs there are, 16,384 tokens are decoded one after the other, each reading 15.2 GB of weights."""
    found = plan("or1-7b", 1024)
    least = 16_384 * 2 * found.shape.parameters / (3350e9 * 0.8)
    seconds = [plan("or1-7b", gpus).stages[0].time.parts["generation"] for gpus in (8, 32, 128, 1024)]
    assert seconds == sorted(seconds, reverse=True) and least < seconds[-1] < 1.1 * least
    # More responses than the cache holds wait for a place: twice as many then take about a mean length more each.
    work = found.stages[0].work
    many, more = (
        rollout_seconds(found.shape, replace(found.choices, gpus=1), DEVICE, replace(work, sequences=n))
        for n in (4096, 8192)
    )
    assert 1.9 < more / many < 2.1


def test_reuse_repeats_the_update_and_off_policy_steps_score_first() -> None:
    once, twice = (plan("or1-7b", 32, (f"stage.0.reuse={n}",)).stages[0] for n in (1, 2))
    assert twice.time.split["update"] == pytest.approx(2 * once.time.split["update"])
    assert "old log-probs" not in once.time.parts and twice.time.parts["old log-probs"] > 0
    assert twice.time.split["other"] - once.time.split["other"] == pytest.approx(twice.time.parts["old log-probs"])
    assert twice.time.mfu == pytest.approx(once.time.mfu)
    # Forward alone is a quarter of forward, recomputation and backward.
    scored = twice.time.parts["old log-probs"] / once.time.split["update"]
    assert 0.2 < scored < 0.35


def test_the_engine_gets_weights_over_the_links() -> None:
    sync = plan("or1-32b", 256).stages[0].time.parts["weight sync"]
    # 65.5 GB at 80 % of 50 GB/s, and a copy within the GPU.
    assert 65.5 / 40 < sync < 1.1 * 65.5 / 40
