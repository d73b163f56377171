"""A stop during a rollout, checkpoints by time, and checkpoints that stay; the clocks are not real."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from or1.cli import main
from or1.config import Config
from or1.core.types import Prompt, Response, Score, Status
from or1.dist.watchdog import Watchdog
from or1.dist.world import SINGLE, World
from or1.report.rank_display import RankDisplay
from or1.run.checkpoint import Checkpoint, committed_steps, load_checkpoint, read_manifest, remove_partials, step_folder
from or1.run.checkpoint_writer import save_checkpoint
from or1.run.directory import checkpoints_of, prepare_run_dir
from or1.run.session import Session
from or1.train.build import build
from or1.trainer import Trainer
from tests.helpers.hand_run import config_of, trainer_of

SETTINGS: dict[str, Any] = {
    "optim": {"lr": 0.05, "grad_clip": 1.0},
    "rollout": {"engine": "hf", "batch_size": 3},
    "checkpoint": {"every_steps": 100, "keep": 1},
}
STAGE = {"steps": 3, "prompts_per_step": 4, "group_size": 3}


class Parity:
    """A scorer for which a response of an even number of tokens is right. `unready` scores are never known."""

    remarks = ()

    def __init__(self, unready: bool = False) -> None:
        self.unready, self.seen = unready, 0

    def submit(self, prompt: Prompt, response: Response) -> Future[Score]:
        self.seen += 1
        future: Future[Score] = Future()
        if not self.unready:
            even = len(response.token_ids) % 2 == 0
            future.set_result(Score(float(even), Status.OK if even else Status.WRONG))
        return future


class StopAt:
    """A request to stop that comes when it is looked at for the n-th time; the engine looks at every token."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def start(config: Config, stop: Any = bool, scorer: Any = None) -> bool:
    """Run until the end or until the stop; return whether it was the end."""
    config.run_path.mkdir(parents=True, exist_ok=True)
    display = RankDisplay(Watchdog(SINGLE, 60.0), None)
    with build(config, display, stop=stop, scorer=scorer or Parity()) as parts:
        return Trainer(parts).run()


def learnt(config: Config) -> list[dict[str, Any]]:
    """Return the metrics of a run without times and memory."""
    records = [json.loads(line) for line in (config.run_path / "metrics.jsonl").read_text().splitlines()]
    dropped = ("time", "perf/")
    return [{k: v for k, v in r.items() if not k.startswith(dropped) and k != "crc"} for r in records]


def tensors(config: Config) -> dict[str, str]:
    """Return the sha256 of the newest checkpoint's files."""
    folder = checkpoints_of(config.run_path)
    manifest = read_manifest(step_folder(folder, committed_steps(folder)[-1]))
    return {name: entry["sha256"] for name, entry in manifest["files"].items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], dict[str, str], int]:
    folder, looks = tmp_path_factory.mktemp("undisturbed"), StopAt(10**9)
    config = config_of(folder, [STAGE], **SETTINGS)
    assert start(config, looks)
    return learnt(config), tensors(config), 10**9 - looks.left


@pytest.mark.parametrize("share", [0.02, 0.5, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.3, 0.8))])
def test_a_stop_in_a_rollout_keeps_what_is_finished_and_changes_nothing(
    share: float, undisturbed: Any, tmp_path: Path
) -> None:
    """In the first rollout, where there is no step to commit yet, and in later ones."""
    metrics, files, looks = undisturbed
    config = config_of(tmp_path, [STAGE], **SETTINGS)
    first, second = Parity(), Parity()
    assert not start(config, StopAt(int(share * looks)), first)
    folder = checkpoints_of(config.run_path)
    (at,) = committed_steps(folder)
    assert at == learnt(config)[-1]["step"] and (at == 0) == (share < 0.3)
    groups = read_manifest(step_folder(folder, at))["state"]["in_flight"]["groups"]
    assert len(groups) == STAGE["prompts_per_step"]
    kept = sum(member[3] is not None for _, members, _ in groups for member in members)
    assert start(config, scorer=second)
    assert first.seen + second.seen == 3 * 12, f"{kept} finished responses are not made again"
    assert (learnt(config), tensors(config)) == (metrics, files)


def test_a_stop_before_any_score_is_known_leaves_the_grading_to_the_resumed_run(
    undisturbed: Any, tmp_path: Path
) -> None:
    config = config_of(tmp_path, [STAGE], **SETTINGS)
    assert not start(config, StopAt(9), Parity(unready=True))
    again = Parity()
    assert start(config, scorer=again)
    assert again.seen == 3 * 12 and learnt(config) == undisturbed[0]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_stop_while_rejected_groups_are_replaced_changes_nothing(share: float, tmp_path: Path) -> None:
    settings = SETTINGS | {"loss": {"refill_rounds": 3}}
    stage = STAGE | {"steps": 2, "group_size": 2}
    looks = StopAt(10**9)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, config = (config_of(tmp_path / name, [stage], **settings) for name in ("whole", "cut"))
    assert start(whole, looks)
    assert not start(config, StopAt(int(share * (10**9 - looks.left))))
    assert start(config)
    assert learnt(config) == learnt(whole)


@pytest.mark.slow
@pytest.mark.parametrize("rollout", [{"partial_tokens": 2}, {"overlap": True}], ids=str)
def test_a_stop_with_open_groups_or_a_rollout_ahead_loses_no_group(rollout: dict[str, Any], tmp_path: Path) -> None:
    """Tokens of a later policy may differ from those of an undisturbed run; prompts, groups and steps may not."""
    settings = SETTINGS | {"rollout": SETTINGS["rollout"] | rollout, "loss": {"is_cap": 2.0}}
    for looks in (5, 15):
        (tmp_path / str(looks)).mkdir()
        config = config_of(tmp_path / str(looks), [STAGE], **settings)
        assert not start(config, StopAt(looks))
        step = committed_steps(checkpoints_of(config.run_path))[-1]
        state = read_manifest(step_folder(checkpoints_of(config.run_path), step))["state"]
        assert state["in_flight"]["closed"] is None, "no rollout ahead is whole"
        assert len(state["in_flight"]["groups"]) == STAGE["prompts_per_step"] or "partial_tokens" in rollout
        assert start(config)
        done = [record["completion/count"] for record in learnt(config) if record.get("completion/count")]
        assert done == [12, 12, 12] or ("partial_tokens" in rollout and sum(done) <= 36)


class Clock:
    """A clock that stands still until it is told to advance."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def session_of(config: Config, clock: Clock, world: World = SINGLE) -> tuple[Session, Trainer]:
    """Return a session with this clock, and the trainer whose state it has."""
    trainer = trainer_of(config)
    own = trainer.session
    return Session(config, trainer.state, own._parts, trainer.display, world, stop=bool, clock=clock), trainer


def commits_of_a_day(config: Config, step_s: float, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the times of the checkpoints of 24 hours of steps of `step_s` seconds."""
    clock, times = Clock(), list[float]()
    session, trainer = session_of(config, clock)
    monkeypatch.setattr(session._checkpoints, "save", lambda checkpoint: times.append(clock.now))
    while clock.now + step_s <= 86400:
        step = session.begin()
        clock.now += step_s
        trainer.state.step = step.number
        session.finish(step, {})
    trainer.rollouts.close()
    return times


@pytest.mark.parametrize("step_s", [1210.0, 2326.0, 4558.0, 9022.0])
def test_in_hours_long_steps_a_checkpoint_by_time_is_never_far_back(
    step_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of Math-7B on 64, 32, 16 and 8 H100s: on 16 and 8, 20 steps are longer than a day."""
    stage = [{"steps": 1000}]
    by_steps = config_of(tmp_path, stage, checkpoint={"every_steps": 20})
    assert bool(commits_of_a_day(by_steps, step_s, monkeypatch)) == (20 * step_s <= 86400)
    by_time = config_of(tmp_path, stage, checkpoint={"every_steps": 20, "every_minutes": 60})
    times = commits_of_a_day(by_time, step_s, monkeypatch)
    gaps = [b - a for a, b in itertools.pairwise([0.0, *times, 86400.0])]
    assert max(gaps) < 3600 + step_s
    assert step_s < 3600 or min(gaps[:-1]) == max(gaps[:-1]) == step_s


class Other(World):
    """A rank that is not the main one; the flags of the other ranks are false."""

    def any(self, flag: bool) -> bool:
        return flag


def test_the_clock_of_the_main_rank_alone_decides(tmp_path: Path) -> None:
    config = config_of(tmp_path, [{"steps": 9}], checkpoint={"every_steps": 100, "every_minutes": 1})
    for world, due in ((Other(rank=1, size=1), False), (SINGLE, True)):
        clock = Clock()
        session, _ = session_of(config, clock, world)
        clock.now += 3600
        assert session._checkpoint_is_due(7, False) is due


def test_stage_ends_and_multiples_stay_and_the_list_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [{"steps": 3}, {"steps": 5}]
    checkpoint = {"every_steps": 2, "keep": 1, "keep_stage_ends": True, "keep_every": 5}
    config = config_of(tmp_path, stages, checkpoint=checkpoint)
    prepare_run_dir(config)
    assert start(config)
    assert committed_steps(checkpoints_of(config.run_path)) == [3, 5, 8]
    assert main(["ckpt", "ls", str(config.run_path)]) == 0
    listed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:]}
    assert "end of stage 1" in listed["3"] and "every 5 steps" in listed["5"]
    assert "newest 1, end of stage 2" in listed["8"]
    assert main(["ckpt", "prune", str(config.run_path), "--keep", "1"]) == 0
    assert "step 3 stays: end of stage 1" in capsys.readouterr().out
    assert committed_steps(checkpoints_of(config.run_path)) == [3, 5, 8]


def test_without_the_settings_only_the_newest_stay(tmp_path: Path) -> None:
    config = config_of(tmp_path, [{"steps": 3}, {"steps": 3}], checkpoint={"every_steps": 1, "keep": 2})
    assert start(config)
    assert committed_steps(checkpoints_of(config.run_path)) == [5, 6]


@pytest.mark.parametrize("cut", ["before", "between", "after"])
def test_a_kill_while_a_step_is_committed_again_leaves_one_of_both(cut: str, tmp_path: Path) -> None:
    """A stop in a rollout writes the checkpoint of the step before once more; `cut` is the place in its commit."""
    for value in (1.0, 2.0):
        folder = tmp_path / f"{value}"
        save_checkpoint(folder, Checkpoint(5, {}, {"master.w": torch.full((3,), value)}), keep=1)
    folder, again = tmp_path / "1.0", tmp_path / "2.0"
    (again / "step_5").rename(folder / ".step_5.partial")
    if cut != "before":
        (folder / "step_5").rename(folder / ".step_5.removed")
    if cut == "after":
        (folder / ".step_5.partial").rename(folder / "step_5")
    remove_partials(folder)
    assert [path.name for path in folder.iterdir()] == ["step_5"]
    assert load_checkpoint(folder / "step_5").tensors["master.w"][0] == (1.0 if cut == "before" else 2.0)
