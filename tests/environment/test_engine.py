"""Episodes as responses, with an engine and a stage of fakes: order, limits, masks, faults. Needs no verifiers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from or1.core import codec
from or1.core.errors import EngineError
from or1.core.seeds import seed_of
from or1.core.types import Group, Prompt, Response, Score, Status
from or1.environment.engine import EnvironmentEngine, EpisodeScorer
from or1.environment.outcome import Unusable, failure_of, score_of, sequence_of
from or1.magic.entropy import rollout_entropy
from or1.rollout.collect import collect
from or1.rollout.engine import Finished, Sampling, continued, jobs_of
from or1.run.rollout_log import read_rollouts, write_rollouts
from or1.train.metrics import rollout_metrics

EOS = 9
PROMPT = Prompt("env:0", "env", "1+1", np.array([1, 2], np.int32))


class Words:
    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(map(str, ids))


class Engine:
    """Answers every request with one token and EOS, and keeps the seeds and limits of its calls."""

    shares_weights, version = True, 4
    continuous_batching = False

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def generate(self, prompts: Any, sampling: Sampling, slots: Any = None) -> Iterator[Finished]:
        jobs = list(jobs_of(prompts, sampling, slots))
        self.batches.append([(job.seed, job.max_new) for job in jobs])
        for job in jobs:
            ids = np.array([5, EOS], np.int32)[: job.max_new]
            finish = "stop" if len(ids) == 2 else "length"
            yield Finished(*job.slot, continued(job, ids, np.full(len(ids), -1.0, np.float32), finish, self.version))


class Stage:
    """Plays `turns` turns an episode; between them the environment writes the tokens 7 and 8."""

    def __init__(self, turns: int = 1, sampling: dict[str, Any] | None = None, hangs: bool = False) -> None:
        self.turns, self.sampling, self.hangs = turns, sampling or {}, hangs
        self.events: list[Any] = []
        self.cancelled: list[int] = []
        self.hanging: set[int] = set()

    def play(self, episode: int, task: Any, temperature: float) -> None:
        if not self.hangs and episode not in self.hanging:
            self._ask(episode, [1, 2], [False] * 2, [0.0] * 2, self.turns)

    def _ask(self, episode: int, ids: list[int], mask: list[bool], logp: list[float], left: int) -> None:
        def answer(new: list[int], new_logp: list[float], finish: str) -> None:
            all_ids, all_mask, all_logp = ids + new, mask + [True] * len(new), logp + new_logp
            if left > 1:
                self._ask(episode, [*all_ids, 7, 8], [*all_mask, False, False], [*all_logp, 0.0, 0.0], left - 1)
            else:
                self.events.append(SimpleNamespace(episode=episode, result=episode_of(all_ids, all_mask, all_logp)))

        def refuse(reason: str) -> None:
            failed = episode_of(ids, mask, logp, ok=False)
            self.events.append(SimpleNamespace(episode=episode, result=failed))

        call = {"episode": episode, "token_ids": ids, "sampling": self.sampling, "answer": answer, "refuse": refuse}
        self.events.append(SimpleNamespace(**call))

    def next_event(self, timeout_s: float) -> Any:
        # The newest first: the order of arrival must have no effect.
        return self.events.pop() if self.events else None

    def cancel(self, episode: int) -> None:
        self.cancelled.append(episode)
        self.events.append(SimpleNamespace(episode=episode, result=None))


def episode_of(ids: list[int], mask: list[bool], logp: list[float], **other: Any) -> Any:
    branch = SimpleNamespace(trainable=True, token_ids=ids, sampled_mask=mask, logprobs=logp, calls=[])
    rewards = {"right": SimpleNamespace(score=1.0, weight=0.5), "tidy": SimpleNamespace(score=2.0, weight=-0.1)}
    trace = SimpleNamespace(
        agent=SimpleNamespace(trainable=True), branches=[branch], rewards=rewards, errors=[], is_timeout=False
    )
    return SimpleNamespace(**({"ok": True, "traces": [trace], "errors": [], "is_timeout": False} | other))


def played(stage: Stage, engine: Engine | None = None, samples: int = 2, **sampling: Any) -> Group:
    scorer = EpisodeScorer()
    plays = EnvironmentEngine(engine or Engine(), stage, {PROMPT.id: None}, Words(), 0.05, scorer)
    asked = Sampling(**({"temperature": 1.0, "max_tokens": 20, "samples": samples, "seed": 3} | sampling))
    return collect(plays, scorer, [PROMPT], asked).groups[0]


def test_a_turn_of_the_environment_is_masked() -> None:
    group = played(Stage(turns=2))
    for response, score in zip(group.responses, group.scores, strict=True):
        assert response.token_ids.tolist() == [5, EOS, 7, 8, 5, EOS]
        assert response.sampled is not None and response.sampled.tolist() == [True, True, False, False, True, True]
        assert np.isnan(response.logp[2:4]).all() and (response.logp[[0, 1, 4, 5]] == -1).all()
        assert (response.finish, response.version, response.text) == ("stop", 4, "5 9 7 8 5 9")
        assert score == Score(0.3, Status.OK, parts=(("right", 1.0), ("tidy", 2.0)))
    # Statistics count the four tokens of the policy, and no log-prob counts as unknown.
    assert rollout_metrics([group])["completion/len_mean"] == 4
    assert [r.unknown_tokens for r in group.responses] == [0, 0]
    assert rollout_entropy([group]) == 1.0


def test_a_single_turn_is_a_response_like_any_other() -> None:
    engine = Engine()
    group = played(Stage(), engine, numbers=(6,))
    assert all(response.sampled is None for response in group.responses)
    assert engine.batches == [[(seed_of(3, 6, s), 20) for s in (0, 1)]]


def test_requests_of_all_episodes_are_one_batch_with_seeds_of_their_own() -> None:
    engine = Engine()
    played(Stage(turns=2), engine, samples=3)
    assert [len(batch) for batch in engine.batches] == [3, 3]
    seeds = [seed for batch in engine.batches for seed, _ in batch]
    assert len(set(seeds)) == 6
    again = Engine()
    played(Stage(turns=2), again, samples=3)
    assert again.batches == engine.batches


def test_the_token_limit_holds_for_the_whole_conversation() -> None:
    group = played(Stage(turns=9), max_tokens=7)
    for response, score in zip(group.responses, group.scores, strict=True):
        # 2 + 2 + 2 tokens, one more of the policy, and the environment's own two, which nothing follows.
        assert response.token_ids.tolist()[:7] == [5, EOS, 7, 8, 5, EOS, 7]
        assert response.finish == "length" and score == Score(0.0, Status.TRUNCATED)


def test_the_deadline_ends_episodes_that_hang() -> None:
    stage = Stage(hangs=True)
    group = played(stage, deadline_s=0.01)
    assert sorted(stage.cancelled) == [0, 1]
    assert [(r.finish, len(r.token_ids)) for r in group.responses] == [("deadline", 0)] * 2
    assert [score.status for score in group.scores] == [Status.TRUNCATED] * 2


def test_an_episode_that_hangs_is_a_timeout() -> None:
    group = played(Stage(hangs=True))
    assert [score.status for score in group.scores] == [Status.TIMEOUT] * 2
    assert np.isnan(group.rewards).all()


@pytest.mark.parametrize("continuous", [False, True])
def test_one_episode_that_hangs_does_not_stop_the_others(continuous: bool) -> None:
    engine, stage = Engine(), Stage(turns=3)
    engine.continuous_batching = continuous
    stage.hanging = {1}
    group = played(stage, engine, samples=3)
    assert [score.status for score in group.scores] == [Status.OK, Status.TIMEOUT, Status.OK]
    assert [len(r.token_ids) for r in group.responses] == [10, 0, 10]


@pytest.mark.parametrize(
    ("sampling", "cause"), [({"temperature": 0.2}, "temperature 0.2"), ({"min_p": 0.1}, "asks for min_p")]
)
def test_sampling_that_the_loss_does_not_know_is_a_fault(sampling: dict[str, Any], cause: str) -> None:
    group = played(Stage(sampling=sampling))
    assert all(score.status is Status.CRASH and cause in score.cause for score in group.scores)


def test_an_own_limit_of_an_agent_is_obeyed() -> None:
    group = played(Stage(sampling={"max_tokens": 1}))
    assert [r.token_ids.tolist() for r in group.responses] == [[5], [5]]


def test_episodes_are_not_continued() -> None:
    with pytest.raises(EngineError, match=r"rollout.partial_tokens"):
        played(Stage(), new_tokens=4)


def test_an_episode_that_is_not_one_sequence_is_unusable() -> None:
    prompt = np.array([1, 2], np.int32)
    episode = episode_of([1, 2, 5], [False, False, True], [0, 0, -1.0])
    assert sequence_of(episode, prompt).token_ids.tolist() == [5]
    with pytest.raises(Unusable, match="does not begin with the prompt"):
        sequence_of(episode, np.array([1, 3], np.int32))
    episode.traces[0].branches *= 2
    with pytest.raises(Unusable, match="2 branches instead of 1"):
        sequence_of(episode, prompt)
    episode.traces *= 2
    with pytest.raises(Unusable, match="2 trained agents"):
        sequence_of(episode, prompt)


def test_rewards_and_failures_become_scores() -> None:
    episode = episode_of([1, 2], [False, False], [0.0, 0.0])
    episode.traces[0].rewards["tidy"] = None
    assert score_of(episode).reward == 0.5
    assert math.isnan(dict(score_of(episode).parts)["tidy"])
    episode.traces[0].rewards = {}
    assert score_of(episode).status is Status.SKIPPED
    episode.errors.append(SimpleNamespace(type="TaskError", message="no such file"))
    failure = failure_of(episode)
    assert failure.status is Status.CRASH and math.isnan(failure.reward) and failure.cause == "TaskError: no such file"
    episode.is_timeout = True
    assert failure_of(episode).status is Status.TIMEOUT


def test_the_mask_survives_files_and_ranks(tmp_path: Path) -> None:
    group = played(Stage(turns=2))
    plain = Response(np.array([5], np.int32), np.array([-1], np.float32), "stop", 4, "5")
    mixed = Group(PROMPT, (group.responses[0], plain), group.scores)
    path = write_rollouts(tmp_path, 1, 1, [mixed], [np.array([1.0, -1.0])])
    (read,) = read_rollouts(path, 1, {PROMPT.id: PROMPT}, 2)
    (sent,) = codec.loads(codec.dumps([mixed]))
    for copy in (read, sent):
        assert copy.scores == mixed.scores
        assert copy.responses[0].sampled.tolist() == group.responses[0].sampled.tolist()
        assert copy.responses[1].sampled is None
        assert np.array_equal(copy.responses[0].logp, group.responses[0].logp, equal_nan=True)
