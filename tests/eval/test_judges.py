"""`or1 filter --judge` against servers that play the judges: votes, faults of servers, resume, and what is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from or1.cli import main
from or1.config import JudgeConfig
from or1.core.types import Prompt
from or1.eval.judges import read_question, vote_of
from or1.rollout import chat_client
from or1.rollout.chat_client import Reply

PROBLEMS = ["Find 1+1.", "Find 2+?.", "Find the half-clear 3.", "Find 4 in a babble."]


class Judge(ThreadingHTTPServer):
    """A server with one model. Its answers depend on the problem and on how often it was asked about the problem."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.lock = model, threading.Lock()
        self.asked: Counter[str] = Counter()
        self.seeds: list[tuple[str, int]] = []
        self.keys: set[str | None] = set()
        self.faults: list[tuple[int, dict[str, str], bytes]] = []
        self.broken_after = 10**9
        self.refused = "nothing"
        self.delay_s, self.together, self.most_together = 0.0, 0, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answer(self, request: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        assert request["model"] == self.model
        question = request["messages"][0]["content"]
        problem = next(text for text in PROBLEMS if text in question)
        with self.lock:
            if self.faults:
                return self.faults.pop()
            if sum(self.asked.values()) >= self.broken_after:
                return 401, {}, b"the key has expired"
            if self.refused in problem:
                return 400, {}, b"too long"
            nth = self.asked[problem]
            self.asked[problem] += 1
            self.seeds.append((problem, request["seed"]))
        verdict = {0: "valid", 1: "invalid", 2: "valid" if nth % 2 else "invalid"}.get(PROBLEMS.index(problem))
        text = f"I see no fault.\n\n**Verdict:** {verdict}." if verdict else "Hm. " * 99
        message: dict[str, Any] = {"content": text}
        if nth == 0:
            message["reasoning_content"] = "Verdict: invalid? No."
        body = {"choices": [{"message": message, "finish_reason": "stop"}]}
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        return 200, {}, json.dumps({**body, "usage": usage}).encode()


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_GET(self) -> None:
        self.reply(200, {}, json.dumps({"data": [{"id": self.server.model}]}).encode())

    def do_POST(self) -> None:
        judge = self.server
        judge.keys.add(self.headers.get("Authorization"))
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.together += 1
            judge.most_together = max(judge.most_together, judge.together)
        if judge.delay_s:
            time.sleep(judge.delay_s)
        found = judge.answer(request)
        with judge.lock:
            judge.together -= 1
        self.reply(*found)

    def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def judges() -> Iterator[list[Judge]]:
    found = [Judge("llama"), Judge("qwen")]
    for judge in found:
        threading.Thread(target=judge.serve_forever, args=(0.01,), daemon=True).start()
    yield found
    for judge in found:
        judge.shutdown()
        judge.server_close()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": text, "answer": "2"}) + "\n" for text in PROBLEMS))
    text = (
        f'run_dir = "{tmp_path}/run"\n[model]\npath = "no/such/model"\n[data]\ntrain = "{data}"\nprompt_suffix = "!"\n'
    )
    path = tmp_path / "judge.toml"
    path.write_text(text + "[judge]\nconcurrency = 8\n")
    return path


def judge(config: Path, judges: list[Judge], *options: str) -> int:
    urls = [part for each in judges for part in ("--judge", each.url)]
    return main(["filter", str(config), *urls, *options])


def rows(config: Path) -> dict[str, dict[str, Any]]:
    return {row["prompt"]: row for row in pq.read_table(config.parent / "run" / "judged.parquet").to_pylist()}


def test_problems_are_kept_with_9_of_32_valid_votes(
    config: Path, judges: list[Judge], capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    assert judge(config, judges, "--set", "judge.price_in=[1, 2]", "--set", "judge.price_out=[10]") == 0
    found = rows(config)
    names = ("valid", "invalid", "unparsed", "refused", "valid_by_judge", "verdict")
    assert [[found[text][name] for name in names] for text in PROBLEMS] == [
        [32, 0, 0, 0, [16, 16], "kept"],
        [0, 32, 0, 0, [0, 0], "rejected"],
        [16, 16, 0, 0, [8, 8], "kept"],
        [0, 0, 32, 0, [0, 0], "undecided"],
    ]
    for each in judges:
        assert set(each.asked.values()) == {16} and each.keys == {"Bearer sk-1"}
        assert len(set(each.seeds)) == 64, "each vote has a seed of its own"
        assert 1 <= each.most_together <= 8
    said = capsys.readouterr().out
    assert "24 valid, 24 invalid, 16 unparsed, 0 refused of 64 votes, 64 of them new; 6,400 prompt and 640" in said
    assert "cost 0.01" in said and "cost 0.02" in said
    assert "4 problems: 2 kept, 1 rejected, 1 undecided; kept with at least 9 of 32 valid votes" in said


def test_no_vote_is_asked_for_twice(config: Path, judges: list[Judge], capsys: Any) -> None:
    judges[1].broken_after = 20
    assert judge(config, judges, "--set", "judge.votes=8") == 70
    assert "401 the key has expired" in capsys.readouterr().err
    judges[1].broken_after = 10**9
    few = ("--set", "judge.votes=8")
    assert judge(config, judges, *few) == 0
    assert [set(each.asked.values()) for each in judges] == [{8}, {8}]
    assert "votes are there from an earlier start" in capsys.readouterr().out
    before = rows(config)
    assert judge(config, judges, *few) == 0 and rows(config) == before
    assert judge(config, judges, "--set", "judge.votes=9") == 0
    assert [set(each.asked.values()) for each in judges] == [{9}, {9}], "one more vote of each judge is new"
    assert judge(config, judges[::-1], *few) == 0
    assert {text: row["valid"] for text, row in rows(config).items()} == {t: row["valid"] for t, row in before.items()}
    assert judge(config, judges, *few, "--fresh") == 0
    assert [set(each.asked.values()) for each in judges] == [{17}, {17}]


def test_faults_of_a_server_are_waited_for(config: Path, judges: list[Judge], monkeypatch: Any, capsys: Any) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(chat_client.time, "sleep", lambda s: pauses.append(s) if s else None)
    judges[0].faults = [(429, {"Retry-After": "7"}, b""), (500, {}, b"oh"), (503, {}, b""), (200, {}, b"<html>")]
    assert judge(config, judges[:1], "--set", "judge.concurrency=1", "--set", "judge.keep=3") == 0
    assert sorted(pauses) == [1, 2, 4, 7], "growing pauses, and the one that the server names"
    assert set(judges[0].asked.values()) == {16} and rows(config)[PROBLEMS[0]]["verdict"] == "kept"
    assert "attempt 2 of 9" in capsys.readouterr().err


def test_a_refused_request_is_asked_again_by_the_next_start(config: Path, judges: list[Judge], capsys: Any) -> None:
    judges[0].refused = "half-clear"
    assert judge(config, judges) == 0
    row = rows(config)[PROBLEMS[2]]
    assert (row["valid"], row["refused"], row["verdict"]) == (8, 16, "undecided")
    assert "16 requests were refused; the same command asks again" in capsys.readouterr().out
    judges[0].refused = "nothing"
    assert judge(config, judges) == 0 and rows(config)[PROBLEMS[2]]["verdict"] == "kept"
    judges[0].refused = "Find"
    assert judge(config, judges, "--set", "judge.max_tokens=7") == 70
    assert "400 too long" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_judge_resumes_where_it_was(config: Path, judges: list[Judge]) -> None:
    for each in judges:
        each.delay_s = 0.05
    command = [sys.executable, "-m", "or1", "filter", str(config)]
    command += [part for each in judges for part in ("--judge", each.url)]
    votes = config.parent / "run" / "judged.parquet.votes.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not votes.exists() or votes.read_bytes().count(b"\n") < 30:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = votes.read_bytes().count(b"\n") - 1
    assert 29 <= kept < 128
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    asked = sum(sum(each.asked.values()) for each in judges)
    assert asked <= 128 + 8, "only the 8 requests on their way at the kill are asked again"
    assert rows(config)[PROBLEMS[0]]["valid"] == 32
    assert len(pq.read_table(config.parent / "run" / "judged.parquet")) == 4


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("Verdict: valid", "valid"),
        ("It is not invalid.\n**Verdict: Valid**\n", "valid"),
        ("Verdict: valid. No, wait.\nVERDICT:  INVALID.", "invalid"),
        ("<think>Verdict: invalid</think>Verdict: valid", "valid"),
        (" Invalid. ", "invalid"),
        ("It is valid, I think", "unparsed"),
        ("Verdict: validity unclear", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_votes(text: str, vote: str) -> None:
    assert vote_of(Reply(text, "stop", 1, 1)) == vote
    assert vote_of(Reply(text, "length", 1, 1)) == "unparsed"


def test_a_question_of_ones_own(tmp_path: Path) -> None:
    (path := tmp_path / "q.txt").write_text("P: {problem} A: {answer} {other}")
    prompt = Prompt("a:1", "a", "What is {answer}?", np.empty(0, np.int32), ("2", "two"))
    assert read_question(str(path))(prompt) == "P: What is {answer}? A: 2 or two {other}"
    assert "What is {answer}?\n</problem>" in read_question(None)(prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--judge", "http://x/v1", "--server", "http://x/v1"], "give one of them"),
        (["--judge", "ftp://x"], "judge.url.0"),
        (["--judge", "http://x/v1", "--set", "judge.keep=17"], "17 valid votes cannot be reached by 1 judges"),
        (["--judge", "http://x/v1", "--set", "judge.model=['a','b']"], "has 2 values for 1 judges"),
        (["--judge", "http://x/v1", "--set", "judge.price_in=[1]"], "needs judge.price_out too"),
        (["--judge", "http://x/v1", "--set", "judge.prompt=none.txt"], "no file"),
        (
            ["--judge", "http://x/v1", "--set", "judge.prompt={config}", "--set", "judge.model=['m']"],
            "has no {problem}",
        ),
        (["--judge", "http://x/v1", "--judge", "http://y/v1", "--set", "judge.model=['m', 'm']"], "two judges are"),
    ],
)
def test_what_cannot_be_judged_is_refused(options: list[str], message: str, config: Path, capsys: Any) -> None:
    given = [text.replace("{config}", str(config)) for text in options]
    assert main(["filter", str(config), *given]) != 0
    assert message in capsys.readouterr().err


def test_each_judge_has_its_server() -> None:
    found = JudgeConfig(url=("http://a", "http://b"), model=("m", "n"), key_env=("A", "B"), retries=2).endpoints()
    assert [(each.url, each.model, each.key_env, each.retries) for each in found] == [
        ("http://a", "m", "A", 2),
        ("http://b", "n", "B", 2),
    ]
