"""The report of broken and hostile runs: what cannot be read is left out and named."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from or1.report.page import ReportError, write_report
from or1.report.page_data import load_run
from tests.helpers.report_runs import make_run, read


@pytest.fixture
def no_plots(monkeypatch):
    """Leave out the plots, which take most of the time of a page and have tests of their own."""
    monkeypatch.setattr("or1.report.page.render_plots", lambda run: ((), ()))


def test_cut_last_line_and_broken_lines_are_left_out_and_named(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=5, rollouts=())
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:3]) + b'\xff{"step": 3}\n[1]\n' + b"".join(lines[3:5]) + lines[5][:40])
    _, page = read(run_dir)
    assert "The last line of metrics.jsonl is incomplete" in page.text
    assert "2 unreadable lines left out (first: line 4)" in page.text
    assert "4 / 60" in page.text


def test_lines_after_a_resume_replace_those_of_the_lost_future(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=8, rollouts=())
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "stage": 0, "time": 1.75e9, "reward/mean": 0.987}) + "\n")
    run = load_run(run_dir)
    assert run.last_step == 6 and run.series("reward/mean")[1][-1] == 0.987
    assert "went back from step 8 to 6" in "".join(run.notes)


@pytest.mark.parametrize("value", ["NaN", "null", "Infinity", '"high"', "true", "[1]", "1" + "0" * 400])
def test_values_that_are_no_finite_number_are_left_out(tmp_path, value):
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"step": 0, "eval/a/avg@1": {value}}}\n{{"step": 1, "reward/mean": {value}, "time/step": {value}, '
        f'"stage": {value}, "time": {value}, "optim/grad_norm": 0.5}}\n'
    )
    _, page = read(tmp_path)
    assert page.tags.count("svg") == 1 and "config.resolved.json is missing" in page.text


def test_unreadable_rollouts_are_named_and_others_used(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=40, rollouts=(1, 20, 40))
    last = run_dir / "rollouts" / "step_40.parquet"
    last.write_bytes(last.read_bytes()[:200])
    pq.write_table(pa.table({"step": [1]}), run_dir / "rollouts" / "step_1.parquet")
    html, page = read(run_dir)
    assert "rollouts/step_40.parquet cannot be read" in page.text and "missing columns" in page.text
    assert html.count('class="tag solved"') == 1


def test_a_config_of_another_version_is_shown_but_not_used(tmp_path):
    run_dir = make_run(tmp_path / "r", steps=2, rollouts=())
    raw = json.loads((run_dir / "config.resolved.json").read_text())
    (run_dir / "config.resolved.json").write_text(json.dumps(raw | {"novelty": {"a": 1}}))
    _, page = read(run_dir)
    assert "does not fit this version of or1 (1 problems)" in page.text and "[novelty]" in page.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is not a folder"),
        (lambda path: path.mkdir(), "has no metrics.jsonl"),
        (lambda path: (path.mkdir(), (path / "metrics.jsonl").write_text('{"step": 0, "ti')), "no complete step yet"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path, make, message):
    make(tmp_path / "r")
    with pytest.raises(ReportError, match=message) as caught:
        write_report(tmp_path / "r")
    assert str(tmp_path / "r") in str(caught.value)


DEEP = "[" * 100_000 + "]" * 100_000
HUGE = ", ".join(
    f'"{key}": 1e308'
    for key in (
        "time",
        "time/step",
        "time/rollout",
        "reward/mean",
        "optim/grad_norm",
        "completion/len_mean",
        "completion/count",
        "eval/a/avg@1",
        "eval/a/reward_mean",
    )
)


@pytest.mark.parametrize(
    "line",
    [
        f'{{"step": 4, "x": {DEEP}}}',
        f'{{"step": 4, "eval/x/avg@{"9" * 5000}": 0.5}}',
        f'{{"step": {"9" * 300}}}',
        f'{{"step": 4, {HUGE}}}\n{{"step": 5, {HUGE}}}',
        '{"step": 4, "time": 1e90}',
        '{"step": 4, "eval/a/avg@1": 0.5, "eval/a/avg@1_ci95": -1, "eval/a/reward_mean_ci95": -1}',
    ],
    ids=["deep", "digits", "step", "huge", "time", "interval"],
)
def test_hostile_metrics_are_left_out(tmp_path, line):
    run_dir = make_run(tmp_path / "r", steps=3, rollouts=())
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    _, page = read(run_dir)
    assert "avg@99" not in page.text and "Curves" in page.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'{{"a": {DEEP}}}', "is not valid JSON"),
        ('{"a": ' + "[" * 400 + "]" * 400 + ', "b": [' + '{"a":' * 400 + "1" + "}" * 400 + "]}", "does not fit"),
    ],
    ids=["too deep to parse", "deep"],
)
def test_a_deep_config_is_a_note(tmp_path, no_plots, text, said):
    run_dir = make_run(tmp_path / "r", steps=1, rollouts=())
    (run_dir / "config.resolved.json").write_text(text)
    _, page = read(run_dir)
    assert said in page.text


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("advantage", pa.array(["text"] * 4)),
        ("advantage", pa.array([2**62] * 4, pa.duration("s"))),
        ("golds", pa.array([[1.5]] * 4)),
        ("token_ids", pa.array([["x"]] * 4)),
        ("logp", pa.array([[None]] * 4)),
        ("status", pa.array([1] * 4)),
        ("reward", pa.array([b"\xff"] * 4)),
        ("response", pa.array([{"a": 1}] * 4)),
    ],
)
def test_columns_of_other_types_are_a_note(tmp_path, no_plots, column, values):
    run_dir = make_run(tmp_path / "r", steps=1, rollouts=(1,))
    path = run_dir / "rollouts" / "step_1.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, values), path)
    _, page = read(run_dir)
    assert "rollouts/step_1.parquet cannot be read: " in page.text and "Transcripts" not in page.text


@pytest.mark.parametrize("text", ['{"a": 1}', f'{{"a": {DEEP}}}'], ids=["no tokenizer", "deep"])
def test_a_hostile_tokenizer_leaves_transcripts_plain(tmp_path, no_plots, text):
    run_dir = make_run(tmp_path / "r", steps=1, rollouts=(1,))
    (run_dir / "model" / "tokenizer.json").write_text(text)
    _, page = read(run_dir)
    assert "Shading" not in page.text and "First add the ones" in page.text
