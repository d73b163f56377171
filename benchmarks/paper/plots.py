"""One plot a claim: exact entropy and accuracy of its arms, the mean of the seeds and their middle half."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.paper.arms import ARMS
from benchmarks.paper.claims import Claim
from benchmarks.paper.measures import Records, of_arm

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(path: Path, claim: Claim, records: Records) -> None:
    """Write the plot of a claim."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(claim.shown):
        runs = of_arm(records, name)
        entropy, accuracy = (np.array([r["series"][key] for r in runs]) for key in ("entropy", "accuracy"))
        times = ARMS[name].times if claim.by == "rollouts" else 1
        x = np.linspace(0, 100 * times, entropy.shape[1])
        x = x[x <= 100]
        _curve(left, x, np.log(entropy[:, : len(x)]), name, f"C{i}", log=True)
        _curve(right, x, accuracy[:, : len(x)], name, f"C{i}")
    words = {"share": "% of the run (equal responses)", "rollouts": "% of the rollouts"}[claim.by]
    left.set(xlabel=words, ylabel="entropy, nats a token", yscale="log")
    right.set(xlabel=words, ylabel="accuracy")
    right.legend(fontsize=8)
    figure.suptitle(claim.title, fontsize=10)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    with matplotlib.rc_context({"svg.hashsalt": claim.key}):
        figure.savefig(path, metadata={"Date": None})


def _curve(axis: Axes, x: Sequence[float], runs: np.ndarray, label: str, color: str, *, log: bool = False) -> None:
    shown = np.exp if log else np.asarray
    low, high = np.quantile(runs, (0.25, 0.75), axis=0)
    axis.plot(x, shown(runs.mean(0)), color=color, label=label)
    axis.fill_between(x, shown(low), shown(high), color=color, alpha=0.15, linewidth=0)
