"""The plan before a run, the summary after it, and the numbers in both."""

from __future__ import annotations

from or1.config import OptimConfig, RewardConfig
from or1.report.records import Course, EvalHistory, EvalPoint
from or1.report.run_plan import print_plan
from or1.report.summary import Summary, print_summary
from tests.helpers.displays import STAGES, make_config, make_summary, output, plain_console


def test_the_summary_of_graded_rewards_leads_with_their_mean():
    held = EvalHistory("held", 1, (EvalPoint(0, 0.0, reward=-0.1), EvalPoint(4, 0.025, reward=0.49)))
    reward = Course("training reward", "fixed3", (1, 4), (-0.105, 0.48))
    console = plain_console()
    print_summary(make_summary(evals=(held,), graded=True, reward=reward), console)
    lines = output(console).splitlines()
    assert [line.split("  ")[1] for line in lines[2:5]] == ["held reward", "held avg@1", "training reward"]
    assert "-0.100 -> 0.490  +0.590" in lines[2] and "0.0 % -> 2.5 %  +2.5 points" in lines[3]
    assert "-0.105 -> 0.480  +0.585" in lines[4] and "steps 1 to 4" in lines[4]
    console = plain_console()
    print_summary(make_summary(evals=(held,), reward=reward), console)
    assert "held reward" not in output(console) and "training reward" in output(console)


def test_the_plan_names_what_the_run_will_do():
    console = plain_console()
    print_plan(make_config(), ["a.jsonl: 4,000 problems", "b.jsonl: 10 problems"], console)
    text = output(console)
    for word in (
        "4 steps in 2 stages",
        "models/tiny (bfloat16",
        "a.jsonl: 4,000 problems",
        "16 x 8",
        "1, on-policy",
        "1-2",
        "3-4",
        "16,384",
        "2,097,152",
        "target 0.2",
        "adaptive (paper)",
        "[0, 1]",
        "runs/[red]demo",
        "heldout: h.jsonl, avg@4 at temperature 1, first 50",
    ):
        assert word in text, word
    row = next(line for line in text.splitlines() if "3-4" in line)
    assert row.split()[-2] == "3"  # 16 prompts in minibatches of at most 6


def test_the_plan_counts_passes_and_names_optimizer_and_reward():
    console, config = plain_console(), make_config()
    changes = {
        "stage": (STAGES[0].model_copy(update={"reuse": 4}),),
        "reward": RewardConfig(kind="a/b.py:score"),
        "optim": OptimConfig(optimizer="adamw8bit"),
    }
    print_plan(config.model_copy(update=changes), [], console)
    text = output(console)
    assert next(line for line in text.splitlines() if "16 x 8" in line).split()[-2] == "4"
    assert "a/b.py:score" in text and "AdamW with 8-bit moments, lr" in text and "on-policy" not in text


def test_the_plan_falls_back_to_the_data_paths():
    console = plain_console()
    print_plan(make_config(), [], console)
    assert "a.jsonl" in output(console) and "b.jsonl" in output(console)


def test_the_summary_shows_accuracy_time_counts_and_paths():
    console = plain_console()
    print_summary(make_summary(), console)
    text = output(console)
    for word in (
        "Run finished: 4 of 4 steps in 4 min 37 s",
        "32.0 % -> 79.6 %  +47.6 points",
        "20.0 % -> 15.0 %  -5.0 points",
        "100.0 %, no later evaluation",
        "rollout 2 min 23 s (63 %)",
        "1,241 truncated responses",
        "none of     verifier timeouts",
        "runs/demo/report.html",
        "runs/demo/weights/step_4",
    ):
        assert word in text, word
    bar = next(line for line in text.splitlines() if "heldout" in line)
    assert (bar.count("\u2588"), bar.count("\u2593"), bar.count("\u2591")) == (10, 14, 6)


def test_the_summary_counts_problems_whose_answer_cannot_be_verified():
    for count, line in ((0, ""), (1, "1 problem whose answer"), (1234, "1,234 problems whose answer")):
        console = plain_console()
        print_summary(make_summary(unverifiable=count), console)
        assert ("cannot be verified" in output(console)) == bool(count)
        assert line in output(console)


def test_a_summary_with_nothing_to_show_still_prints():
    console = plain_console()
    print_summary(Summary(evals=(), steps_done=1, total_steps=9, wall_s=0.0, run_dir="r"), console)
    assert "Run stopped: 1 of 9 steps" in output(console)
