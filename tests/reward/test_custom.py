"""User reward functions: recognised by their parameters, called as their libraries call them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from or1.cli import main
from or1.config import RewardConfig
from or1.core.errors import RewardFunctionError, ScorerError
from or1.core.types import Group, Prompt, Response, Score, Status
from or1.magic.advantage import group_advantages, has_advantage
from or1.reward import custom, make_scorer
from or1.reward.output import LOG_NAME
from or1.reward.scorer import require_rewards
from or1.train.metrics import rollout_metrics
from tests.helpers.small_run import arguments
from tests.helpers.snippets import blocks

FUNCTIONS = """
import asyncio, os, time
import numpy as np

def trl(completions, answer, **kwargs):
    assert set(kwargs) >= {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric", "level"}
    return [float(text == gold) for text, gold in zip(completions, answer)]

def trl_chat(prompts, completions, answer):
    assert prompts[0][-1]["role"] == "user"
    return [1.0 if c[0] == {"role": "assistant", "content": a} else 0.0 for c, a in zip(completions, answer)]

async def trl_async(completions, answer, **kwargs):
    await asyncio.sleep(0)
    return [0.5 for _ in completions]

def verl(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "gsm8k" and extra_info == {"index": 3}
    return {"score": float(solution_str == ground_truth), "acc": True}

def verl_bool(data_source, solution_str, ground_truth, extra_info, **kwargs):
    return solution_str == ground_truth

def verl_tuple(solution_str, ground_truth):
    return 0.25, "why"

def verl_batch(data_sources, solution_strs, ground_truths, extra_infos):
    return [float(s == g) for s, g in zip(solution_strs, ground_truths)]

def verifiers(completion, answer, parser, state):
    assert state["task"] == "default"
    return float(parser.parse_answer(completion) == answer)

async def verifiers_async(prompt, completion, answer, info):
    return 1.0 if completion[-1]["content"] == answer and info == {"k": 1} and prompt[0]["role"] == "user" else 0.0

def openrlhf(queries, prompts, labels):
    right = [q == p + label for q, p, label in zip(queries, prompts, labels)]
    return {"rewards": np.array(right, dtype=np.float32), "scores": np.zeros(1), "extra_logs": {}}

def areal(prompt, completions, prompt_ids, completion_ids, answer, **kwargs):
    assert isinstance(completions, str) and completion_ids == [5, 6] and prompt_ids == [1, 2]
    return float(completions == answer)

def unknown(x, y):
    return 1.0

def orders(completions, **kwargs):
    order = completions[0]
    if order == "raise": raise KeyError("apples")
    if order == "exit": os._exit(0)
    if order == "hang": time.sleep(99)
    return {"two": [1.0, 0.0], "pair": (1.0, 0.0), "array": np.ones(2), "mapping": {"rewards": [1.0, 0.0]},
            "inner": [[1.0, 0.0]], "huge": [1e200], "minus huge": [-1.7e308], "long": [10 ** 400],
            "np": np.float32(0.5), "np1": np.array([0.5]), "pair in a list": [(0.5, "why")], "large": [1e30]}.get(
            order, [{"none": None, "nan": float("nan"), "text": "1", "list": [], "minus": -2.5}.get(order, 1.0)])

def needs_level(completions, level, hint, other=0, *, answer, **kwargs):
    return [float(level[0])]

def needs_more(solution_str, ground_truth, difficulty):
    return 1.0

def needs_prompt(prompt, prompts, completions, completion):
    return 1.0

def by_position(completions, answer, /):
    return [1.0]
"""

ROW = {
    "prompt": "6 * 7 = ",
    "answer": "42",
    "data_source": "gsm8k",
    "level": 3,
    "extra_info": {"index": 3},
    "reward_model": {"ground_truth": "42", "style": "rule"},
    "info": '{"k": 1}',
}


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(FUNCTIONS)
    return path


def job(completion: str, **row: object) -> dict:
    return {
        "row": ROW | row,
        "source": "file",
        "prompt": "6 * 7 = ",
        "prompt_ids": [1, 2],
        "golds": ["42"],
        "completion": completion,
        "completion_ids": [5, 6],
    }


def grade(path: str, completion: str, **row: object) -> Score:
    custom.begin({"path": path})
    return custom.grade_job(job(completion, **row))


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("trl", "trl"),
        ("verl", "verl"),
        ("verl_bool", "verl"),
        ("verl_batch", "verl_batch"),
        ("verifiers", "verifiers"),
        ("verifiers_async", "verifiers"),
        ("openrlhf", "openrlhf"),
        ("areal", "areal"),
    ],
)
def test_forms_are_recognised_and_called(name: str, form: str, functions: Path) -> None:
    assert custom.load(f"{functions}:{name}")[1] == form
    assert grade(f"{functions}:{name}", "42") == Score(1.0, Status.OK)
    assert grade(f"{functions}:{name}", "43") == Score(0.0, Status.WRONG)


def test_other_results_are_numbers_too(functions: Path) -> None:
    assert grade(f"{functions}:trl_async", "x") == Score(0.5, Status.OK)
    assert grade(f"{functions}:verl_tuple", "x") == Score(0.25, Status.OK)
    assert grade(f"{functions}:orders", "minus") == Score(-2.5, Status.WRONG)
    assert grade(f"{functions}:orders", "none").status is Status.SKIPPED
    for order in ("np", "np1", "pair in a list"):
        assert grade(f"{functions}:orders", order) == Score(0.5, Status.OK)
    assert grade(f"{functions}:orders", "large") == Score(1e30, Status.OK)


def test_conversations_stay_conversations(functions: Path) -> None:
    messages = [{"role": "user", "content": "6 * 7 = "}]
    assert grade(f"{functions}:trl_chat", "42", prompt=messages).reward == 1.0


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("nan", "reward is nan"),
        ("text", "a str, not"),
        ("list", "no reward"),
        ("two", "returned 2 rewards for 1 response"),
        ("pair", "returned 2 rewards"),
        ("array", "returned 2 rewards"),
        ("mapping", "returned 2 rewards for 1 response"),
        ("inner", "returned 2 rewards"),
        ("huge", r"the reward is 1e\+200, larger than 1e\+30"),
        ("minus huge", "larger than"),
        ("long", "1329 bits"),
    ],
)
def test_what_is_no_reward_is_an_error(order: str, message: str, functions: Path) -> None:
    with pytest.raises(ValueError, match=message):
        grade(f"{functions}:orders", order)


def test_trl_own_reward_function() -> None:
    pytest.importorskip("trl")
    messages = [{"role": "user", "content": "?"}]
    path = "trl.rewards:accuracy_reward"
    assert grade(path, r"\boxed{0.5}", prompt=messages, solution=r"\boxed{\frac{1}{2}}").reward == 1.0
    assert grade(path, r"\boxed{0.6}", prompt=messages, solution=r"\boxed{\frac{1}{2}}").reward == 0.0


def test_verl_own_reward_function() -> None:
    pytest.importorskip("verl")
    path = "verl.utils.reward_score.gsm8k:compute_score"
    assert grade(path, "so\n#### 42").reward == 1.0
    assert grade(path, "so\n#### 41").reward == 0.0


# --- in the pool


def response(text: str) -> Response:
    return Response(np.array([5, 6], dtype=np.int32), np.zeros(2, dtype=np.float32), "stop", 0, text)


PROMPT = Prompt("t:1", "t", "6 * 7 = ", np.array([1, 2], dtype=np.int32), ("42",), row=ROW)


def test_exceptions_hangs_and_nothing_are_counted_and_never_zero(functions: Path, caplog) -> None:
    config = RewardConfig(kind=f"{functions}:orders", workers=2, timeout_s=1.0)
    with make_scorer(config, [PROMPT]) as scorer:
        orders = ("x", "raise", "exit", "hang", "none", "minus", "x")
        scores = [f.result(timeout=60) for f in [scorer.submit(PROMPT, response(order)) for order in orders]]
    assert [s.status.value for s in scores] == ["ok", "crash", "crash", "timeout", "skipped", "wrong", "ok"]
    assert [s.reward for s in scores if not math.isnan(s.reward)] == [1.0, -2.5, 1.0]
    assert f"grading t:1 'raise' crashed: KeyError: 'apples' ({functions}:50, in orders)" in caplog.text
    assert scores[1].cause.startswith("KeyError: 'apples'")

    group = Group(PROMPT, tuple(response(order) for order in orders), tuple(scores))
    metrics = rollout_metrics([group])
    assert metrics["reward/mean"] == pytest.approx(-0.5 / 3)
    assert metrics["reward/status/crash"] == pytest.approx(2 / 7)
    assert metrics["reward/status/skipped"] == metrics["reward/status/timeout"] == pytest.approx(1 / 7)
    assert has_advantage(group)


@pytest.mark.parametrize(
    ("grade_truncated", "expected"),
    [(None, Score(-2.5, Status.WRONG)), (True, Score(-2.5, Status.WRONG)), (False, Score(0.0, Status.TRUNCATED))],
)
def test_cut_responses_go_to_the_function_unless_told_otherwise(
    grade_truncated: bool | None, expected: Score, functions: Path
) -> None:
    config = RewardConfig(kind=f"{functions}:orders", workers=1, grade_truncated=grade_truncated)
    cut = Response(np.array([5, 6], dtype=np.int32), np.zeros(2, dtype=np.float32), "length", 0, "minus")
    with make_scorer(config, [PROMPT]) as scorer:
        assert scorer.submit(PROMPT, cut).result(timeout=60) == expected
        assert scorer.submit(PROMPT, response("minus")).result(timeout=60) == Score(-2.5, Status.WRONG)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("{file}:unknown", "are of no known form; name completions (TRL), prompt and completions (AReaL)"),
        ("{file}:absent", "has no function 'absent'; it has trl, trl_chat,"),
        ("no_such_module.at_all:f", "no module 'no_such_module'; install it"),
        ("{file.parent}/broken.py:f", "KeyError: 'pears' ({file.parent}/broken.py:2, in <module>)"),
        ("{file.parent}/leaves.py:f", "SystemExit: 3 ({file.parent}/leaves.py:2, in <module>)"),
        ("{file}:needs_level", "no row has 'level', 'hint', which needs_level() needs; rows have question, answer. "),
        ("{file}:needs_more", "needs_more() needs 'difficulty', which its form (verl) does not give; it gives data_so"),
        ("{file}:needs_prompt", "needs_prompt() needs 'prompts', 'completion', which its form (areal) does not give"),
        ("{file}:by_position", "by_position() takes completions, answer by position only; remove the /"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_message_before_training(
    kind: str, message: str, functions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (functions.parent / "broken.py").write_text("\n{}['pears']\n")
    (functions.parent / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    named = kind.format(file=functions)
    settings = {"reward__kind": named, "reward__require_think_close": "false"}
    assert main(arguments(tmp_path / "run", "--dry-run", **settings)) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("or1: reward.kind: "), said
    assert message.format(file=functions) in said[0]


def test_a_column_that_no_row_has_ends_the_start_before_a_model_is_loaded(
    functions: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("or1.train.build.load_model", lambda *_: pytest.fail("loaded the model"))
    settings = {"reward__kind": f"{functions}:needs_level", "reward__require_think_close": "false"}
    assert main(arguments(tmp_path / "run", **settings)) == 2
    assert "or1: reward.kind: no row has 'level', 'hint'" in capfd.readouterr().err


def test_a_column_that_some_rows_lack_is_a_warning_with_their_count(functions: Path) -> None:
    rows = [{"level": 1, "hint": "", "answer": "1"}, {"hint": "", "answer": "2"}, {"answer": "3"}]
    prompts = [replace(PROMPT, id=f"t:{i}", row=row) for i, row in enumerate(rows)]
    config = RewardConfig(kind=f"{functions}:needs_level", workers=1)
    with make_scorer(config, prompts) as scorer:
        assert [remark.partition(", which")[0] for remark in scorer.remarks] == [
            "2 of 3 rows have no 'level'",
            "1 of 3 rows have no 'hint'",
        ]
        assert "the first is t:1" in scorer.remarks[0] and "the first is t:2" in scorer.remarks[1]
        assert scorer.submit(prompts[0], response("x")).result(timeout=60).reward == 1.0
    with make_scorer(config, prompts[:1]) as scorer:
        assert scorer.remarks == []
    with pytest.raises(RewardFunctionError, match=r"no row has 'level', .* rows have answer, hint"):
        make_scorer(config, [replace(PROMPT, row={"answer": "", "hint": ""})])
    with make_scorer(config) as scorer:
        assert scorer.remarks == [], "nothing is known of the rows"


def test_a_dry_run_warns_of_rows_without_a_column_and_calls_no_function(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.py").write_text(f"def reward(completions, level):\n    open({str(tmp_path / 'called')!r}, 'w')\n")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "1+1", "answer": "2", "level": 1}\n{"question": "1+2", "answer": "3"}\n')
    settings = {
        "reward__kind": f"{tmp_path}/own.py:reward",
        "reward__require_think_close": "false",
        "data__train": data,
    }
    assert main(arguments(tmp_path / "run", "--dry-run", **settings)) == 0
    assert "1 of 2 rows have no 'level', which reward() needs (the first is rows.jsonl:2)" in capsys.readouterr().out
    assert not (tmp_path / "called").exists()


def test_a_run_keeps_what_a_function_prints_and_says_where(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text("def reward(completions):\n    print('hello', completions)\n    return [0.5]\n")
    settings = {
        "reward__kind": f"{tmp_path}/own.py:reward",
        "reward__require_think_close": "false",
        "stage__0__steps": 2,
        "stage__1__steps": 2,
        "eval__every_steps": 9,
    }
    assert main(arguments(tmp_path / "run", **settings)) == 0
    lines = (tmp_path / "run" / LOG_NAME).read_text().splitlines()
    assert len(lines) == 4 * 16 and all(line.startswith("hello [") for line in lines)
    said = capfd.readouterr().out
    assert said.count(f"what the reward function prints goes to {tmp_path}/run/{LOG_NAME}") == 1
    # All rewards are equal, so the run also says why nothing is learnt.
    assert "step 3: nothing is trained, 3 steps in a row: every response of every group has reward 0.5" in said
    assert "nothing was trained: in none of 4 steps was a group kept (100 % ok, mean reward 0.5)" in said


def test_numbers_of_workers_and_memory_have_bounds() -> None:
    assert RewardConfig(workers=1024).workers == 1024 and RewardConfig(memory_mib=0).memory_mib == 0
    for bad in ({"workers": 1025}, {"workers": 0}, {"memory_mib": -1}):
        with pytest.raises(ValueError, match=r"workers|memory_mib"):
            RewardConfig(**bad)


def test_more_workers_than_the_machine_can_hold_end_a_dry_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("or1.reward.capacity._cores", lambda: 2)
    assert main(arguments(tmp_path / "run", "--dry-run", reward__workers=1000)) == 70
    assert "or1: reward.workers = 1000: too many for 2 cores" in capsys.readouterr().err


def test_a_step_whose_every_reward_fails_stops_the_run(functions: Path) -> None:
    scores = (Score(math.nan, Status.CRASH, "KeyError: 'apples'"), Score(math.nan, Status.TIMEOUT))
    group = Group(PROMPT, (response("a"), response("b")), scores)
    with pytest.raises(ScorerError, match=r"none of the 4 responses of step 3 .* crashed on 2 .* the last: KeyError"):
        require_rewards(3, [group, group])
    require_rewards(3, [group, Group(PROMPT, group.responses, (scores[0], Score(0.0, Status.WRONG)))])
    require_rewards(3, [])


def test_unscored_responses_count_for_nothing_in_their_group() -> None:
    whole = group_advantages(np.array([[1.0, 0.0, 0.0]]))
    with_gap = group_advantages(np.array([[1.0, math.nan, 0.0, 0.0]]))
    np.testing.assert_array_equal(with_gap[0, [0, 2, 3]], whole[0])
    assert math.isnan(with_gap[0, 1])

    def group(*rewards: float) -> Group:
        scores = tuple(Score(reward, Status.OK) for reward in rewards)
        return Group(PROMPT, tuple(response("") for _ in rewards), scores)

    assert not has_advantage(group(math.nan, 1.0, 1.0))
    assert not has_advantage(group(math.nan, math.nan))
    metrics = rollout_metrics([group(math.nan, math.nan), group(1.0, math.nan)])
    assert metrics["reward/mean"] == 1.0 and metrics["group/solved"] == 0.5 and metrics["group/failed"] == 0.0


def test_kinds_that_the_config_takes(functions: Path) -> None:
    for kind in ("math", "code", "auto", f"{functions}:trl", "package.module:name"):
        assert RewardConfig(kind=kind).kind == kind
    for kind in ("maths", "module:", "a:b:c", ""):
        with pytest.raises(ValueError, match="kind"):
            RewardConfig(kind=kind)


def test_kinds_that_do_not_fit_the_data_are_refused(functions: Path) -> None:
    from or1.core.types import CodeTests

    program = Prompt("code.jsonl:7", "t", "?", np.array([1]), tests=CodeTests("stdin", ("1",), ("1",)))
    with pytest.raises(ScorerError, match=r'kind = "math", but code.jsonl:7 and others are code problems'):
        make_scorer(RewardConfig(kind="math"), [program])
    with pytest.raises(ScorerError, match="are math problems"):
        make_scorer(RewardConfig(kind="code"), [PROMPT])


def test_the_function_of_the_page_is_one(root: Path, tmp_path: Path) -> None:
    """The page is or1/reward/README.md."""
    (block,) = blocks((root / "or1" / "reward" / "README.md").read_text(encoding="utf-8"), "python")
    (tmp_path / "own.py").write_text(block)
    custom.begin({"path": f"{tmp_path}/own.py:reward"})
    job = {"prompt": "2 + 2", "completion_ids": [1], "row": {"prompt": "2 + 2", "answer": "4"}}
    assert [custom.grade_job(job | {"completion": text}).reward for text in ("it is 4", "5")] == [1.0, 0.0]
