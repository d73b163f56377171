"""A stop during a rollout, checkpoints by time, and checkpoints that stay; the clocks are not real."""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from or1.config import Config
from or1.core.types import Prompt, Response, Score, Status
from or1.dist.watchdog import Watchdog
from or1.dist.world import SINGLE
from or1.report.rank_display import RankDisplay
from or1.run.checkpoint import committed_steps, read_manifest, step_folder
from or1.run.directory import checkpoints_of
from or1.train.build import build
from or1.trainer import Trainer
from tests.helpers.hand_run import config_of

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


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.8])
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
    assert at == len(learnt(config)) - 1 + (share == 0.02) or at == learnt(config)[-1]["step"]
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


@pytest.mark.parametrize("share", [0.15, 0.3, 0.45, 0.6, 0.75, 0.9])
def test_a_stop_while_rejected_groups_are_replaced_changes_nothing(share: float, tmp_path: Path) -> None:
    settings = SETTINGS | {"loss": {"refill_rounds": 3}}
    stage = STAGE | {"steps": 2, "group_size": 2}
    looks = StopAt(10**9)
    whole = config_of(tmp_path / "whole", [stage], **settings) if (tmp_path / "whole").mkdir() is None else None
    assert whole is not None and start(whole, looks)
    (tmp_path / "cut").mkdir()
    config = config_of(tmp_path / "cut", [stage], **settings)
    assert not start(config, StopAt(int(share * (10**9 - looks.left))))
    assert start(config)
    assert learnt(config) == learnt(whole)
