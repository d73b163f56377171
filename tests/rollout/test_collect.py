"""Streaming, deadlines and partial rollouts on the embedded engine; which vLLM is accepted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from or1.cli import main
from or1.config.load import load_config
from or1.core.errors import ConfigError
from or1.core.types import Prompt, Response, Score, Status
from or1.rollout.collect import collect
from or1.rollout.engine import Finished, Sampling
from or1.run.in_flight import InFlight

from .conftest import Side, prompts_of

QUICKSTART = "examples/quickstart.toml"


class LengthScorer:
    """1 for an even number of tokens; truncated responses earn nothing."""

    def __init__(self) -> None:
        self.scored: list[Response] = []
        self._pool = ThreadPoolExecutor(2)

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        self.scored.append(response)
        return self._pool.submit(self._score, response)

    def _score(self, response: Response) -> Score:
        if response.truncated:
            return Score(0.0, Status.TRUNCATED)
        even = len(response.token_ids) % 2 == 0
        return Score(float(even), Status.OK if even else Status.WRONG)


@pytest.fixture(scope="module")
def side(start: Callable[..., Side], checkpoint: Callable[..., Path]) -> Side:
    return start(checkpoint(True), engine="hf", max_response=40)


def test_open_groups_close_under_later_policies_and_tokens_keep_versions(side: Side) -> None:
    prompts, scorer = prompts_of(6), LengthScorer()
    carried, closed, calls = [], [], 0
    while carried or not calls:
        side.engine.update_weights(calls)
        sampling = Sampling(1.0, 40, 4, seed=calls, new_tokens=12)
        rollout = collect(side.engine, scorer, prompts if not calls else [], sampling, carried=carried)
        assert len(rollout.groups) + len(rollout.open) == (6 if not calls else len(carried))
        closed += rollout.groups
        carried, calls = rollout.open, calls + 1
        if calls == 1:
            assert rollout.open and all(None in group.scores for group in rollout.open)
    assert calls == 4, "40 tokens in parts of 12"
    assert sorted(g.prompt.id for g in closed) == sorted(p.id for p in prompts)
    responses = [r for g in closed for r in g.responses]
    assert len(scorer.scored) == len(responses) == 24, "each response is scored once, when it is complete"
    assert max(len(r.token_ids) for r in responses) > 36
    for r in responses:
        expected = [i // 12 for i in range(len(r.token_ids))]
        assert r.token_versions.tolist() == expected and r.version == expected[-1]
        assert r.finish == ("stop" if r.token_ids[-1] == side.tokenizer.eos_token_id else "length")
    assert (
        side.drift(
            [g.prompt for g in closed for _ in g.responses], [Finished(i, 0, r) for i, r in enumerate(responses)]
        )
        < 1e-4
    )


def test_what_is_in_flight_survives_a_checkpoint(side: Side) -> None:
    prompts, scorer = prompts_of(6), LengthScorer()
    side.engine.update_weights(3)
    first = collect(side.engine, scorer, prompts[:5], Sampling(1.0, 40, 4, 1, new_tokens=10))
    side.engine.update_weights(4)
    rollout = collect(side.engine, scorer, prompts[5:], Sampling(1.0, 40, 4, 2, new_tokens=25), carried=first.open)
    assert rollout.groups and rollout.open
    for before in (InFlight(rollout, list(rollout.open)), InFlight(None, list(first.open)), InFlight()):
        state, tensors = before.to_checkpoint(prompts)
        after = InFlight.from_checkpoint(state, tensors, prompts, side.tokenizer)
        assert repr(after) == repr(before)
        assert (after.ahead is None) == (before.ahead is None)
        ours, theirs = (x.carried + (x.ahead.groups if x.ahead else []) for x in (before, after))
        for a, b in zip(ours, theirs, strict=True):
            assert a.prompt is b.prompt and a.scores == b.scores
            for x, y in zip(a.responses, b.responses, strict=True):
                assert all(np.array_equal(getattr(x, k), getattr(y, k)) for k in ("token_ids", "logp"))
                assert np.array_equal(x.token_versions, y.token_versions) and x.text == y.text


def test_the_deadline_aborts_what_is_unfinished_and_scores_it_as_truncated(side: Side) -> None:
    prompts = prompts_of(40)
    rollout = collect(side.engine, LengthScorer(), prompts, Sampling(1.0, 40, 8, 1, deadline_s=0.05))
    responses = [r for g in rollout.groups for r in g.responses]
    assert len(responses) == 320
    late = [
        (r, s) for g in rollout.groups for r, s in zip(g.responses, g.scores, strict=True) if r.finish == "deadline"
    ]
    assert late and all(s.status is Status.TRUNCATED and s.reward == 0 for _, s in late)


def test_a_group_is_released_while_others_are_still_generated(side: Side) -> None:
    prompts, done, released = prompts_of(32), [], []
    side.engine.batch_size, before = 16, side.engine.batch_size
    rollout = collect(
        side.engine,
        LengthScorer(),
        prompts,
        Sampling(1.0, 20, 4, 1),
        lambda d, _: done.append(d),
        release=lambda group: released.append((group, done[-1])),
    )
    side.engine.batch_size = before
    assert len(released) == 32 and released[0][1] < 128, "the first group is out before the last response is in"
    assert [g for g, _ in sorted(released, key=lambda r: prompts.index(r[0].prompt))] == rollout.groups


def test_a_response_that_a_whole_call_did_not_advance_is_truncated(side: Side) -> None:
    # The deadline is over before the first batch begins.
    sampling = Sampling(1.0, 40, 4, 1, new_tokens=9, deadline_s=1e-9)
    rollout = collect(side.engine, LengthScorer(), prompts_of(1), sampling)
    assert not rollout.open
    assert [s.status for s in rollout.groups[0].scores] == [Status.TRUNCATED] * 4


STALE = ("rollout.engine=vllm", "rollout.vllm.placement=server", "rollout.max_staleness=2", "loss.is_cap=2.0")


@pytest.mark.parametrize(
    ("overrides", "where", "word"),
    [
        (["rollout.top_p=0.9", "loss.is_cap=2.0"], "rollout.top_p", "mass that survives"),
        (["rollout.top_k=20", "loss.is_cap=2.0"], "rollout.top_k", "mass that survives"),
        (["loss.is_cap=2.0", 'loss.old_logp="rollout"'], "loss.is_cap", "no effect"),
        (["rollout.overlap=true", "rollout.engine=vllm"], "rollout.overlap", "importance weights"),
        (["rollout.overlap=true", "loss.is_cap=2.0"], "rollout.overlap", "weights of its own"),
        (["rollout.partial_tokens=10"], "rollout.partial_tokens", "importance weights"),
        (["rollout.max_staleness=1", "rollout.engine=vllm"], "rollout.max_staleness", "importance weights"),
        (["rollout.max_staleness=1", "loss.is_cap=2.0"], "rollout.max_staleness", "weights of its own"),
        ([*STALE, "rollout.vllm.placement=colocate"], "rollout.max_staleness", 'placement = "server"'),
        ([*STALE, "rollout.overlap=true"], "rollout.overlap", "is max_staleness = 1"),
        ([*STALE, "rollout.partial_tokens=10"], "rollout.partial_tokens", "beyond max_staleness = 2"),
        ([*STALE, "deterministic=true"], "rollout.max_staleness", "depend on time"),
        (["rollout.vllm.url=http://node:8000"], "rollout.vllm.url", "placement"),
    ],
)
def test_what_would_train_wrongly_is_refused_with_the_reason(
    root: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], where: str, word: str
) -> None:
    monkeypatch.chdir(root)
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, overrides)
    assert word in {p.path: p.message for p in caught.value.problems}[where]


def test_rollouts_ahead_on_a_server_are_accepted_with_refills_and_a_deadline(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    config = load_config(QUICKSTART, [*STALE, "loss.refill_rounds=1", "rollout.deadline_s=60", "data.drop_solved=true"])
    assert config.rollout.steps_ahead == 2
    assert load_config(QUICKSTART, ["rollout.overlap=true", *STALE[:1], STALE[3]]).rollout.steps_ahead == 1


def test_auto_is_the_embedded_engine_without_a_gpu(start: Callable[..., Side], checkpoint: Callable[..., Path]) -> None:
    assert type(start(checkpoint(True)).engine).__name__ == "HfEngine"


@pytest.mark.parametrize(("version", "word"), [("0.33.1", "tested with >=0.32,<0.33"), ("0.31.9", "0.31.9")])
@pytest.mark.slow
def test_a_vllm_outside_the_tested_range_is_one_clear_line(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str,
    word: str,
) -> None:
    package = tmp_path / "site" / f"vllm-{version}.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert main(["train", QUICKSTART, "--set", "rollout.engine=vllm", "--set", f"run_dir={tmp_path}/run"]) == 70
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("or1: ")]
    assert len(message) == 1 and word in message[0] and 'rollout.engine = "hf"' in message[0]
