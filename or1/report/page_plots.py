"""The plots of the report: SVG from matplotlib, with CSS variables as colours for light and dark mode."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from or1.core.metric_names import metric
from or1.core.records import number
from or1.core.text import duration, value_text
from or1.core.types import Status
from or1.report.page_charts import Chart, Panel, charts
from or1.report.page_data import RecordedRun
from or1.report.page_svg import COLORS, STYLE, svg_of
from or1.report.records import PHASES, EvalHistory, eval_histories, other_seconds
from or1.reward.terms import NO_THINK_CLOSE, no_think_close, status_word

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMOOTH_FROM = 30  # steps
_MAX_DOTS = 1000
_MAX_BARS = 80
_MAX_STEPS_DRAWN_AS_STEPS = 100
_BINS = 150
_WIDTH_IN = 5.8


@dataclass(frozen=True)
class Legend:
    """One entry of the legend, which the page draws. `mark` is "line", "dash" or "fill"."""

    label: str
    color: str
    mark: str = "line"


@dataclass(frozen=True)
class Plot:
    """A finished plot with title, caption and legend."""

    title: str
    caption: str
    svg: str
    legend: tuple[Legend, ...]
    wide: bool = False


def render_plots(run: RecordedRun) -> tuple[list[Plot], list[str]]:
    """Return the plots that the run has values for, and the titles of the other plots."""
    import matplotlib

    plots, missing = [], []
    with matplotlib.rc_context(STYLE):
        for title, draw in _catalogue(run):
            plot = draw()
            if plot is None:
                missing.append(title)
            else:
                plots.append(plot)
    return plots, missing


def _catalogue(run: RecordedRun) -> Iterator[tuple[str, Callable[[], Plot | None]]]:
    if run.graded:
        yield "Held-out reward", partial(_mean_rewards, run)
    yield "Held-out accuracy", partial(_evaluations, run)
    reward, *rest = charts(run)
    yield reward.title, partial(_lines, run, reward)
    yield "Outcomes", partial(_outcomes, run)
    for chart in rest:
        yield chart.title, partial(_lines, run, chart)
    yield "Time per step", partial(_time, run)


def _lines(run: RecordedRun, chart: Chart) -> Plot | None:
    panels = [panel for panel in chart.panels if any(run.series(line.key)[0] for line in panel.lines)]
    if not panels:
        return None
    figure, axes = _figure(run, [panel.height for panel in panels])
    legend: list[Legend] = []
    for ax, panel in zip(axes, panels, strict=True):
        legend += _draw_panel(run, ax, panel)
    shown = {line.legend: _texts(run, line.key) for panel in panels for line in panel.lines}
    return Plot(chart.title, chart.caption, svg_of(figure, chart.title, shown), tuple(legend))


def _texts(run: RecordedRun, key: str) -> dict[int, str]:
    """Return the values of a metric as text by step."""
    return {step: value_text(value, metric(key).kind) for step, value in zip(*run.series(key), strict=True)}


def _draw_panel(run: RecordedRun, ax: Axes, panel: Panel) -> list[Legend]:
    legend, highest, lowest = [], 0.0, math.inf
    for line in panel.lines:
        steps, values = run.series(line.key, line.scale)
        if steps:
            draw = _draw_steps if panel.exact else draw_line
            draw(ax, steps, values, COLORS[line.color], run.stage_starts())
            legend.append(Legend(line.legend, line.color))
            highest, lowest = max(highest, *values), min(lowest, *values)
    if panel.reference is not None:
        label, xs, ys = panel.reference
        ax.plot(xs, ys, color=COLORS["muted"], linewidth=1.1, linestyle=(0, (4, 3)), zorder=3)
        legend.append(Legend(label, "muted", "dash"))
        highest = max(highest, *ys)
    if panel.log and lowest > 0 and highest / lowest > 100:
        ax.set_yscale("log")
    elif panel.zero and lowest >= 0:
        ax.set_ylim(0, panel.top or (highest * 1.08 if highest > 0 else 1))
    format_y(ax, panel.unit)
    return legend


def _draw_steps(ax: Axes, steps: Sequence[int], values: Sequence[float], color: str, _: object) -> None:
    """Draw values as steps, or as dots if there are many: a line through an on-off value would fill the panel."""
    if len(steps) > _MAX_STEPS_DRAWN_AS_STEPS:
        _draw_dots(ax, steps, values, color, 0.7)
        return
    ax.step(steps, values, where="mid", color=color, linewidth=1.4, marker="o" if len(steps) == 1 else "")


def draw_line(
    ax: Axes, steps: Sequence[int], values: Sequence[float], color: str, stages: Sequence[tuple[int, int]]
) -> None:
    """Draw a line through the points; through many points, a smoothed line over dots."""
    if len(steps) < _SMOOTH_FROM:
        ax.plot(steps, values, color=color, linewidth=1.8, marker="o", markersize=3.2 if len(steps) > 1 else 5)
        return
    _draw_dots(ax, steps, values, color, 0.38)
    breaks = [bisect_left(steps, first) for first, _ in stages[1:]]
    ax.plot(steps, smooth(values, breaks), color=color, linewidth=1.9)


def _draw_dots(ax: Axes, steps: Sequence[int], values: Sequence[float], color: str, alpha: float) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    # One path of zero-length strokes with round caps. A marker for each point would make the page megabytes long.
    stride = math.ceil(len(steps) / _MAX_DOTS)
    dots = [point for point in zip(steps[::stride], values[::stride], strict=True) for _ in range(2)]
    path = Path(dots, [Path.MOVETO, Path.LINETO] * (len(dots) // 2))
    path.should_simplify = False
    ax.add_patch(PathPatch(path, fill=False, edgecolor=color, alpha=alpha, linewidth=2.6, capstyle="round"))


def smooth(values: Sequence[float], breaks: Sequence[int] = ()) -> list[float]:
    """Return the centred moving average over about 1/40 of the values, never across the indices in `breaks`."""
    half = max(2, len(values) // 80)
    edges = [0, *breaks, len(values)]
    means = []
    for start, end in pairwise(edges):
        for i in range(start, end):
            window = values[max(start, i - half) : min(end, i + half + 1)]
            means.append(math.fsum(window) / len(window))
    return means


def _figure(run: RecordedRun, heights: Sequence[float], wide: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure of stacked panels on one axis of steps, with the boundaries of stages."""
    figure, axes = new_figure(run.last_step, heights, wide)
    _mark_stages(run, axes)
    return figure, axes


def new_figure(last: int, heights: Sequence[float], wide: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure of stacked panels on one axis of steps from 0 to `last`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(2 * _WIDTH_IN + 0.5 if wide else _WIDTH_IN, 2.9), layout="constrained")
    axes: list[Axes] = list(
        figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights))[:, 0]
    )
    for ax in axes:
        ax.grid(axis="y")
        ax.margins(x=0.02)
        ax.set_xlim((-0.5, last + 0.5) if last < 50 else (-0.01 * last, last * 1.01))
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    return figure, axes


def _mark_stages(run: RecordedRun, axes: Sequence[Axes]) -> None:
    starts = run.stage_starts()
    if len(starts) < 2:
        return
    for order, (step, index) in enumerate(starts):
        left = step - 0.5 if order else 0
        for ax in axes if order else ():
            ax.axvline(left, color=COLORS["ink"], linewidth=0.8, alpha=0.6, zorder=4)
        axes[0].annotate(
            f"stage {index + 1}",
            (left, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=7.5,
        )


def format_y(ax: Axes, unit: str) -> None:
    """Set ticks and labels of the values. unit: "%" or empty."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    if ax.get_yscale() == "log":
        ax.yaxis.set_major_locator(LogLocator(numticks=5))
        ax.yaxis.set_minor_locator(LogLocator(numticks=1))
    else:
        place = ax.get_subplotspec()
        small = place is not None and place.get_gridspec().nrows > 1 and not place.is_first_row()
        ax.yaxis.set_major_locator(MaxNLocator(2 if small else 5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=2))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: tick_label(value) + (" %" if unit == "%" else "")))


def tick_label(value: float) -> str:
    """Return a number as short text for an axis: 16384 -> 16.4k."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.0e}" if 0 < size < 1e-4 else f"{value:.4g}"


def _evaluations(run: RecordedRun) -> Plot | None:
    histories = eval_histories(run.records)
    if not histories:
        return None
    figure, (ax,) = _figure(run, [1], wide=True)
    legend: list[Legend] = []
    shown: dict[str, dict[int, str]] = {}
    for order, history in enumerate(histories[:8]):
        color = f"s{order + 1}"
        _draw_history(ax, history, COLORS[color])
        legend.append(Legend(f"{history.name} avg@{history.k}", color))
        shown[legend[-1].label] = {p.step: _with_interval(p.avg, p.ci95, "percent") for p in history.points}
        if history.k > 1 and any(math.isfinite(point.pass_at_k) for point in history.points):
            legend.append(Legend(f"{history.name} pass@{history.k}", color, "dash"))
            shown[legend[-1].label] = {p.step: value_text(p.pass_at_k, "percent") for p in history.points}
    ax.set_ylim(0, min(105, ax.get_ylim()[1]))
    format_y(ax, "%")
    caption = "Accuracy on the evaluation sets; bars are 95 % intervals."
    return Plot("Held-out accuracy", caption, svg_of(figure, "Held-out accuracy", shown), tuple(legend), wide=True)


def _with_interval(value: float, half: float, kind: str) -> str:
    interval = f" \u00b1 {value_text(half, kind)}" if math.isfinite(half) else ""
    return value_text(value, kind) + interval


def _draw_history(ax: Axes, history: EvalHistory, color: str) -> None:
    points = [(point.step, 100 * point.avg, 100 * number(point.ci95, 0.0)) for point in history.points]
    draw_points(ax, points, color)
    passed = [(point.step, 100 * point.pass_at_k) for point in history.points if math.isfinite(point.pass_at_k)]
    if history.k > 1 and passed:
        ax.plot(*zip(*passed, strict=True), color=color, linewidth=1.2, linestyle=(0, (4, 3)))


def draw_points(ax: Axes, points: Sequence[tuple[int, float, float]], color: str) -> None:
    """Draw points of (step, value, half width of the interval of the value)."""
    steps, values, widths = zip(*points, strict=True)
    size = 5 if len(steps) <= 40 else 2.5
    # matplotlib refuses a negative width, which only an edited file has.
    errors = [max(width, 0.0) for width in widths]
    ax.errorbar(steps, values, yerr=errors, color=color, linewidth=2, elinewidth=1.1, marker="o", markersize=size)


def _mean_rewards(run: RecordedRun) -> Plot | None:
    histories = [history for history in eval_histories(run.records) if history.mean_reward is not None][:8]
    if not histories:
        return None
    figure, (ax,) = _figure(run, [1], wide=True)
    legend: list[Legend] = []
    shown: dict[str, dict[int, str]] = {}
    for order, history in enumerate(histories):
        points = [(p.step, p.reward, number(p.reward_ci95, 0.0)) for p in history.points if math.isfinite(p.reward)]
        draw_points(ax, points, COLORS[f"s{order + 1}"])
        legend.append(Legend(f"{history.name} reward", f"s{order + 1}"))
        shown[legend[-1].label] = {p.step: _with_interval(p.reward, p.reward_ci95, "fixed3") for p in history.points}
    format_y(ax, "")
    caption = "Mean reward on the evaluation sets; bars are 95 % intervals."
    return Plot("Held-out reward", caption, svg_of(figure, "Held-out reward", shown), tuple(legend), wide=True)


def _outcomes(run: RecordedRun) -> Plot | None:
    names = {
        "ok": "s2",
        "wrong": "s0",
        "no_answer": "s3",
        "truncated": "s8",
        NO_THINK_CLOSE: "s1",
        "timeout": "s5",
        "crash": "s6",
        "skipped": "s7",
    }
    layers = {name: [number(r.get(f"reward/status/{name}"), 0.0) * 100 for r in run.records] for name in names}
    # metrics.jsonl has one status for both kinds: split it.
    layers[NO_THINK_CLOSE] = [100 * no_think_close(record) for record in run.records]
    pairs = zip(layers[Status.TRUNCATED], layers[NO_THINK_CLOSE], strict=True)
    layers[Status.TRUNCATED] = [max(both - unclosed, 0.0) for both, unclosed in pairs]
    labels = {name: status_word(name) for name in names}
    caption = "What became of the responses; timeout and crash are the verifier's."
    if run.graded:
        caption += " Rewarded is a reward above 0."
    return _stack(run, ("Outcomes", caption, "%"), layers, names, labels)


def _time(run: RecordedRun) -> Plot | None:
    names = dict(zip((*PHASES, "other"), ("s1", "s8", "s2", "s5", "s3", "s7", "s0"), strict=True))
    layers = {name: [number(r.get(f"time/{name}"), 0.0) for r in run.records] for name in PHASES}
    layers["other"] = [other_seconds(r) for r in run.records]
    total = sum(map(sum, layers.values())) or 1
    labels = {name: f"{name} {100 * sum(values) / total:.0f} %" for name, values in layers.items()}
    caption = "Seconds per step by phase, and each phase's share of the run."
    return _stack(run, ("Time per step", caption, ""), layers, names, labels)


def _stack(
    run: RecordedRun,
    words: tuple[str, str, str],
    layers: dict[str, list[float]],
    colors: dict[str, str],
    labels: dict[str, str],
) -> Plot | None:
    """Draw stacked bars, or stacked areas of binned means if there are many steps. `words`: title, caption, unit."""
    layers = {name: values for name, values in layers.items() if any(value > 0 for value in values)}
    if not layers:
        return None
    title, caption, unit = words
    filled = [i for i in range(len(run.records)) if any(values[i] > 0 for values in layers.values())]
    steps = [run.records[i]["step"] for i in filled]
    stacks = {name: [values[i] for i in filled] for name, values in layers.items()}
    wide = title == "Time per step"
    figure, (ax,) = _figure(run, [1], wide)
    if len(steps) <= _MAX_BARS:
        base = [0.0] * len(steps)
        for name, values in stacks.items():
            ax.bar(steps, values, 0.86, bottom=base, color=COLORS[colors[name]], linewidth=0)
            base = [low + value for low, value in zip(base, values, strict=True)]
    else:
        size = math.ceil(len(steps) / _BINS)
        fills = [COLORS[colors[name]] for name in stacks]
        xs = _binned(steps, size)
        # Each bin is drawn flat: a slope would spread the time of one evaluation over the neighbouring bins.
        xs = [steps[0] - 0.5, *xs, steps[-1] + 0.5]
        ys = [[means[0], *means, means[-1]] for means in (_binned(v, size) for v in stacks.values())]
        ax.stackplot(xs, *ys, colors=fills, linewidth=0, step="mid")
    if unit == "%":
        ax.set_ylim(0, 100)
    format_y(ax, unit)
    legend = tuple(Legend(labels[name], colors[name], "fill") for name in stacks)
    texts = {
        name: {
            step: f"{value:.1f} %" if unit == "%" else duration(value) for step, value in zip(steps, of, strict=True)
        }
        for name, of in stacks.items()
    }
    return Plot(title, caption, svg_of(figure, title, texts), legend, wide=wide)


def _binned(values: Sequence[float], size: int) -> list[float]:
    return [math.fsum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
