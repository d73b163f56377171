"""The report's tooltips, contents, alarms, starts, and the settings that differ from the default."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest

from or1.config import Config
from or1.config.changes import is_default
from or1.config.peers import settings
from or1.run.starts import note_start
from tests.helpers.report_runs import Page, make_run, read

ATTACK = "<b onclick=alert(1)>\x1b[2J"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    run = make_run(tmp_path_factory.mktemp("runs") / "adder", steps=3, rollouts=(1,))
    first = {"time": 1.7e9, "command": ["/opt/x/or1", "train", "a.toml"], "or1": "0.1", "packages": {"torch": "2.0"}}
    again = {**first, "time": 1.8e9, "command": ["/opt/x/__main__.py", "train", ATTACK], "packages": {"torch": "3.0"}}
    for start in (first, first | {"packages": []}, again):
        note_start(run, start)
    log = "2026-01-01T00:00:00Z start: or1 started\n2026-01-01T00:00:00Z step 7: alarm: entropy collapsed "
    (run / "log.txt").write_text(f"{log}{ATTACK}\n2026-01-01T00:00:00Z step 8: resumed, no alarm: x\n")
    return read(run)


def test_each_step_of_a_plot_shows_its_values_under_the_pointer(page: tuple[str, Page]) -> None:
    html, _ = page
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    titles = [re.findall(r"<rect [^>]*><title>([^<]*)</title></rect>", plot) for plot in plots]
    assert len(plots) == 10 and all(titles)
    held_out, reward = titles[0], titles[1]
    first = r"step 0\nheldout avg@4: \d+\.\d % ± 3\.0 %\nheldout pass@4: .*\nhard avg@4: .*\n.*"
    assert re.fullmatch(first, held_out[0])
    assert [title.partition("\n")[0] for title in reward] == ["step 1", "step 2", "step 3"]
    assert all(re.search(r"\nmean reward: 0\.\d{3}$", title) for title in reward)
    found = re.findall(r'<rect x="([\d.]+)" [^>]*? width="([\d.]+)"', plots[1].partition('class="hover"')[2])
    places = [tuple(map(float, each)) for each in found]
    assert len(places) == 3
    for (left, width), (following, _) in pairwise(places):
        assert left + width == pytest.approx(following, abs=0.11), "the columns leave no gap"


def test_many_steps_share_columns(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", steps=0, rollouts=())
    lines = [{"step": step, "stage": 0, "reward/mean": step / 1000} for step in range(1, 1001)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html, _ = read(run)
    found = re.findall(r"<title>step (\d+)\nmean reward: ([\d.]+)</title>", html)
    assert 100 < len(found) <= 120
    assert all(float(value) == pytest.approx(int(step) / 1000, abs=5e-4) for step, value in found)


def test_contents_link_to_every_section(page: tuple[str, Page]) -> None:
    html, _ = page
    nav = re.search(r"<nav.*?</nav>", html, re.DOTALL)[0]
    names = ["curves", "evaluations", "transcripts", "messages", "starts", "config"]
    assert re.findall(r'href="#(\w+)"', nav) == names
    assert all(html.count(f'id="{name}"') == 1 for name in names)


def test_alarms_stand_on_top(page: tuple[str, Page]) -> None:
    html, _ = page
    shown = re.search(r'<ul class="card notes alarms">(.*?)</ul>', html)[1]
    assert shown.count("<li>") == 1
    assert "entropy collapsed &lt;b onclick=alert(1)&gt;&lt;U+001B&gt;[2J" in shown


def test_starts_show_command_and_versions_and_what_changed(page: tuple[str, Page]) -> None:
    html, parsed = page
    assert "b" in parsed.tags and "onclick" not in dict(parsed.attributes)
    assert "or1 train &#x27;&lt;b onclick" in html and "/opt/x" not in parsed.text
    assert "<td>torch</td><td>3.0</td>" in html
    assert "2 earlier" in parsed.text and "or1 train a.toml; torch 2.0" in parsed.text


def test_settings_that_differ_from_the_default_are_marked(page: tuple[str, Page]) -> None:
    html, _ = page
    assert "<tr class=own><td>entropy.control</td><td>adaptive</td></tr>" in html
    assert "<tr class=own><td>steps</td><td>24</td></tr>" in html and "<tr><td>reuse</td><td>1</td></tr>" in html
    assert "<tr><td>lr</td>" in html and html.count("<details>") == html.count(" at the default</summary>") > 10


def test_the_defaults_of_a_config_are_its_defaults() -> None:
    config = Config.model_validate({"run_dir": "r", "model": {"path": "m", "lora": {"rank": 8}}})
    raw = json.loads(config.model_dump_json())
    given = {path: value for path in settings(Config) if (value := at(raw, path)) is not None}
    own = [path for path, value in given.items() if not is_default(path.split("."), value)]
    assert len(given) > 80 and own == ["run_dir", "model.path", "model.lora.rank"]
    assert not is_default(("no", "such"), 1) and not is_default(("optim", "lr", "x"), 1)


def at(raw: dict, path: str) -> object:
    value: object = raw
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
