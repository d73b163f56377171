"""The pictures of README from a recorded run, and the pages of or1 as a real browser lays them out."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.lib.browser import find_chromium, measure
from benchmarks.pictures.__main__ import MOST_BYTES, main, panel
from or1.report.compare import write_comparison
from or1.report.page import write_report
from or1.run.starts import note_start
from tests.helpers.report_runs import make_graded, make_run

PICTURES = ("panel-light.svg", "panel-dark.svg", "report-light.png", "report-dark.png")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_panel_is_a_picture_of_the_recorded_values(scheme: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rollouts=())
    svg = panel(run, 30, "or1 train x.toml", scheme)
    words = "".join(ElementTree.fromstring(svg).itertext()).replace("\xa0", " ")
    assert "step 30/60" in words and "or1 train x.toml" in words and "heldout avg@4" in words
    assert "stage 2/2, limit 192 tokens" in words and re.search(r"elapsed \d:\d\d", words)
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", ""), "nothing is loaded from elsewhere"
    assert len(svg) < MOST_BYTES


def test_the_pictures_of_the_readme_are_there_and_small(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    for name in PICTURES:
        assert 1000 < (root / "docs" / "pictures" / name).stat().st_size <= MOST_BYTES
        assert f"docs/pictures/{name}" in readme


needs_browser = pytest.mark.skipif(find_chromium() is None, reason="needs a Chromium")


@needs_browser
@pytest.mark.nightly
def test_the_command_writes_all_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", rollouts=())
    monkeypatch.setattr(sys, "argv", ["pictures", str(tmp_path / "out"), str(run)])
    assert main() == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(PICTURES)
    assert "bytes" in capsys.readouterr().out


@needs_browser
@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["accuracy", "graded", "comparison"])
def test_pages_fit_phones_and_wide_screens_light_and_dark(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    run = make_graded(tmp_path / "a" / "run") if kind == "graded" else make_run(tmp_path / "a" / "run")
    words = ["or1", "train", "examples/a-config-with-a-rather-long-name.toml", "--set", "run_dir=/scratch/me/runs/name"]
    note_start(run, {"time": 1.7e9, "command": words, "or1": "0.1.0", "packages": {"torch": "2.13.0+cu130"}})
    (run / "log.txt").write_text(f"2026-01-01T00:00:00Z step 7: alarm: entropy collapsed {'x' * 300}\n")
    page = write_comparison([run, run]) if kind == "comparison" else write_report(run)
    for width in (360, 800, 1600):
        for scheme in ("light", "dark"):
            found = measure(page, width=width, scheme=scheme)
            assert found["scroll_width"] == found["width"] <= width, (width, scheme)
            assert (found["sticking_out"], found["cut"], found["faint"]) == ([], [], []), (width, scheme)
            assert (found["background"] > 0.8) is (scheme == "light") and (found["background"] < 0.05) is (
                scheme == "dark"
            )
            assert len(found["plots"]) > 5 and min(found["plots"]) > 240 and found["columns"] > 100
            for row, cells, widths in found["facts"]:
                assert cells == len(widths) and min(widths) >= 139, "no cell is squeezed"
                per_row = round(row / widths[0])
                assert per_row * widths[0] == pytest.approx(row, abs=4), "cells fill the row"
