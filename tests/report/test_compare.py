"""`or1 report A B`: several runs on one page; `or1 watch`: the page of a run that continues."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from or1.cli import main
from or1.commands.watch import watch
from or1.core.errors import ReportError
from or1.report.compare import write_comparison
from or1.report.page_data import load_run
from tests.helpers.report_runs import Page, make_config, make_graded, make_run


def keep_few(run: Path) -> None:
    """Leave few metrics, since every plot takes a quarter of a second."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    few = ("step", "stage", "time", "reward/mean", "reward/graded", "policy/entropy", "completion/len_mean")
    lines = [{key: line[key] for key in line if key in few or key.startswith("eval/heldout")} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def runs(folder: Path) -> tuple[Path, Path]:
    """Make two runs; the second has another learning rate, a lower reward and an odd name."""
    first, second = make_run(folder / "first", steps=24, rollouts=()), make_run(folder / "<b>", steps=12, rollouts=())
    for run in (first, second):
        keep_few(run)
    config = json.loads((second / "config.resolved.json").read_text())
    config["optim"]["lr"], config["stage"][1]["reuse"] = 0.5, 2
    (second / "config.resolved.json").write_text(json.dumps(config))
    return first, second


def test_runs_lie_over_each_other_with_their_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = runs(tmp_path)
    assert main(["report", str(first), str(second)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "comparison.html")
    html = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    page = Page(html)
    differing = html[html.index("Settings that differ") : html.index('id="curves"')]
    assert re.findall(r"<tr><td>([^<]*)</td>", differing) == ["model.path", "optim.lr", "stage.1.reuse"]
    assert "<td>1e-06</td><td>0.5</td>" in differing and "<th>&lt;b&gt;</th>" in differing and "b" not in page.tags[9:]
    assert "24 / 60" in page.text and "12 / 60" in page.text
    plots = dict(re.findall(r'role="img" aria-label="([^"]*)">(.*?)</svg>', html, re.DOTALL))
    assert plots.keys() == {"heldout avg@4", "Reward", "Entropy", "Length"}
    assert re.search(r"<title>step 12\nfirst: 0\.\d{3}\n&lt;b&gt;: 0\.\d{3}</title>", plots["Reward"])
    assert "<title>step 24\nfirst: 0." in plots["Reward"], "only one run got so far"
    assert {"script", "img", "link"}.isdisjoint(page.tags)


def test_graded_runs_are_compared_by_their_mean_reward(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, second = (make_graded(tmp_path / name / "run") for name in ("a", "b"))
    for run in (first, second):
        keep_few(run)
    page = Page(write_comparison([first, second], tmp_path / "out.html").read_text(encoding="utf-8"))
    assert "heldout reward" in page.text and "-0.100 \u2192 0.400" in page.text
    assert f"{tmp_path}/a/run" in page.text, "equal names are told apart by their paths"


def test_a_name_in_the_metrics_is_text(tmp_path: Path) -> None:
    first, second = runs(tmp_path)
    lines = (first / "metrics.jsonl").read_text().splitlines()
    odd = json.dumps({'eval/"><u>\\1\\g<x>&/avg@4': 0.5})
    (first / "metrics.jsonl").write_text("".join(f"{line[:-1]}, {odd[1:]}\n" for line in lines))
    page = write_comparison([first, second], tmp_path / "out.html").read_text(encoding="utf-8")
    assert 'aria-label="&quot;&gt;&lt;u&gt;\\1\\g&lt;x&gt;&amp; avg@4"' in page and "u" not in Page(page).tags


def test_too_many_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ReportError, match="9 runs on one page cannot be told apart; name at most 8"):
        write_comparison([tmp_path] * 9)
    assert main(["report", str(tmp_path), str(tmp_path)]) == 70
    assert "is not a run" in capsys.readouterr().err


LINES = [json.dumps({"step": step, "stage": 0, "reward/mean": 0.5}) + "\n" for step in range(61)]


def begin(run: Path, text: str) -> Path:
    run.mkdir()
    (run / "config.resolved.json").write_text(make_config(run).model_dump_json())
    (run / "metrics.jsonl").write_text(text)
    return run


def test_a_watched_page_renews_itself_until_the_last_step(tmp_path: Path) -> None:
    run, pages = tmp_path / "run", list[str]()

    def later(seconds: float) -> None:
        """Let the run begin, then do its steps, while the watch waits."""
        assert seconds == 7
        if not run.exists():
            begin(run, LINES[0][:20])
            return
        if (run / "report.html").exists():
            pages.append((run / "report.html").read_text(encoding="utf-8"))
        (run / "metrics.jsonl").write_text("".join(LINES if pages else LINES[:3]))

    last = watch(run, 7, later).read_text(encoding="utf-8")
    assert len(pages) == 1 and '<meta http-equiv="refresh" content="7">' in pages[0] and "2 / 60" in pages[0]
    assert 'http-equiv="refresh"' not in last and "60 / 60" in last


def test_a_run_that_ended_early_by_its_plateau_is_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=12, rollouts=())
    keep_few(run)
    config = json.loads((run / "config.resolved.json").read_text())
    config["stage"][-1]["until"] = "plateau"
    (run / "config.resolved.json").write_text(json.dumps(config))

    def commit(_: float) -> None:
        naps.append(load_run(run).finished)
        folder = run / "checkpoints" / "step_12"
        folder.mkdir(parents=True)
        state = {"step": 12, "stages": {"index": len(config["stage"]), "began": 12, "history": []}}
        (folder / "manifest.json").write_text(json.dumps({"format": 2, "step": 12, "files": {}, "state": state}))

    naps: list[bool] = []
    page = watch(run, 5, commit).read_text(encoding="utf-8")
    assert naps == [False] and "not finished" not in page and "finished" in page


def test_an_interrupted_watch_leaves_a_page_that_does_not_renew_itself(tmp_path: Path) -> None:
    run = begin(tmp_path / "run", "".join(LINES[:2]))

    def interrupt(_: float) -> None:
        assert 'http-equiv="refresh"' in (run / "report.html").read_text(encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch(run, 5, interrupt)
    assert 'http-equiv="refresh"' not in (run / "report.html").read_text(encoding="utf-8")
