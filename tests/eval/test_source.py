"""What `or1 eval` and `or1 filter` stand on: parts on disk, an OpenAI-compatible server, targets."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from or1.commands.eval import run_evaluation
from or1.commands.filter import run_filter
from or1.config import Config, EndpointConfig
from or1.config.load import load_config
from or1.core.errors import ConfigError, EndpointError, StoreError
from or1.core.types import Prompt
from or1.eval.evaluation import weights_lines
from or1.eval.source import Source
from or1.eval.store import PartStore
from or1.eval.target import Target, resolve_target
from or1.reward.custom import file_of
from or1.rollout.endpoint import EndpointEngine
from or1.rollout.engine import Sampling

SCHEMA = pa.schema({"x": pa.int64()})


def store(folder: Path, size: int = 2, **settings: object) -> PartStore:
    return PartStore(folder / "parts", folder / "all.parquet", settings, SCHEMA, size)


def values(of: PartStore) -> list[list[int]]:
    return [table["x"].to_pylist() for table in of.tables()]


def test_parts_survive_and_half_written_ones_do_not(tmp_path: Path) -> None:
    first = store(tmp_path, model="m")
    for index in (2, 0, 1):
        first.write(index, [{"x": index}, {"x": 10 + index}])
    (tmp_path / "parts" / "part_000003.partial").write_bytes(b"PAR1")
    whole = (tmp_path / "parts" / "part_000001.parquet").read_bytes()
    (tmp_path / "parts" / "part_000001.parquet").write_bytes(whole[:-20])
    # Another size does not matter: the parts keep the meaning they were made with.
    again = store(tmp_path, size=7, model="m")
    assert again.size == 2 and [index in again for index in range(4)] == [True, False, True, False]
    again.write(1, [{"x": 1}, {"x": 11}])
    again.merge()
    assert values(again) == [[0, 10], [1, 11], [2, 12]]
    merged = store(tmp_path, model="m")
    assert 1 in merged and 99 in merged and values(merged) == [[0, 10], [1, 11], [2, 12]]
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["settings.json"]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    store(tmp_path, model="m", samples=4)
    with pytest.raises(StoreError, match=r"other settings \(samples, seed\); choose another folder with --out"):
        store(tmp_path, model="m", samples=8, seed=1)


class Server(ThreadingHTTPServer):
    """Answers as vLLM does: `17+5` is thought about and added, every third request is first refused."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.asked, self.refused, self.broken = threading.Lock(), [], 0, False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "adder"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((body, self.headers.get("Authorization")))
            refuse = len(self.server.asked) % 3 == 0
            self.server.refused += refuse
        if self.server.broken:
            return self.reply(400, {"error": "max_tokens is too large"})
        if refuse:
            return self.reply(503, {"error": "busy"}, retry_after="0")
        a, b = body["messages"][-1]["content"].rstrip("=").split("+")
        answer = int(a) + int(b) + (body["seed"] % 2)
        message = {"role": "assistant", "reasoning_content": "hm", "content": f"\\boxed{{{answer}}}"}
        if a == "0":
            message, finish = {"role": "assistant", "reasoning_content": "hm", "content": None}, "length"
        else:
            finish = "stop"
        choice = {"index": 0, "message": message, "finish_reason": finish}
        return self.reply(200, {"choices": [choice], "usage": {"completion_tokens": 7}})

    def reply(self, code: int, body: object, retry_after: str | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        if retry_after is not None:
            self.send_header("Retry-After", retry_after)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running
        running.shutdown()


def ask(text: str) -> Prompt:
    return Prompt(text, "s", text, np.empty(0, np.int32), ("1",), messages=({"role": "user", "content": text},))


def test_every_response_comes_once_through_refusals(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADDER_KEY", "secret")
    engine = EndpointEngine(EndpointConfig(url=server.url + "/", concurrency=4, key_env="ADDER_KEY"))
    assert engine.model == "adder"
    sampling = Sampling(0.7, 32, 5, seed=3, top_p=0.9)
    found = list(engine.generate([ask("17+5"), ask("0+1")], sampling))
    assert Counter((f.prompt, f.sample) for f in found) == Counter((p, s) for p in range(2) for s in range(5))
    added = [f.response for f in found if f.prompt == 0]
    assert {r.text for r in added} <= {"<think>hm</think>\\boxed{22}", "<think>hm</think>\\boxed{23}"}
    assert all(len(r.token_ids) == 7 and not r.truncated for r in added)
    assert all(f.response.truncated and f.response.text == "<think>hm" for f in found if f.prompt == 1)
    assert server.refused == len(server.asked) - 10 > 0
    body, key = server.asked[0]
    assert (body["max_tokens"], body["temperature"], body["top_p"], key) == (32, 0.7, 0.9, "Bearer secret")
    again = list(engine.generate([ask("17+5")], sampling))
    assert sorted((f.sample, f.response.text) for f in again) == sorted(
        (f.sample, f.response.text) for f in found if f.prompt == 0
    )


def test_what_will_not_pass_ends_at_once_with_the_servers_words(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.broken = True
    engine = EndpointEngine(EndpointConfig(url=server.url, retries=5))
    with pytest.raises(EndpointError, match=r"failed after 1 attempts: 400 .*max_tokens is too large"):
        list(engine.generate([ask("1+1")], Sampling(1.0, 8, 1, seed=0)))
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(EndpointError, match="failed after 1 attempts"):
        EndpointEngine(EndpointConfig(url=url, retries=0, timeout_s=2))
    capsys.readouterr()
    with pytest.raises(EndpointError, match="failed after 2 attempts"):
        EndpointEngine(EndpointConfig(url=url, retries=1, timeout_s=2))
    assert f"{url}/models: URLError" in (said := capsys.readouterr().err) and "attempt 2 of 2 in 1 s" in said


RECIPE = """
run_dir = "{run_dir}"
[model]
path = "no/such/model/needed"
[reward]
require_think_close = true
[data]
train = "{data}"
[eval]
max_response_tokens = 32
[filter]
samples = 6
max_response_tokens = 32
[[eval.sets]]
name = "sums"
path = "{data}"
samples = 4
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    data = tmp_path / "sums.jsonl"
    sources = ("even", "odd")
    rows = [{"question": f"{n}+{n}=", "answer": str(2 * n), "data_source": sources[n % 2]} for n in range(9)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(run_dir=tmp_path / "run", data=data))
    return path


@pytest.mark.slow
def test_a_server_is_evaluated_and_filtered_with(
    server: Server, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = resolve_target(server.url, str(recipe), ["reward.workers=1"], None)
    report = run_evaluation(target)["sets"]["sums"]
    rows = pq.read_table(target.out / "transcripts" / "sums.parquet").to_pylist()
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [
        (f"sums.jsonl:{n}", s) for n in range(1, 10) for s in range(4)
    ]
    assert report["avg@4"] == pytest.approx(np.mean([row["reward"] for row in rows])) and 0 < report["avg@4"] < 1
    assert report["statuses"]["truncated"] == 4 and report["truncated"] == pytest.approx(1 / 9)
    assert report["graded"] == report["no_think_close"] == 0 and report["reward_mean"] == report["avg@4"]
    assert set(report["by_source"]) == {"odd", "even"} and report["by_source"]["even"]["problems"] == 5
    assert {"pass@1", "pass@2", "pass@4"} <= report.keys() and report["pass@1"] == pytest.approx(report["avg@4"])
    asked = len(server.asked)
    assert run_evaluation(target)["sets"]["sums"] == report and len(server.asked) == asked
    out = capsys.readouterr().out
    assert "reward" not in out and "pass@k" in out and "odd" in out and str(target.out / "eval.json") in out

    config = load_config(recipe, [f'endpoint.url="{server.url}"', "reward.workers=1"], "filter")
    counts = pq.read_table(run_filter(config)).to_pylist()
    assert [row["prompt_id"] for row in counts] == [f"sums.jsonl:{n}" for n in range(1, 10)]
    assert counts[0]["truncated"] == 6 and counts[0]["passes"] == 0
    assert all(row["pass_rate"] == row["passes"] / 6 for row in counts) and any(0 < row["passes"] < 6 for row in counts)
    assert "keep_difficulty = [1, 5] keeps" in capsys.readouterr().out


REWARD = """
def reward(completions, points, **kwargs):
    return [float({pays}) for _ in completions]
"""


def test_scores_of_a_changed_function_or_column_are_not_used_again(
    server: Server, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    function, data = tmp_path / "rewards.py", tmp_path / "sums.jsonl"
    rows = [{"question": f"{n}+{n}=", "answer": str(2 * n), "points": n % 2} for n in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [f'reward.kind="{function}:reward"', "reward.require_think_close=false", "reward.workers=1"]

    def average(pays: str, fresh: bool = False) -> float:
        function.write_text(REWARD.format(pays=pays))
        target = resolve_target(server.url, str(recipe), overrides, None)
        return run_evaluation(target, fresh)["sets"]["sums"]["avg@4"]

    assert average("points[0]") == pytest.approx(1 / 3)
    assert "there already" not in capsys.readouterr().out
    assert average("points[0]") == pytest.approx(1 / 3)
    assert "sums: 12 of 12 responses were there already" in capsys.readouterr().out
    with pytest.raises(StoreError, match=r"other settings \(reward_file\)"):
        average("1")
    data.write_text("".join(json.dumps(row | {"points": 1}) + "\n" for row in rows))
    with pytest.raises(StoreError, match=r"other settings \(problems\)"):
        average("points[0]")
    assert average("points[0]", fresh=True) == 1.0


@pytest.mark.slow
def test_a_graded_reward_leads_the_table_with_its_mean(
    server: Server, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rewards.py").write_text("def reward(completions, **kwargs):\n    return [0.25]\n")
    overrides = [f'reward.kind="{tmp_path / "rewards.py"}:reward"', "reward.require_think_close=false"]
    target = resolve_target(server.url, str(recipe), [*overrides, "reward.workers=1"], None)
    report = run_evaluation(target)["sets"]["sums"]
    assert (report["reward_mean"], report["reward_mean_ci95"], report["graded"], report["avg@4"]) == (0.25, 0, 1, 0)
    (title,) = [line for line in capsys.readouterr().out.splitlines() if "problems" in line and "avg@k" in line]
    assert title.split()[1:4] == ["problems", "reward", "avg@k,"]


def test_a_function_is_found_in_its_file_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "rewards_for_tests" / "deep"
    package.mkdir(parents=True)
    (package / "own.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert file_of("rewards_for_tests.deep.own:f") == file_of(f"{package}/own.py:f") == package / "own.py"
    assert file_of("rewards_for_tests.absent:f") is None and file_of(f"{package}/absent.py:f") is None


def test_targets_are_told_apart(recipe: Path, adder: Path, tmp_path: Path) -> None:
    found = resolve_target(str(adder), str(recipe), [], None)
    assert found.config.model.path == str(adder) and found.out == tmp_path / "run" / "eval" / "tiny-adder"
    with pytest.raises(ConfigError, match=r"add --config with a TOML file"):
        resolve_target(str(adder), None, [], None)
    with pytest.raises(ConfigError, match=r"no run and no checkpoint"):
        resolve_target(str(tmp_path), str(recipe), [], None)
    with pytest.raises(ConfigError, match=r"--step 3 is for a run directory"):
        resolve_target(str(adder), str(recipe), [], 3)
    direct = resolve_target(str(recipe), None, [f'model.path="{adder}"'], None)
    assert isinstance(direct, Target) and direct.out == tmp_path / "run" / "eval" / "recipe"


@pytest.mark.parametrize(
    ("verb", "overrides", "where"),
    [
        ("train", [], "stage"),
        ("train", ['endpoint.url="http://x"'], "endpoint.url"),
        ("train", ["data.keep_difficulty=[1, 3]"], "data.keep_difficulty"),
        ("train", ["data.keep_difficulty=[3, 1]", 'data.difficulty_model="m"'], "data.keep_difficulty"),
        ("train", ['data.difficulty_file="none.parquet"'], "data.difficulty_file"),
        ("filter", ["data.train=[]"], "data.train"),
        ("filter", ['data.mix=[{path="none"}]'], "data.mix"),
        ("filter", ["filter={}"], "filter.max_response_tokens"),
        ("eval", ["eval.sets=[]"], "eval.sets"),
        ("eval", ["eval.max_response_tokens=0"], "eval.max_response_tokens"),
    ],
)
def test_each_verb_says_what_it_needs(recipe: Path, verb: str, overrides: list[str], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides, verb)
    assert where in {problem.path for problem in caught.value.problems}


def test_recipes_of_evaluations_are_whole_but_for_their_data(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    recipes = sorted((root / "examples" / "recipes").glob("eval-*.toml"))
    assert len(recipes) >= 4
    for path in recipes:
        try:
            load_config(path, verb="eval")
        except ConfigError as error:
            assert all(p.path.endswith(".path") and "no file 'data/" in p.message for p in error.problems), error


def test_a_config_for_measuring_needs_no_stage() -> None:
    assert Config(run_dir="r", model={"path": "m"}).stage == ()


def test_an_evaluation_says_which_weights_it_measures(adder: Path, tmp_path: Path) -> None:
    config = Config.model_validate({"run_dir": str(tmp_path), "model": {"path": str(adder)}})
    here, there = Source(None, None, {"path": str(adder)}), Source(None, None, {"url": "http://x", "model": "m"})
    assert list(weights_lines(config, here)) == [f"model: {adder}"]
    assert list(weights_lines(config, there)) == ["model: m of http://x"]
    (tmp_path / "checkpoints" / "step_7").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_7" / "manifest.json").touch()
    assert f"for 7 steps; `or1 eval {tmp_path}` measures that" in list(weights_lines(config, here))[1]
    result = {"model": {"path": str(tmp_path / "weights" / "step_7")}}
    assert len(list(weights_lines(config.model_validate(config.model_dump() | result), here))) == 1
