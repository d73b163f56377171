"""vLLM in a process of its own over loopback: the same promises, and what happens when that process dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

import httpx

from or1.config import VllmConfig
from or1.core.errors import EngineError
from or1.core.types import Prompt, Response, TrainSequence
from or1.dist.oom_retry import RowBudget
from or1.dist.world import SINGLE
from or1.rollout.engine import INTERRUPTED, Finished, Sampling, Slot
from or1.rollout.vllm.fleet import LeadingFleet
from or1.rollout.vllm.process import ServerProcess, bearer
from or1.rollout.vllm.push import BroadcastPush, FilePush, MappedPush, places_of
from or1.rollout.vllm.sending import Line, Unfinished
from or1.rollout.vllm.server import ServerEngine
from or1.rollout.vllm.setup import VllmSetup
from or1.rollout.vllm.streams import Part
from or1.rollout.vllm.worker import TOKEN_VARIABLE
from or1.train.rank_rows import Policy
from or1.train.score import with_old_logp

from .conftest import Side, prompts_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(500)]

ROOM = 12000
"""Most tokens of a response: so many that none ends by itself while the test's own thread waits for a CPU."""


@pytest.fixture(scope="module")
def side(start: Callable[..., Side], checkpoint: Callable[..., Path]) -> Side:
    """Start an engine for a tied model: its lm_head is the weight that servers most easily miss."""
    # A number and a table, as words of the server's command line.
    extra = {"max_num_batched_tokens": ROOM + 1000, "additional_config": {"made": [1]}}
    made = start(checkpoint(True), engine="vllm", vllm={"placement": "server", "engine": extra}, max_response=ROOM)
    assert isinstance(made.engine, ServerEngine) and isinstance(made.engine._push, FilePush)
    return made


def next_version(side: Side) -> int:
    side.engine.update_weights(side.engine.version + 1)
    return side.engine.version


def test_log_probs_agree_after_each_push_through_a_file(side: Side) -> None:
    check_pushes(side)


def test_log_probs_agree_after_each_push_by_broadcast(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small buckets, so that a weight takes several.
    push = BroadcastPush(side.engine.url, workers=1, backend="gloo", limit=4096)
    monkeypatch.setattr(side.engine, "_push", push)
    check_pushes(side)
    push.close()


def test_log_probs_agree_after_each_push_through_mapped_memory(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    assert places_of(side.engine._rpc, torch.device("cpu")) == [{"gpu": None, "refused": None}]
    push = MappedPush(workers=1, limit=4096)
    monkeypatch.setattr(side.engine, "_push", push)
    check_pushes(side)
    push.close()


def check_pushes(side: Side) -> None:
    # Several cache blocks a prompt, so that a prefix cache that was not dropped shows.
    prompts = prompts_of(3, length=100)
    kept = {name: p.clone() for name, p in side.model.named_parameters()}
    for update in range(5):
        side.generate(prompts)
        side.disturb(update)
        with torch.no_grad():
            side.model.get_output_embeddings().weight *= -1.05
        version = next_version(side)
        found = side.generate(prompts, seed=update)
        assert {f.response.version for f in found} == {version}
        assert side.drift(prompts, found) < 1e-4
    with torch.no_grad():
        for name, p in side.model.named_parameters():
            p.copy_(kept[name])
    next_version(side)


def test_responses_are_whole_and_a_function_of_their_seed(side: Side) -> None:
    prompts, eos = prompts_of(4), side.tokenizer.eos_token_id
    first, again, other = side.generate(prompts), side.generate(prompts), side.generate(prompts, seed=6)
    texts = [[f.response.text for f in found] for found in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 4
    for f in first:
        ids = f.response.token_ids.tolist()
        assert f.response.finish == ("stop" if eos in ids else "length")
        assert ids.index(eos) == len(ids) - 1 if eos in ids else len(ids) == 24


def test_a_straggler_is_aborted_at_the_deadline(side: Side) -> None:
    prompts = prompts_of(4)
    # Both pushes around it must wait until vLLM has let go of what was aborted.
    with side.endless():
        began = time.monotonic()
        found = side.generate(prompts, max_tokens=2000, samples=16, deadline_s=1.0)
        assert time.monotonic() - began < 20
        assert len(found) == 64 and {f.response.finish for f in found} == {"deadline"}
        assert all(f.response.truncated and len(f.response.token_ids) == len(f.response.logp) < 2000 for f in found)
    assert side.drift(prompts, side.generate(prompts)) < 1e-4


def test_a_stop_hands_over_the_tokens_so_far(side: Side) -> None:
    prompts = prompts_of(2)
    with side.endless():
        sampling = Sampling(1.0, 2000, 4, 3, stop=lambda: any(len(each.tokens) > 20 for each in call._waiting.values()))
        call = side.engine.generate(prompts, sampling)
        found = list(call)
        assert len(found) == 8 and {f.response.finish for f in found} == {INTERRUPTED}
        assert any(0 < len(f.response.token_ids) == len(f.response.logp) < 2000 for f in found)


def test_responses_go_on_under_the_next_policy(side: Side) -> None:
    prompts = prompts_of(4)
    sampling = Sampling(1.0, 40, 4, 3, new_tokens=10)
    first = {(f.prompt, f.sample): f.response for f in side.engine.generate(prompts, sampling)}
    begun = {slot: r for slot, r in first.items() if r.finish == "length"}
    old, new = side.engine.version, next_version(side)
    second = {(f.prompt, f.sample): f.response for f in side.engine.generate(prompts, sampling, begun)}
    assert second.keys() == begun.keys() != set()
    for slot, response in second.items():
        assert response.token_ids[:10].tolist() == begun[slot].token_ids.tolist()
        assert response.token_versions.tolist() == [old] * 10 + [new] * (len(response.token_ids) - 10)


class InBackground(threading.Thread):
    """A call of `generate` in a thread of its own, whose responses end when the test says so.

    A test may not depend on how far the server is at a moment of the test's thread. vLLM's engine and its worker are
    busy on both cores, so a thread of the test waits for a CPU for seconds.
    """

    def __init__(self, side: Side, prompts: list[Prompt], **settings: Any):
        super().__init__()
        self.found: list[Finished] = []
        self.error: Exception | None = None
        self.ended = threading.Event()
        sampling = Sampling(**({"temperature": 1.0, "max_tokens": ROOM, "stop": self.ended.is_set} | settings))
        self.total, self.call = len(prompts) * sampling.samples, side.engine.generate(prompts, sampling)
        self.start()

    def run(self) -> None:
        try:
            self.found += self.call
        except EngineError as error:
            self.error = error

    def await_tokens(self, count: int = 40, since: int | None = None) -> dict[Slot, Response | None]:
        """Wait until every response has tokens, and one so many; return the parts before the last push.

        since  version of the tokens before the last push; None: there was none
        """
        seen = 0
        while True:
            assert self.is_alive(), self.error or [(f.response.finish, len(f.response.token_ids)) for f in self.found]
            each = [(u.job.slot, u.job.unfinished, len(u.tokens)) for u in dict(self.call._waiting).values()]
            versions = {None if before is None else before.version for _, before, _ in each}
            lengths = [length for *_, length in each]
            reached = len(each) == self.total and versions == {since} and min(lengths) > 0 and max(lengths) >= count
            # Twice, because the call's thread may be between two statements of `Unfinished.freeze`.
            seen = seen + 1 if reached else 0
            if seen == 2:
                return {slot: before for slot, before, _ in each}
            time.sleep(0.01)

    def end(self) -> list[Finished]:
        """Return the responses, cut here."""
        self.ended.set()
        self.join(100)
        assert not self.is_alive() and self.error is None, self.error
        assert len(self.found) == self.total and {f.response.finish for f in self.found} == {INTERRUPTED}
        return sorted(self.found)


def scored(side: Side, prompts: list[Prompt], found: list[Finished]) -> list[np.ndarray]:
    """Return log-probs of all tokens by the trainer's present weights."""
    rows = [TrainSequence(prompts[f.prompt].token_ids, f.response.token_ids, f.response.logp, 0.0) for f in found]
    return [each.old_logp for each in with_old_logp(Policy(side.model, RowBudget(2 * ROOM), 1.0), rows)]


def test_weights_change_in_the_middle_of_responses_and_every_token_keeps_its_version(side: Side) -> None:
    prompts = prompts_of(6)
    with side.endless():
        first, by_version = side.engine.version, {}
        calls = [
            InBackground(side, prompts, samples=2, seed=3),
            InBackground(side, prompts_of(2, seed=1), samples=2, seed=4),
        ]
        since, weights, before = None, {}, {}
        for update in range(3):
            version = side.engine.version
            began, _ = (call.await_tokens(since=since) for call in calls)
            weights[version] = {name: p.clone() for name, p in side.model.named_parameters()}
            for slot, earlier in before.items():
                assert began[slot].token_ids[: len(earlier.token_ids)].tolist() == earlier.token_ids.tolist()
            if update < 2:
                since, before = version, began if update else {}
                side.disturb(update, scale=0.02)
                next_version(side)
        found, others = (call.end() for call in calls)
        assert [f[:2] for f in found] == [(p, s) for p in range(6) for s in range(2)] and len(others) == 4
        for version, tensors in weights.items():
            with torch.no_grad():
                for name, p in side.model.named_parameters():
                    p.copy_(tensors[name])
            by_version[version] = scored(side, prompts, found)
    versions = [f.response.token_versions for f in found]
    assert all(set(v) == {first, first + 1, first + 2} and (np.diff(v) >= 0).all() for v in versions)
    assert all(
        len(f.response.token_ids) == len(f.response.logp) == len(v) for f, v in zip(found, versions, strict=True)
    )
    drifts = []
    for own, others_ in ((0, False), (1, True)):
        # By the weights that sampled each token, and by those one version later: only the first agree.
        picked = [
            np.abs(by_version[min(version + own, first + 2)][i][at] - f.response.logp[at])
            for i, f in enumerate(found)
            for version in weights
            if (at := versions[i] == version).any()
        ]
        drifts.append(max(float(each.max()) for each in picked))
        assert others_ or drifts[0] < 1e-4
    assert drifts[1] > 0.01, "the versions do not differ enough for this test"
    seen = [tuple(f.response.token_ids.tolist()) for f in found]
    assert len(set(seen)) == len(seen)


def test_a_death_in_flight_keeps_the_tokens_of_older_weights(side: Side) -> None:
    prompts = prompts_of(4)
    with side.endless():
        first, starts = side.engine.version, side.engine.starts
        calls = [InBackground(side, prompts, samples=2, seed=seed) for seed in (1, 2)]
        for call in calls:
            call.await_tokens()
        next_version(side)
        kept = [call.await_tokens(since=first) for call in calls]
        os.kill(core_of(side.engine.process), signal.SIGKILL)
        while [line.starts for line in side.engine.lines] != [starts + 1] * 2:
            assert all(call.is_alive() for call in calls), [call.error for call in calls]
            time.sleep(0.05)
        for call in calls:
            call.await_tokens(since=first)
        found = [call.end() for call in calls]
        assert side.engine.starts == starts + 1, "restarted once, whatever the number of calls"
        drift = max(
            float(np.abs(logp - f.response.logp)[f.response.token_versions > first].max())
            for fs in found
            for f, logp in zip(fs, scored(side, prompts, fs), strict=True)
        )
        next_version(side)
    for before, after in zip(kept, found, strict=True):
        assert len(after) == len(before) == 8
        for f in after:
            old, versions = before[f[:2]], f.response.token_versions.tolist()
            assert f.response.token_ids[: len(old.token_ids)].tolist() == old.token_ids.tolist()
            assert versions == [first] * len(old.token_ids) + [first + 1] * (len(versions) - len(old.token_ids))
    assert drift < 1e-4


def kill_at_first_part(monkeypatch: pytest.MonkeyPatch, url: str, kill: Callable[[], object]) -> None:
    """Call `kill` when the first tokens of the server at `url` arrive, before they are noted."""
    note, killed = Line.note, threading.Event()

    def noting(line: Line, part: Part) -> None:
        if line.server.url == url and not killed.is_set():
            killed.set()
            kill()
        note(line, part)

    monkeypatch.setattr(Line, "note", noting)


def test_two_servers_share_the_responses_and_one_may_die(
    side: Side, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, prompts = side.engine, prompts_of(6)
    alone = side.generate(prompts)
    # A second server as `or1 serve` starts one, with the same token.
    monkeypatch.setattr("or1.rollout.vllm.process.secrets.token_hex", lambda count: first.address.token)
    monkeypatch.setenv(TOKEN_VARIABLE, first.address.token)
    second = ServerProcess(first.setup, None, tmp_path / "log")
    second.await_ready()
    sent: dict[str, int] = {}
    send = Line.send

    def counted(line: Line, each: Unfinished) -> None:
        sent[line.server.url] = sent.get(line.server.url, 0) + 1
        send(line, each)

    monkeypatch.setattr(Line, "send", counted)
    settings = VllmConfig(placement="server", url=(first.url, second.url))
    fleet = LeadingFleet(SINGLE, first.setup, settings, side.model, side.tokenizer, tmp_path)
    both = Side(side.config, side.model, side.tokenizer, fleet)
    found = both.generate(prompts)
    assert [f.response.token_ids.tolist() for f in found] == [f.response.token_ids.tolist() for f in alone]
    assert sent.keys() == {first.url, second.url} and sum(sent.values()) == 24
    side.disturb(1)
    fleet.update_weights(1)
    assert fleet.metrics() == {"rollout/servers": 2.0} and both.drift(prompts, both.generate(prompts)) < 1e-4

    with side.endless():
        fleet.update_weights(2)
        call = InBackground(both, prompts, samples=2, seed=3)
        call.await_tokens()
        side.disturb(2, scale=0.02)
        fleet.update_weights(3)
        call.await_tokens(since=2)
        found = call.end()
        assert len(found) == 12
        for f, logp in zip(found, scored(side, prompts, found), strict=True):
            old, new = (int((f.response.token_versions == version).sum()) for version in (2, 3))
            assert f.response.token_versions.tolist() == [2] * old + [3] * new and old > 0 and new > 0
            assert np.abs(logp - f.response.logp)[old:].max() < 1e-4
        kill_at_first_part(monkeypatch, second.url, second.close)
        found = both.generate(prompts, max_tokens=200, samples=4)
    assert len(found) == 24 and {len(f.response.token_ids) for f in found} == {200}
    assert f"vLLM at {second.url}" in (told := capsys.readouterr().err) and "The other 1 of 2 servers go on" in told
    fleet.update_weights(4)
    assert fleet.metrics() == {"rollout/servers": 1.0} and both.drift(prompts, both.generate(prompts)) < 1e-4
    assert f"version 4 of the weights is not at {second.url}" in capsys.readouterr().err
    fleet.close()
    next_version(side)


def test_a_push_cut_midway_never_advances_the_version(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    before, push = side.engine.version, side.engine._push
    send = push.send

    def cut(rpc: Callable, model: torch.nn.Module, version: int) -> list:
        def damaged(method: str, **arguments: object) -> list:
            size = push.path.stat().st_size
            os.truncate(push.path, size // 2)
            return rpc(method, **arguments)

        return send(damaged, model, version)

    monkeypatch.setattr(push, "send", cut)
    with pytest.raises(EngineError):
        side.engine.update_weights(before + 1)
    assert side.engine.version == before
    prompts = prompts_of(2)
    with pytest.raises(EngineError, match="no complete set of weights"):
        side.generate(prompts)
    monkeypatch.undo()
    assert next_version(side) == before + 1
    assert side.drift(prompts, side.generate(prompts)) < 1e-4


def test_nobody_without_the_token_is_served(side: Side) -> None:
    for path in ("/collective_rpc", "/v1/completions", "/reset_prefix_cache", "/health"):
        assert httpx.post(side.engine.url + path, json={}).status_code == 401
        assert httpx.post(side.engine.url + path, json={}, headers=bearer("guess")).status_code == 401


def core_of(process: ServerProcess) -> int:
    """Return the process in vLLM's group that computes: the deepest below the server."""
    children = subprocess.run(["ps", "-eo", "pid,pgid,comm"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in children.splitlines()[1:]]
    group = {int(pid): name for pid, pgid, name in rows if int(pgid) == process.pid}
    return next(pid for pid, name in group.items() if "EngineCor" in name)


@pytest.mark.parametrize("victim", ["server", pytest.param("core", marks=pytest.mark.nightly)])
def test_a_death_in_the_middle_is_noticed_and_repaired_once(
    side: Side, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, process, starts = prompts_of(8), side.engine.process, side.engine.starts
    next_version(side)
    died: list[float] = []
    noticed: list[float] = []
    restart = side.engine._restart

    def noting() -> None:
        noticed.append(time.monotonic())
        restart()

    def kill() -> None:
        os.kill(process.pid if victim == "server" else core_of(process), signal.SIGKILL)
        died.append(time.monotonic())

    monkeypatch.setattr(side.engine, "_restart", noting)
    kill_at_first_part(monkeypatch, side.engine.url, kill)
    with side.endless():
        version = side.engine.version
        # So long that the server cannot be done before this process, which waits for a CPU, reads the first part.
        found = list(side.engine.generate(prompts, Sampling(1.0, 1600, 2, 1)))
        drift = side.drift(prompts, found)
    assert len(died) == len(noticed) == 1 and noticed[0] - died[0] < 30 and side.engine.starts == starts + 1
    print(f"{victim}: noticed after {noticed[0] - died[0]:.1f} s, whole again after {time.monotonic() - died[0]:.0f} s")
    assert {(f.prompt, f.sample) for f in found} == {(p, s) for p in range(8) for s in range(2)} and len(found) == 16
    assert all(f.response.finish == "length" and len(f.response.token_ids) == 1600 for f in found)
    assert {f.response.version for f in found} == {version}
    assert drift < 1e-4


def test_a_death_between_rollouts_is_repaired_by_the_next_push(side: Side) -> None:
    os.kill(side.engine.process.pid, signal.SIGKILL)
    prompts = prompts_of(2)
    next_version(side)
    assert side.drift(prompts, side.generate(prompts)) < 1e-4


def test_a_second_death_in_the_same_call_ends_it_with_a_remedy(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, process = prompts_of(2), side.engine.process

    def restart_in_vain() -> None:
        # As if the fresh server died at once: what is there is the dead one.
        assert not process.alive()

    monkeypatch.setattr(side.engine, "_restart", restart_in_vain)
    process.close()
    with pytest.raises(EngineError, match=r"4 responses were open.*newest checkpoint"):
        side.generate(prompts, samples=2)
    monkeypatch.undo()
    assert len(side.generate(prompts, samples=2)) == 4
    assert side.drift(prompts, side.generate(prompts)) < 1e-4


def test_the_server_ends_with_its_trainer(side: Side, tmp_path: Path) -> None:
    trainer = (
        "import os, sys, time; from pathlib import Path; from or1.rollout.vllm.process import ServerProcess;"
        "from or1.rollout.vllm.setup import VllmSetup;"
        "setup = VllmSetup('.', 'float32', 8, 1, False, 1, 0.5, False, True, ());"
        "process = ServerProcess(setup, None, Path(sys.argv[1])); print(process.pid, flush=True);"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", trainer, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        server = int(process.stdout.readline())
        os.kill(server, 0)
        time.sleep(0.5)
        process.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and _runs(server):
        time.sleep(0.1)
    assert not _runs(server)


def _runs(pid: int) -> bool:
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    setup = VllmSetup(str(tmp_path / "nothing"), "float32", 8, 1, False, 1, 0.5, False, True, ())
    process = ServerProcess(setup, None, tmp_path / "log")
    with pytest.raises(EngineError, match=r"ended before it was ready; the end of .*log"):
        process.await_ready()
