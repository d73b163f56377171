"""The terminal display: live panel, plain lines, plan and summary."""

from __future__ import annotations

import io
import math
import re
import sys

import pytest
from rich.console import Console

from or1.core.text import clock, sparkline
from or1.report.live import RunDisplay
from or1.report.run_plan import print_plan
from or1.report.summary import print_summary
from tests.helpers.displays import STAGES, make_config, make_summary, output, plain_console

RECORDS = (
    {"step": 0, "stage": 0, "eval/heldout/avg@1": 0.32, "time/eval": 2.0},
    {
        "step": 1,
        "stage": 0,
        "reward/mean": 0.41,
        "policy/entropy": 0.471,
        "policy/entropy_coef": 1e-4,
        "completion/len_mean": 41.5,
        "completion/truncated": 0.05,
        "group/kept": 12.0,
        "optim/grad_norm": 0.31,
        "perf/tokens_per_s": 2334.0,
    },
    {"step": 2, "stage": 0, "reward/mean": math.nan, "policy/entropy": None, "group/kept": math.inf},
    {"step": 3, "stage": 1, "reward/mean": 0.52, "completion/len_mean": 8000, "group/kept": 0.0},
    {"step": 4, "stage": 1, "reward/mean": 0.68, "eval/heldout/avg@1": 0.615},
)


def terminal(width: int = 110) -> Console:
    return Console(file=io.StringIO(), width=width, height=40, force_terminal=True, color_system="256", _environ={})


def show(console: Console, records=RECORDS) -> str:
    with RunDisplay(4, STAGES, console) as display:
        for record in records:
            display.phase("rollout", 3, 64)
            display.phase("train")
            display.step(record)
        display.message("checkpoint [bold]step_4[/bold] written\x1b[2J")
    return output(console)


def test_without_a_terminal_each_step_is_one_plain_line():
    text = show(plain_console())
    lines = text.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == [f"step {n}/4" for n in (1, 2, 3, 4)]
    start = "step 1/4  reward 0.410  entropy 0.471 coef 0.0001  len  42 cut  5%  kept 75%  grad  0.31  2,334 tok/s"
    assert lines[1].startswith(start)
    assert lines[0] == "eval step 0: heldout avg@1 32.0 %"
    assert "eval step 4: heldout avg@1 61.5 %, was 32.0 % (+29.5 points)" in lines
    assert "stage 2/2, limit 16,384 tokens began at step 3" in lines
    assert lines[-1] == "checkpoint [bold]step_4[/bold] written<U+001B>[2J"
    assert max(map(len, lines)) <= 120 and "\x1b" not in text and "\r" not in text


def test_missing_and_nan_values_are_left_out_of_plain_lines():
    line = next(line for line in show(plain_console()).splitlines() if line.startswith("step 2/4"))
    assert "nan" not in line and "inf" not in line and "reward" not in line and "kept" not in line


def test_rewards_that_fail_stand_in_the_line():
    console = plain_console()
    with RunDisplay(12, STAGES, console) as display:
        display.step(RECORDS[1] | {"step": 2, "reward/status/crash": 0.25, "reward/status/timeout": 0.0})
    assert "crash 25.0 %" in output(console) and "timeout" not in output(console)


def test_a_worst_case_plain_line_still_fits():
    console = plain_console()
    record = RECORDS[1] | {
        "perf/tokens_per_s": 1.234e7,
        "completion/len_mean": 32768,
        "optim/grad_norm": 1.23e-5,
        "completion/truncated": 1.0,
        "group/kept": 16,
        "policy/entropy": 12.3456,
    }
    with RunDisplay(12_000, STAGES, console) as display:
        display.step(record | {"step": 9_998})
        display.step(record | {"step": 9_999})
    assert 110 < max(map(len, output(console).splitlines())) <= 130


def test_on_a_terminal_the_panel_shows_progress_values_and_evaluations():
    text = _bare(show(terminal()))
    for word in (
        "step 4/4",
        "reward",
        "0.680",
        "rollout",
        "3/64",
        "heldout avg@1",
        "61.5 %",
        "+29.5 pts",
        "from 32.0 %",
        "\u2581",
        "stage 2/2",
        "checkpoint [bold]step_4[/bold] written<U+001B>",
    ):
        assert word in text, word
    assert "nan" not in text


def _bare(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_a_row_of_rewards_that_fail_comes_with_the_first_and_stays():
    fine, bad = {"reward/status/crash": 0.0}, {"reward/status/crash": 0.25, "reward/status/timeout": 0.125}
    assert "crash or timeout" not in show(terminal(), [{"step": 1, "stage": 0, **fine}])
    text = _bare(show(terminal(), [{"step": k, "stage": 0, **record} for k, record in enumerate([fine, bad, fine], 1)]))
    for share in ("37.5", "0.0"):
        assert re.search(rf"crash or timeout +{share} %", text), share


@pytest.mark.parametrize("width", [20, 40, 200])
def test_any_terminal_width_works(width):
    assert "reward" in _bare(show(terminal(width)))


def test_odd_records_never_crash_the_display():
    odd = [
        {},
        {"step": None},
        {"step": "x", "stage": 99},
        {"stage": -3, "reward/mean": "high"},
        {"step": 10**400},
        {"reward/mean": -1e308},
        {"reward/mean": 1e308},
        {"eval/[red]/avg@1": 0.5},
        {"eval/a/avg@x": 1},
    ]
    for console in (plain_console(), terminal()):
        show(console, odd)


def test_an_exception_restores_the_terminal_and_passes_through():
    console, stdout = terminal(), sys.stdout
    with pytest.raises(KeyboardInterrupt), RunDisplay(4, STAGES, console) as display:
        display.step(RECORDS[1])
        assert "\x1b[?25l" in output(console)
        raise KeyboardInterrupt
    assert output(console).rstrip().endswith("\x1b[?25h") and sys.stdout is stdout


def test_time_left_comes_from_recent_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("or1.report.live.time.monotonic", lambda: now[0])
    console = plain_console()
    with RunDisplay(10, STAGES, console) as display:
        for step in range(4):
            now[0] = 100.0 + 10 * step
            display.step({"step": step, "stage": 0})
    assert "left 1min10s" in output(console).splitlines()[-1]


FORMER = (
    {"step": 0, "stage": 0, "eval/heldout/avg@1": 0.495},
    RECORDS[1] | {"reward/mean": 0.1},
    {"step": 2, "stage": 0, "reward/mean": 0.2, "eval/heldout/avg@1": 0.7},
    {"step": 3, "stage": 1, "reward/mean": 0.3},
)
NEXT = {"step": 4, "stage": 1, "reward/mean": 0.4, "eval/heldout/avg@1": 0.86}


def resumed(console: Console, former=FORMER, after=(NEXT,)) -> str:
    with RunDisplay(4, STAGES, console) as display:
        display.recall(former)
        display.phase("rollout", 3, 64)
        for record in after:
            display.step(record)
    return output(console)


def test_a_resumed_run_is_measured_from_its_true_start():
    text = resumed(plain_console())
    assert "eval step 4: heldout avg@1 86.0 %, was 49.5 % (+36.5 points)" in text
    assert len(text.splitlines()) == 2 and "began at step" not in text  # what was shown before is not shown again
    text = _bare(resumed(terminal()))
    assert re.search(r"heldout avg@1 +86.0 % +\+36.5 pts +from 49.5 %", text)
    before = _bare(resumed(terminal(), after=()))
    assert "step 3/4" in before and "stage 2/2" in before and "70.0 %" in before
    assert re.findall(r"reward +0.300 +\S+ +(\S+)", before)[-1] == sparkline([0.1, 0.2, 0.3], 32)


def test_only_step_0_is_before_training():
    first = {"step": 0, "stage": 0, "eval/heldout/avg@1": 0.495}
    assert "before training" in show(terminal(), [first])
    late = _bare(show(terminal(), [first | {"step": 2}]))
    assert "before training" not in late and re.search(r"heldout avg@1 +49.5 % +at step 2", late)
    text = show(plain_console(), [first | {"step": 2}, NEXT])
    assert "heldout avg@1 86.0 %, was 49.5 % at step 2 (+36.5 points)" in text


STAGE_TEXTS = (STAGES, tuple(STAGES[0].model_copy(update={"max_response_tokens": 131_072}) for _ in range(12)))
LONG_NAME = "eval a-set-with-a-name-that-is-longer-than-most-names-are"
PHASES = (("rollout", 3, 64), (LONG_NAME, 1023, 2048), ("export", 0, None))


@pytest.mark.parametrize("width", [60, 80, 99, 100, 110, 140])
@pytest.mark.parametrize("elapsed_s", [3, 153, 3753, 36_000, 360_153])
@pytest.mark.parametrize("stages", STAGE_TEXTS)
def test_the_header_is_shown_whole(width, elapsed_s, stages, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("or1.report.live.time.monotonic", lambda: now[0])
    stage = f"stage {len(stages)}/{len(stages)}, limit {stages[-1].max_response_tokens:,} tokens"
    for name, done, total in PHASES:
        console, now[0] = terminal(width), 0.0
        display = RunDisplay(12_000, stages, console)
        now[0] = float(elapsed_s)
        for step in (1, 2):
            display.step({"step": step, "stage": len(stages) - 1})
            now[0] += 0.01 * elapsed_s
        display.phase(name, done, total)
        with console.capture() as captured:
            console.print(display._render())
        lines = [line.rstrip() for line in _bare(captured.get()).splitlines()]
        first, *rest = lines[: 1 + next(i for i, line in enumerate(lines) if line.startswith(name[:8]))]
        assert max(map(len, lines)) <= width and "\u2026" not in "".join([first, *rest])
        assert re.search(rf"step 2/12000 .*elapsed {clock(now[0])}  left \d+:\d\d(:\d\d)?( |$)", first), first
        assert first.endswith(stage) and len(rest) == 1 if width == 140 else rest[0] == stage or width >= 100
        assert total is None or f"{done}/{total}" in rest[-1]


def test_the_panel_says_what_its_change_is_measured_over():
    text = _bare(show(terminal()))
    assert "over last 5" in text and "= unchanged" in text and "trend" not in text


GRADED = (
    {"step": 0, "stage": 0, "eval/held/avg@1": 0.0, "eval/held/reward_mean": -0.1, "eval/held/graded": 1.0},
    {"step": 1, "stage": 0, "reward/mean": -0.105, "reward/graded": 0.9},
    {
        "step": 4,
        "stage": 1,
        "reward/mean": 0.48,
        "reward/graded": 1.0,
        "eval/held/avg@1": 0.025,
        "eval/held/reward_mean": 0.49,
    },
)


def test_graded_rewards_lead_with_their_mean():
    lines = show(plain_console(), GRADED).splitlines()
    evaluations = [line for line in lines if line.startswith("eval")]
    assert evaluations == [
        "eval step 0: held reward -0.100",
        "eval step 0: held avg@1 0.0 %",
        "eval step 4: held reward 0.490, was -0.100 (+0.590)",
        "eval step 4: held avg@1 2.5 %, was 0.0 % (+2.5 points)",
    ]
    text = _bare(show(terminal(), GRADED))
    reward, accuracy = text.rindex("held reward"), text.rindex("held avg@1")
    assert reward < accuracy and re.search(r"held reward +0.490 +\+0.590 +from -0.100", text)


@pytest.mark.parametrize("changes", [{"eval/held/graded": 0.0}, {"reward/graded": 0.0}, {"eval/held/reward_mean": 0.3}])
def test_rewards_of_0_and_1_lead_with_accuracy(changes):
    records = [{"step": 0, "stage": 0, "eval/held/avg@1": 0.3, "eval/held/reward_mean": 0.3} | changes]
    for console in (plain_console(), terminal()):
        assert "held reward" not in show(console, records)


def test_an_ascii_console_gets_ascii():
    console = plain_console("ascii")
    print_plan(make_config(), ["caf\u00e9.jsonl"], console)
    print_summary(make_summary(), console)
    with RunDisplay(4, STAGES, console) as display:
        display.step(RECORDS[1])
        display.message("na\u00efve")
    text = output(console)
    assert text.isascii() and "##########++++++++++++++......" in text and "na?ve" in text
