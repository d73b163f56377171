"""The report of synthetic runs: what it shows, what it escapes, and the broken runs it must survive."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from or1.core.text import count_text, duration
from or1.report.page_data import load_run
from or1.report.page_plots import smooth, tick_label
from or1.report.records import eval_histories
from or1.report.summary import summarise
from or1.reward.terms import graded_run
from or1.run.state import TrainState
from tests.helpers.report_runs import STAGES, Page, make_graded, make_run, read

ATTACK = "<script>alert('x')</script><img src=https://evil.example/x onerror=alert(1)>"


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> tuple[str, Page]:
    return read(make_run(tmp_path_factory.mktemp("runs") / "adder", attack=ATTACK))


def test_every_plot_is_there_with_its_stage_boundaries(full):
    html, page = full
    assert page.tags.count("svg") == 10
    assert html.count(">stage 2</text>") == 10
    for label in ("target 0.2", "coefficient", "limit", "all right", "all wrong", "heldout avg@4", "mismatch KL"):
        assert label in page.text


def test_accuracy_before_and_after_is_shown_as_recorded(full):
    _, page = full
    for history in eval_histories(load_run(Path(_run_dir(page))).records):
        assert f"{100 * history.points[0].avg:.1f} %" in page.text
        assert f"{100 * history.points[-1].avg:.1f} %" in page.text
        assert f"{history.accuracy.change:+.1f} points" in page.text
    assert page.text.count("± 3.0") == 24, "in the table and over the points"


def _run_dir(page: Page) -> str:
    return re.search(r"run_dir(\S+?adder)", page.text)[1]


def test_untrusted_text_is_escaped_and_nothing_is_loaded_or_run(full):
    html, page = full
    assert {"script", "img", "link", "iframe", "object"}.isdisjoint(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "xlink:href")]
    assert all(value.startswith("#") for name, value in page.attributes if name == "href")
    assert not re.search(r"url\((?!#)", html) and "@import" not in html
    assert ATTACK in page.text
    assert "default-src 'none'" in dict(page.attributes)["content"] or "default-src 'none'" in html


def test_ids_of_inlined_plots_do_not_collide(full):
    _, page = full
    ids = [value for name, value in page.attributes if name == "id"]
    targets = {value[1:] for name, value in page.attributes if name == "href"}
    assert len(ids) == len(set(ids)) and targets <= set(ids)


def test_plots_follow_the_theme(full):
    html, _ = full
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, re.S))
    assert "#0a00" not in svgs and "#0b00" not in svgs and "var(--s1)" in svgs


def test_transcripts_show_each_kind_with_its_facts_and_shaded_tokens(full):
    html, page = full
    for kind in ("solved", "failed", "truncated"):
        assert html.count(f'class="tag {kind}"') == 3
    assert "First add the ones" in page.text and "\\boxed{82}" in page.text and "reward 1 \u00b7 rewarded" in page.text
    assert "<eos>" in page.text and re.search(r'<i class="p[1-4]" title="p 0\.\d+">', html)


def test_counts_that_should_be_zero_stand_out(full):
    html, _ = full
    assert "<div class=alert><b>1</b><span>verifier timeouts</span></div>" in html
    assert "<div><b>0</b><span>verifier crashes</span></div>" in html


def test_settings_of_a_stage_are_shown(full, tmp_path):
    other = {"loss": {"kl_coef": 0.001, "entropy": {"target": 0.4}}, "optim": {"lr": 1e-5}}
    _, page = read(make_run(tmp_path / "r", stages=(STAGES[0], STAGES[1] | other), rollouts=()))
    sets = "loss.kl_coef = 0.001, loss.entropy.target = 0.4, optim.lr = 1e-05"
    assert f"stage 2: {sets}" in page.text and "loss.entropy.target0.4" in page.text
    assert "stage 2:" not in full[1].text and "loss.clip_low" not in page.text and "clip_low0.2" in page.text


def test_a_run_with_one_step(tmp_path):
    _, page = read(make_run(tmp_path / "r", steps=1, rollouts=(1,)))
    assert "not finished" in page.text and "1 / 60" in page.text and page.tags.count("svg") == 10


def test_a_run_with_only_the_first_evaluation(tmp_path):
    _, page = read(make_run(tmp_path / "r", steps=0, rollouts=()))
    assert page.tags.count("svg") == 2  # evaluations and their time
    assert "so far" in page.text and "Not recorded in this run: Reward" in page.text and "Transcripts" not in page.text


def test_a_long_run_is_smoothed_and_stays_small(tmp_path):
    stages = ({**STAGES[0], "steps": 800}, {**STAGES[1], "steps": 1200})
    html, page = read(make_run(tmp_path / "r", steps=2000, stages=stages, rollouts=()))
    assert "finished" in page.text and len(html) < 2_500_000


def test_transcripts_without_a_tokenizer_are_plain(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=1, rollouts=(1,))
    (run_dir / "model" / "tokenizer.json").write_text("{")
    html, page = read(run_dir)
    assert "Shading" not in page.text and "First add the ones" in page.text and 'class="p' not in html


def test_long_and_odd_responses_are_clipped_and_made_visible(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=1, rollouts=(1,))
    path = run_dir / "rollouts" / "step_1.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["response"] = "a" * 100_000 + "\x00\u202e\x1b[31m end"
    pq.write_table(pa.Table.from_pylist(rows), path)
    _, page = read(run_dir)
    assert "[86,011 characters left out]" in page.text
    assert "<U+0000><U+202E><U+001B>[31m end" in page.text


def test_graded_rewards_lead_with_their_mean(tmp_path):
    html, page = read(make_graded(tmp_path / "r"))
    assert html.count('<span class="to">0.400</span>') == 2 and html.count("-0.100 &rarr;") == 2
    assert "accuracy avg@4: 2.5 % → 2.5 %, +0.0 points" in page.text and 'class="track"' not in html
    assert page.text.index("Held-out reward") < page.text.index("Held-out accuracy")
    assert "<th>mean reward</th><th>accuracy</th>" in html
    assert "Share of sampled responses that earn" not in page.text and "Mean reward of the sampled" in page.text
    assert "p10" in page.text and "p90" in page.text and "all equal" in page.text


def test_a_reward_below_1_is_partial_and_never_solved(tmp_path):
    html, page = read(make_graded(tmp_path / "r"))
    assert 'class="tag solved"' not in html and 'class="tag partial"' in html
    assert "reward 0.183 · rewarded" in page.text


def test_rewards_of_0_and_1_lead_with_accuracy(full):
    html, page = full
    assert 'caption">mean reward' not in html and html.count('class="track"') == 2
    assert "Held-out reward" not in page.text and "Held-out accuracy" in page.text
    assert "Share of sampled responses that earn the reward" in page.text


def test_runs_from_before_reward_graded_are_told_by_mean_and_status():
    record = {"step": 1, "reward/mean": 0.25, "reward/status/ok": 0.25, "reward/status/crash": 0.0}
    assert not graded_run([record, {"step": 0}]) and graded_run([record, record | {"reward/mean": 0.3}])
    assert not graded_run([record | {"reward/mean": 0.3, "reward/status/crash": 0.1}])  # left out of the mean


@pytest.mark.parametrize("old", [False, True])
def test_summary_and_report_count_truncated_responses_alike(tmp_path, old):
    run_dir = make_run(tmp_path / "r", steps=2, rollouts=(1,))
    cut, both = {"completion/truncated": 0.25}, {"reward/status/truncated": 0.375}
    new = {} if old else {"completion/no_think_close": 0.125, "completion/count": 64.0}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line | (cut | both | new if line["step"] else {}) for line in lines]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = run_dir / "rollouts" / "step_1.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[1] |= {"status": "truncated"}
    pq.write_table(pa.Table.from_pylist(rows[1:2]), path)
    config = load_run(run_dir).config
    counts = summarise(config, TrainState.start(config), 0).counts
    found = load_run(run_dir).health_counts()
    size = 2 * (128 if old else 64)
    assert counts["truncated responses"] == found["truncated responses"] == size // 4
    assert counts["responses with no </think>"] == found["no </think>"] == size // 8
    _, page = read(run_dir)
    assert "reward 0 · no </think>" in page.text and "no </think>truncated" not in page.text


def test_the_summary_has_the_training_reward_and_marks_graded_rewards(tmp_path):
    run_dir = make_graded(tmp_path / "r")
    config = load_run(run_dir).config
    summary = summarise(config, TrainState.start(config), 0)
    assert summary.graded and (summary.reward.steps[0], summary.reward.steps[-1]) == (1, 24)
    assert summary.reward.values[-1] == pytest.approx(0.4)


def test_messages_of_the_run_are_listed_as_text(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=1, rollouts=())
    (run_dir / "log.txt").write_bytes(b"t step 1: " + ATTACK.encode() + b"\x1b[2J \xff\n")
    _, page = read(run_dir)
    assert ATTACK + "<U+001B>[2J \ufffd" in page.text and "Messages" in page.text and "script" not in page.tags
    (run_dir / "log.txt").write_text("".join(f"line {n}\n" for n in range(1000)))
    _, page = read(run_dir)
    assert "line 699" not in page.text and "line 700\n" in page.text and "The last 300 lines" in page.text


def test_one_slow_step_of_a_long_run_is_no_slope(tmp_path):
    """Areas are steps: the time of one evaluation is not spread over its neighbours."""
    run_dir = make_run(tmp_path / "r", steps=0, rollouts=())
    lines = [{"step": n, "stage": 0, "time/train": 1.0, "time/eval": 50.0 if n == 50 else 0.0} for n in range(1, 101)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html, _ = read(run_dir)
    svg = html[html.index('aria-label="Time per step"') :]
    paths = [re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", path) for path in re.findall(r'd="([^"]*)"', svg)]
    areas = [path for path in paths if len(path) > 100]
    corners = [(a, b) for area in areas for a, b in pairwise(area) if a[1] != b[1]]
    assert len(areas) == 2 and corners and all(a[0] == b[0] for a, b in corners)  # every change of height is upright


def test_facts_leave_no_empty_block(full):
    html, _ = full
    rule = re.search(r"\.facts \{[^}]*\}", html)[0]
    assert "background" not in rule and "nowrap" in re.search(r"\.facts b \{[^}]*\}", html)[0]


def test_smooth_averages_but_never_across_a_stage_boundary():
    assert smooth([2.0] * 50) == [2.0] * 50
    assert smooth([0.0, 3.0] * 20)[10] == pytest.approx(1.2)
    assert smooth([1.0] * 20 + [9.0] * 20, [20]) == [1.0] * 20 + [9.0] * 20


def test_numbers_for_people():
    assert [duration(s) for s in (0.4, 42, 192, 18420)] == ["0.4 s", "42 s", "3 min 12 s", "5 h 07 min"]
    assert [count_text(n) for n in (0, 999, 12_600, 3.2e6)] == ["0", "999", "12.6 k", "3.2 M"]
    assert [tick_label(n) for n in (0, 0.25, 192, 16384, 2e-6)] == ["0", "0.25", "192", "16.4k", "2e-06"]
