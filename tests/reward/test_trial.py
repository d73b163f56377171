r"""`or1 reward`: known texts through the configured reward."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from or1.cli import main
from or1.commands.reward import try_reward
from or1.config.load import load_config
from or1.core.errors import DataError
from or1.core.types import Prompt, Status
from or1.reward.trial import choose_rows
from tests.helpers.small_run import ROOT

QUICKSTART = ROOT / "examples" / "quickstart.toml"
ADDER = [f"model.path={ROOT}/examples/tiny-adder", "eval.sets=[]", "reward.workers=1"]


def data(folder: Path, *rows: dict) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train={file}"


def test_maths_shows_answer_status_and_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = data(tmp_path, *({"question": f"{n}+1", "answer": gold} for n, gold in enumerate(["1", "}{", "3", "4"])))
    trials = try_reward(load_config(QUICKSTART, [*ADDER, rows]), text=r"so</think> \boxed{\frac{4}{4}}")
    assert len(trials) == 3
    right, wrong, none, own = trials[0]
    assert (right.score.status, right.answer, right.reason) == (Status.OK, "1", "")
    assert (wrong.score.status, wrong.reason) == (Status.WRONG, "the answer is not equal to 1")
    assert (none.score.status, none.reason) == (Status.NO_ANSWER, r"no \boxed{} that closes")
    assert (own.score.reward, own.answer) == (1.0, r"\frac{4}{4}"), "math-verify decides in a worker"
    assert own.seconds > right.seconds >= 0
    shown = capsys.readouterr().out
    assert shown.count("rows.jsonl:") == 3 and r"extracted  \frac{4}{4}" in shown
    assert trials[1][0].score.reward == 0 and "warning: 1 reference answers do not get a full reward" in shown


def test_a_function_is_tried_with_its_output_and_its_crash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text(
        "def reward(completions, completion_ids, answer, **columns):\n"
        "    print('seen', len(completion_ids[0]))\n"
        "    if 'boom' in completions[0]:\n        raise RuntimeError('too loud')\n"
        "    return [0.5 * (completions[0] == answer[0])]\n"
    )
    rows = data(tmp_path, {"question": "1+1", "answer": "2"})
    own = ["--set", f"reward.kind={tmp_path}/own.py:reward", "--set", "reward.require_think_close=false"]
    settings = [part for each in [*ADDER, rows] for part in ("--set", each)]
    monkeypatch.setattr("sys.stdin", io.StringIO("boom"))
    assert main(["reward", str(QUICKSTART), *settings, *own, "--text", "-", "--row", "rows.jsonl:1"]) == 0
    shown = capsys.readouterr().out
    assert "reference answer: 0.500  rewarded" in shown
    assert "your text: -  crash" in shown and "RuntimeError: too loud" in shown
    assert "  | seen 1\n" in shown, "the token ids of the text 2"


def test_rows_are_chosen_from_every_file() -> None:
    prompts = [Prompt(name, name, name, ()) for name in ("a:1", "a:2", "a:3", "a:4", "b:1")]
    assert [prompt.id for prompt in choose_rows(prompts)] == ["a:1", "b:1", "a:2"]
    assert [prompt.id for prompt in choose_rows(prompts, "5")] == ["b:1"]
    assert [prompt.id for prompt in choose_rows(prompts, "a:3")] == ["a:3"]
    for row in ("0", "6", "c:1", "-1", "\u00b2"):
        with pytest.raises(DataError, match=r"--row .*: no such row; give a number from 1 to 5, or an id such as a:1"):
            choose_rows(prompts, row)


def test_a_text_that_cannot_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reward", str(QUICKSTART), "--text", str(tmp_path / "none")]) == 65
    assert f"--text {tmp_path}/none: cannot be read" in capsys.readouterr().err


def test_a_program_is_run_against_its_tests(tmp_path: Path) -> None:
    tests = {"inputs": ["1\n"], "outputs": ["2\n"]}
    row = {"question": "Add 1.", "tests": json.dumps(tests), "solution": "print(int(input()) + 1)"}
    config = load_config(QUICKSTART, [*ADDER, data(tmp_path, row), "reward.code.sandbox=auto"])
    right, wrong, none = try_reward(config)[0]
    assert (right.sample.what, right.score.reward, right.answer) == ("column solution", 1.0, row["solution"] + "\n")
    assert wrong.score.reward == 0 and none.reason == "no Python block"
