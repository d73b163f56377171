"""The list of metrics: complete for a run and for the code, and the page made from it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from or1.cli import main
from or1.core.metric_names import METRICS, RECORD_KEYS, UNITS, find_metric, markdown, metric
from or1.core.text import value_text
from or1.core.types import Status
from or1.report.page_charts import charts
from or1.report.page_data import load_run
from or1.reward.terms import RIGHT
from tests.helpers.small_run import ROOT, arguments, lines

GROUPS = {each.name.partition("/")[0] for each in METRICS}
LITERAL = re.compile(rf"(?:{'|'.join(sorted(GROUPS))})/[a-z0-9_/]+")


REMEDY = "add it to or1/core/metric_names.py, then run: python -m or1.core.metric_names > docs/metrics.md"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with an evaluation after each."""
    folder = tmp_path_factory.mktemp("metrics") / "run"
    held_out = f'[{{name="sums", path="{ROOT}/examples/tiny-adder/heldout.jsonl", samples=2, limit=4}}]'
    settings = {"eval__sets": held_out, "eval__every_steps": 1, "stage__0__steps": 1, "stage__1__steps": 1}
    assert main(arguments(folder, **settings)) == 0
    return folder


def test_every_metric_of_a_run_is_listed(run_dir: Path) -> None:
    records = lines(run_dir)
    assert [record["step"] for record in records] == [0, 1, 2]
    keys = {key for record in records for key in record} - set(RECORD_KEYS)
    assert len(keys) > 50
    assert not {key for key in keys if find_metric(key) is None}, REMEDY
    assert not {key for key in keys if metric(key).derived}
    # The one duplicate, which readers of older runs rely on.
    assert all(r["time/reward"] == r["time/reward_exposed"] for r in records if r["step"])


def test_every_metric_that_the_code_names_is_listed(root: Path) -> None:
    unknown = [f"{path}: {text}" for path, text in literals(root) if find_metric(text) is None]
    assert not unknown, REMEDY


def literals(root: Path) -> Iterator[tuple[str, str]]:
    """Strings of the form group/name in or1/; those that are parts of f-strings lack their variable end."""
    for path in sorted((root / "or1").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in parts]
        for text in (str(node.value) for node in texts):
            if LITERAL.fullmatch(text):
                yield str(path.relative_to(root)), text


def test_the_charts_draw_listed_metrics(run_dir: Path) -> None:
    lines_ = [line for chart in charts(load_run(run_dir)) for panel in chart.panels for line in panel.lines]
    assert lines_ and all(line.legend for line in lines_)
    assert {line.key for line in lines_ if line.percent} >= {"completion/truncated", "group/solved", "policy/clip_frac"}


def test_entries_are_whole() -> None:
    names = [each.name for each in METRICS]
    assert len(set(names)) == len(names)
    assert {each.unit for each in METRICS} <= set(UNITS)
    for each in METRICS:
        assert value_text(RIGHT, each.kind) and each.label and each.meaning.endswith("."), each.name
    assert all(metric(f"reward/status/{status.value}").unit == "share" for status in Status)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("eval/aime 24/avg@32", "eval/NAME/avg@K"),
        ("eval/K/avg@4_ci95", "eval/NAME/avg@K_ci95"),
        ("eval/x/pass@16", "eval/NAME/pass@K"),
        ("eval/x/reward_mean_ci95", "eval/NAME/reward_mean_ci95"),
        ("reward/mean", "reward/mean"),
    ],
)
def test_a_name_is_found_by_its_pattern(name: str, entry: str) -> None:
    assert metric(name).name == entry


@pytest.mark.parametrize("name", ["reward/means", "eval/x/avg@", "eval/x/y/avg@4", "mean", "eval/x/avg@4/ci"])
def test_an_unknown_name_is_refused(name: str) -> None:
    assert find_metric(name) is None
    with pytest.raises(KeyError, match=r"add it to or1/core/metric_names\.py"):
        metric(name)


def test_the_page_of_metrics_is_fresh(root: Path) -> None:
    page = (root / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert page == markdown(), "python -m or1.core.metric_names > docs/metrics.md"
