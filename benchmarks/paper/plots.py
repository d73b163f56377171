"""One plot a claim: exact entropy and accuracy of its arms, the mean of the seeds and their middle half."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.paper.arms import ARMS
from benchmarks.paper.claims import Claim
from benchmarks.paper.measures import MEASURES, MIDDLE, Records, of_arm
from benchmarks.paper.statistics import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(path: Path, claim: Claim, records: Records) -> None:
    """Write the plot of a claim: entropy, accuracy, and accuracy at the end with its 90 % interval."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(4, 4, 3))
    for i, name in enumerate(claim.shown):
        runs = of_arm(records, name)
        entropy, accuracy = (np.array([r["series"][key] for r in runs]) for key in ("entropy", "accuracy"))
        times = ARMS[name].times if claim.by == "rollouts" else 1
        x = np.linspace(0, 100 * times, entropy.shape[1])
        x = x[x <= 100]
        _curve(left, x, np.log(entropy[:, : len(x)]), f"C{i}", log=True)
        _curve(middle, x, accuracy[:, : len(x)], f"C{i}")
        end = interval([MEASURES["accuracy"].of(r) for r in runs])
        right.errorbar(end.mean, -i, xerr=[[end.mean - end.low], [end.high - end.mean]], fmt="o", color=f"C{i}")
    words = {"share": "% of the run (equal responses)", "rollouts": "% of the rollouts"}[claim.by]
    left.axvline(100 * MIDDLE, color="grey", linewidth=0.8, linestyle=":")
    left.set(xlabel=words, ylabel="entropy, nats a token", yscale="log")
    middle.set(xlabel=words, ylabel="accuracy")
    right.set(xlabel="accuracy in the last quarter", yticks=[-i for i in range(len(claim.shown))])
    right.set_yticklabels(claim.shown)
    right.margins(y=0.15)
    figure.suptitle(f"{claim.key}: {claim.title}", fontsize=11)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    with matplotlib.rc_context({"svg.hashsalt": claim.key, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})


def _curve(axis: Axes, x: np.ndarray, runs: np.ndarray, color: str, *, log: bool = False) -> None:
    shown = np.exp if log else np.asarray
    low, high = np.quantile(runs, (0.25, 0.75), axis=0)
    axis.plot(x, shown(runs.mean(0)), color=color)
    axis.fill_between(x, shown(low), shown(high), color=color, alpha=0.15, linewidth=0)
