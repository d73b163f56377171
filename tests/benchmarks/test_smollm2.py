"""The learning curves of examples/smollm2: what is read of a run, and what is committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.smollm2.__main__ import ACCURACY, draw, row_of


def a_run(folder: Path, accuracies: dict[int, float]) -> Path:
    folder.mkdir()
    config = {"seed": 7, "optim": {"lr": 1e-5}, "stage": [{"steps": 2}]}
    (folder / "config.resolved.json").write_text(json.dumps(config))
    records = [{"step": step, "time": 1000.0 + 90 * step} for step in range(3)]
    for record in records[1:]:
        record |= {"reward/mean": 0.1 * record["step"], "time/step": 90.0}
    for step, accuracy in accuracies.items():
        records[step][ACCURACY] = accuracy
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_a_row_counts_minutes_from_the_first_evaluation(tmp_path: Path) -> None:
    row = row_of(a_run(tmp_path / "run", {0: 0.14, 2: 0.79}))
    assert [(p["step"], p["minutes"], p["accuracy"]) for p in row["held_out"]] == [(0, 0.0, 0.14), (2, 3.0, 0.79)]
    assert (row["seed"], row["rise_points"]) == (7, 65.0)
    assert [(s["step"], s["seconds"]) for s in row["steps"]] == [(1, 90.0), (2, 90.0)]
    draw(tmp_path / "a.svg", [row], "note")
    draw(tmp_path / "b.svg", [row], "note")
    assert "seed 7" in (tmp_path / "a.svg").read_text()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_run_with_one_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 evaluations"):
        row_of(a_run(tmp_path / "run", {0: 0.14}))


def test_the_committed_seeds_rise_as_the_page_says(root: Path) -> None:
    rows = json.loads((root / "benchmarks/results/smollm2/addition.json").read_text())["rows"]
    page = (root / "examples/smollm2/README.md").read_text()
    assert [row["seed"] for row in rows] == [1, 2, 3]
    for row in rows:
        first, last = (100 * row["held_out"][i]["accuracy"] for i in (0, -1))
        assert f"| {row['seed']} | {first:.1f} -> {last:.1f} % |" in page
        assert last - first == pytest.approx(row["rise_points"])
        assert len(row["steps"]) == row["planned_steps"], "a finished run"
