"""Learning curves of real runs: `python -m benchmarks.smollm2 OUT_DIR RUN... --commit C` writes JSON and a picture.

A RUN is a run directory of examples/smollm2/addition.toml. OUT_DIR gets addition.json and addition.svg. Time counts
from the end of the evaluation before step 1, as metrics.jsonl records it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.lib import style
from benchmarks.lib.results import write_json
from or1.run.metrics_log import read_metrics

ACCURACY = "eval/greedy/avg@1"


def row_of(run: Path) -> dict[str, Any]:
    """Return seed, settings, accuracies and steps of a run. Raises ValueError for a run without two evaluations."""
    config = json.loads((run / "config.resolved.json").read_text(encoding="utf-8"))
    records = read_metrics(run / "metrics.jsonl")
    start = records[0]["time"]
    evaluated = [r for r in records if ACCURACY in r]
    if len(evaluated) < 2:
        raise ValueError(f"{run} has {len(evaluated)} evaluations; a curve needs two")
    minutes = {r["step"]: (r["time"] - start) / 60 for r in records}
    return {
        "seed": config["seed"],
        "planned_steps": sum(stage["steps"] for stage in config["stage"]),
        "lr": config["optim"]["lr"],
        "stage": config["stage"],
        "held_out": [
            {"step": r["step"], "minutes": round(minutes[r["step"]], 2), "accuracy": r[ACCURACY]} for r in evaluated
        ],
        "rise_points": round(100 * (evaluated[-1][ACCURACY] - evaluated[0][ACCURACY]), 1),
        "steps": [
            {"step": r["step"], "reward": r["reward/mean"], "seconds": round(r["time/step"], 2)}
            for r in records
            if "time/step" in r
        ],
    }


def draw(path: Path, rows: list[dict[str, Any]], note: str) -> None:
    """Write the learning curves as an SVG: held-out accuracy in % against minutes."""
    import matplotlib
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(style.rc()):
        figure = Figure(figsize=(7, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for row in rows:
            points = row["held_out"]
            x, y = [p["minutes"] for p in points], [100 * p["accuracy"] for p in points]
            axes.plot(x, y, marker="o", label=f"seed {row['seed']}")
        axes.set_ylim(0, 100)
        axes.set_xlim(left=0)
        axes.set_xlabel("minutes of training")
        axes.set_ylabel("held-out, greedy, % correct")
        axes.set_title(note, loc="left")
        axes.grid(axis="y")
        axes.legend()
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Write addition.json and addition.svg."""
    parser = argparse.ArgumentParser(description="Learning curves of runs of examples/smollm2/addition.toml.")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--commit", required=True, help="commit of the clone in which the runs were made")
    parser.add_argument("--load", required=True, help="what else the machine did meanwhile")
    arguments = parser.parse_args()
    rows = sorted((row_of(run) for run in arguments.runs), key=lambda row: row["seed"])
    write_json(arguments.out / "addition.json", rows, runs_commit=arguments.commit, load=arguments.load)
    draw(arguments.out / "addition.svg", rows, "SmolLM2-135M-Instruct, two-digit addition, 2 CPU cores")
    for row in rows:
        first, last = row["held_out"][0], row["held_out"][-1]
        print(f"seed {row['seed']}: {first['accuracy']:.1%} -> {last['accuracy']:.1%} in {last['minutes']} minutes")


if __name__ == "__main__":
    main()
