"""The search: fake candidates that raise, lie, hang, are slow or noisy, under a clock of the test's own."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from or1.tune.choice import Trial
from or1.tune.search import Budget, Candidate, search
from tests.helpers.tuner_fakes import Clock, Scripted


def run(
    times: Mapping[str, list[float]],
    errors: Mapping[str, float | str] | None = None,
    budget_s: float = 60.0,
    **options: bool,
) -> tuple[dict[str, Trial], dict, Scripted]:
    """Search among candidates of one group; the first name is the default."""
    clock = Clock()
    runner = Scripted(clock, times, errors or {})
    found = [Candidate(name, {"head_impl": name}) for name in times]
    budget = Budget(budget_s, lambda done, total: None, clock)
    trials, chosen = search(["head"], lambda group, so_far: found, runner, budget, **options)
    return {trial.name: trial for trial in trials}, chosen, runner


def test_the_fastest_correct_candidate_is_chosen_and_the_others_say_why_not() -> None:
    times = {"plain": [0.2], "slow": [0.5], "fast": [0.1], "liar": [0.01], "nan": [0.01], "raises": [0.01]}
    errors = {"liar": 2.01, "nan": float("nan"), "raises": "RuntimeError: no kernel", "fast": 2.0}
    trials, chosen, _ = run(times, errors)
    assert chosen == {"head_impl": "fast"}
    assert [name for name, trial in trials.items() if trial.chosen] == ["fast"] and trials["fast"].why_out == ""
    assert trials["liar"].why_out == "wrong: its error is 2.01 times plain torch's, the limit is 2"
    assert "nan" in trials["nan"].why_out and trials["nan"].seconds == trials["liar"].seconds == []
    assert trials["raises"].why_out == "RuntimeError: no kernel" and trials["raises"].error is None
    assert trials["slow"].why_out == "slower: 5.00 times the best"
    assert trials["plain"].why_out.startswith("slower") and trials["plain"].median == 0.2


def test_a_gain_within_the_noise_keeps_the_default() -> None:
    assert run({"plain": [0.100], "other": [0.099]})[1] == {"head_impl": "plain"}
    # A better median with a worse best run, and the opposite.
    assert run({"plain": [0.10, 0.10, 0.10], "other": [0.09, 0.09, 0.101]})[1] == {"head_impl": "other"}
    assert run({"plain": [0.09, 0.10, 0.10], "other": [0.095, 0.095, 0.095]})[1] == {"head_impl": "plain"}


def test_a_noisy_candidate_is_not_halved_away_by_one_slow_round() -> None:
    noisy = [0.9, 0.05, 0.9] + [0.05] * 15
    trials, chosen, runner = run({"plain": [0.2], "third": [0.3], "noisy": noisy, "fourth": [0.4]})
    assert chosen == {"head_impl": "noisy"} and len(trials["noisy"].seconds) >= 6
    assert runner.runs.count("fourth") == 3, "the slower half goes after a round"


def test_rounds_are_interleaved() -> None:
    _, _, runner = run({"a": [0.1], "b": [0.1], "c": [0.1]})
    assert runner.runs[:9] == ["a", "b", "c"] * 3


def test_a_default_that_fails_is_replaced_even_by_a_slower_candidate() -> None:
    _, chosen, _ = run({"plain": [0.1], "slow": [0.5]}, {"plain": "no kernel"})
    assert chosen == {"head_impl": "slow"}


def test_without_a_correct_candidate_the_default_stays_and_none_is_marked() -> None:
    trials, chosen, _ = run({"plain": [0.1], "other": [0.1]}, {"plain": 3.0, "other": 4.0})
    assert chosen == {"head_impl": "plain"} and not any(trial.chosen for trial in trials.values())


@pytest.mark.parametrize("budget_s", [0.5, 3.0, 20.0])
def test_the_budget_is_kept_whatever_the_candidates_take(budget_s: float) -> None:
    times = {str(number): [0.1 + 0.7 * number] for number in range(12)}
    trials, _, runner = run(times, budget_s=budget_s)
    # The last check begins in time, and may end later by one candidate's run.
    assert runner.clock.now <= budget_s + 0.1 + 0.7 * 11
    late = [trial for trial in trials.values() if trial.why_out.startswith("not tried")]
    assert len(late) > 0 or budget_s == 20.0
    assert all(trial.why_out == f"not tried: the budget of {budget_s:g} s was spent" for trial in late)


def test_what_the_budget_does_not_allow_to_be_timed_keeps_the_default() -> None:
    trials, chosen, _ = run({"plain": [1.0], "fast": [0.1]}, budget_s=1.05)
    assert chosen == {"head_impl": "plain"}, trials


def test_a_candidate_that_hangs_while_it_is_timed_is_out() -> None:
    trials, chosen, runner = run({"plain": [0.2], "hangs": [0.1, 500.0]})
    assert chosen == {"head_impl": "plain"} and trials["hangs"].why_out == "no answer within 10 s"
    assert runner.clock.now < 20


def test_groups_share_the_budget_and_later_groups_see_the_choice() -> None:
    clock, seen = Clock(), []
    runner = Scripted(clock, {"a": [0.2], "b": [0.1]}, {})

    def candidates(group: str, so_far: dict) -> list[Candidate]:
        seen.append((group, so_far))
        if group == "pinned":
            return [Candidate("one", {"head_impl": "a"})]
        return [Candidate(name, {"head_impl": name, group: 1}) for name in "ab"]

    shown: list[tuple[int, int]] = []
    budget = Budget(8.0, lambda done, total: shown.append((done, total)), clock)
    trials, chosen = search(["first", "pinned", "second"], candidates, runner, budget)
    assert chosen == {"head_impl": "b", "first": 1, "second": 1}
    assert seen[2] == ("second", {"head_impl": "b", "first": 1})
    assert {trial.group for trial in trials} == {"first", "second"}, "a single candidate needs no measurement"
    assert shown[-1] == (8, 8) and [done for done, _ in shown] == sorted(done for done, _ in shown)
    both, _ = search(["pinned"], candidates, runner, Budget(8.0, lambda *_: None, clock), all_groups=True)
    assert [trial.chosen for trial in both] == [True] and both[0].seconds


def test_a_candidate_that_the_budget_cuts_off_has_not_failed() -> None:
    trials, chosen, _ = run({"plain": [2.0, 500.0], "other": [0.5]}, budget_s=9.0)
    assert chosen == {"head_impl": "plain"} and not trials["plain"].failed
    assert trials["plain"].why_out in ("", "too little time: the budget of 9 s was spent")


def test_a_slow_candidate_may_take_as_long_as_its_first_run() -> None:
    trials, _, runner = run({"plain": [4.0], "other": [3.9]}, budget_s=60.0)
    assert len(trials["plain"].seconds) >= 3 and not trials["plain"].failed and not trials["other"].failed
    assert runner.clock.now <= 60.0
