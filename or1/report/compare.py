"""`or1 report A B C`: one page with several runs over each other, and the settings in which they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from or1.core.errors import ReportError
from or1.core.metric_names import SHARE, metric
from or1.core.records import number
from or1.core.text import count_text, duration, value_text
from or1.report.page_data import KEPT_SHARE, RecordedRun, load_run
from or1.report.page_frame import framed, plot_card, write_page
from or1.report.page_plots import Legend, Plot, draw_line, draw_points, format_y, new_figure
from or1.report.page_settings import flat
from or1.report.page_svg import COLORS, STYLE, svg_of
from or1.report.page_text import escaped, plain
from or1.report.records import EvalHistory, EvalPoint, eval_histories

NAME = "comparison.html"
_MOST = 8
"""Runs on one page; more lines could not be told apart."""
_LAST = 10
"""Steps behind the mean reward at the end."""
_METRICS = (
    "reward/mean",
    "policy/entropy",
    "policy/entropy_coef",
    "completion/len_mean",
    "completion/truncated",
    KEPT_SHARE,
    "optim/grad_norm",
    "mismatch/kl",
    "perf/tokens_per_s",
    "time/step",
)


class _Named(NamedTuple):
    """A run with its name and its colour, of which every page has one set."""

    run: RecordedRun
    name: str
    color: str


def write_comparison(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write a page about several runs and return its path.

    out  file to write; default: comparison.html beside the folder of the first run

    Raises ReportError for a folder that is not a run with a step, and for more than eight runs.
    """
    if len(run_dirs) > _MOST:
        raise ReportError(f"{len(run_dirs)} runs on one page cannot be told apart; name at most {_MOST}")
    runs = [load_run(each) for each in run_dirs]
    names = _names(run_dirs)
    named = [_Named(run, name, f"s{place}") for place, (run, name) in enumerate(zip(runs, names, strict=True), 1)]
    title = escaped(" / ".join(names))
    header = f'<header><p class="brand">or1 report</p><h1>{len(runs)} runs</h1><p class="sub">{title}</p></header>'
    body = "".join(_body(named))
    return write_page(out or run_dirs[0].absolute().parent / NAME, framed(title, header, body))


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Return the name of each folder, or its path if two folders have the same name."""
    names = [each.resolve().name or "run" for each in run_dirs]
    return [name if names.count(name) == 1 else str(each) for name, each in zip(names, run_dirs, strict=True)]


def _body(runs: Sequence[_Named]) -> Iterator[str]:
    yield from _summary(runs)
    yield from _differences(runs)
    yield '<h2 id="curves">Curves</h2><div class="grid">'
    yield from map(plot_card, comparison_plots(runs))
    yield "</div>"


def _summary(runs: Sequence[_Named]) -> Iterator[str]:
    histories = [{(h.name, h.k): h for h in eval_histories(each.run.records)} for each in runs]
    sets = list(dict.fromkeys(key for each in histories for key in each))
    graded = any(each.run.graded for each in runs)
    heads = ["run", "steps", "time", "sampled tokens", f"reward, last {_LAST} steps"]
    heads += [f"{name} {'reward' if graded else f'avg@{k}'}" for name, k in sets]
    yield '<h2 id="runs">Runs</h2><div class="card scroll"><table><tr>'
    yield "".join(f"<th>{escaped(head)}</th>" for head in heads) + "</tr>"
    for each, found in zip(runs, histories, strict=True):
        cells = [*_facts(each.run), *(_course(found.get(key), graded) for key in sets)]
        dot = f'<i class="dot" style="background:var(--{each.color})"></i>{escaped(each.name)}'
        yield f"<tr><td>{dot}</td>" + "".join(f"<td>{escaped(cell)}</td>" for cell in cells) + "</tr>"
    yield "</table></div>"


def _facts(run: RecordedRun) -> list[str]:
    total = "" if run.total_steps is None else f" / {run.total_steps}"
    tokens = math.fsum(number(r.get("completion/len_mean"), 0.0) * run.responses(r) for r in run.records)
    rewards = run.series("reward/mean")[1][-_LAST:]
    reward = value_text(math.fsum(rewards) / len(rewards), "fixed3") if rewards else "-"
    return [f"{run.last_step}{total}", duration(run.wall_seconds()), count_text(tokens), reward]


def _course(history: EvalHistory | None, graded: bool) -> str:
    if history is None:
        return "-"
    lead = history.courses(graded)[0]
    return lead.first if lead.change is None else f"{lead.first} \u2192 {lead.last}"


def _differences(runs: Sequence[_Named]) -> Iterator[str]:
    """Yield a table of the settings in which the runs differ."""
    settings = [{row.key: plain(row.value) for row in flat(each.run.raw_config)} for each in runs]
    keys = dict.fromkeys(key for each in settings for key in each if key != "run_dir")
    rows = [(key, [each.get(key, "absent") for each in settings]) for key in keys]
    rows = [(key, values) for key, values in rows if len(set(values)) > 1]
    yield '<h2 id="settings">Settings that differ</h2><div class="card scroll">'
    if not rows:
        yield '<p class="caption">None but the folder of the run.</p></div>'
        return
    if any(".0." in key or ".1." in key for key, _ in rows):
        yield '<p class="caption">Stages and evaluation sets are counted from 0, as in --set.</p>'
    heads = "".join(f"<th>{escaped(each.name)}</th>" for each in runs)
    yield f"<table><tr><th>setting</th>{heads}</tr>"
    for key, values in rows:
        yield f"<tr><td>{escaped(key)}</td>" + "".join(f"<td>{escaped(value)}</td>" for value in values) + "</tr>"
    yield "</table></div>"


def comparison_plots(runs: Sequence[_Named]) -> list[Plot]:
    """Return a plot of each evaluation set and of each metric that any run has, with one line a run."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return [*_evaluation_plots(runs), *filter(None, (_metric_plot(runs, key) for key in _METRICS))]


def _evaluation_plots(runs: Sequence[_Named]) -> Iterator[Plot]:
    graded = any(each.run.graded for each in runs)
    found = [(each, history) for each in runs for history in eval_histories(each.run.records)]
    found.sort(key=lambda pair: (pair[1].name, pair[1].k))
    for (name, k), of_set in groupby(found, key=lambda pair: (pair[1].name, pair[1].k)):
        lines = []
        for each, history in of_set:
            if points := [point for p in history.points if (point := _point(p, graded)) is not None]:
                lines.append((each, points))
        if lines:
            yield _evaluation_plot(runs, lines, f"{name} {'reward' if graded else f'avg@{k}'}", graded)


def _point(point: EvalPoint, graded: bool) -> tuple[int, float, float] | None:
    value, half = (point.reward, point.reward_ci95) if graded else (100 * point.avg, 100 * point.ci95)
    return (point.step, value, number(half, 0.0)) if math.isfinite(value) else None


def _evaluation_plot(
    runs: Sequence[_Named], lines: Sequence[tuple[_Named, list[tuple[int, float, float]]]], title: str, graded: bool
) -> Plot:
    figure, (ax,) = new_figure(max(each.run.last_step for each in runs), [1])
    shown: dict[str, dict[int, str]] = {}
    for each, points in lines:
        draw_points(ax, points, COLORS[each.color])
        shown[each.name] = {step: f"{value:.3f}" if graded else f"{value:.1f} %" for step, value, _ in points}
    format_y(ax, "" if graded else "%")
    what = "Mean reward" if graded else "Accuracy"
    legend = tuple(Legend(each.name, each.color) for each, _ in lines)
    return Plot(title, f"{what} of an evaluation set; bars are 95 % intervals.", svg_of(figure, title, shown), legend)


def _metric_plot(runs: Sequence[_Named], key: str) -> Plot | None:
    about = metric(key)
    share = about.unit == SHARE
    found = [(each, *each.run.series(key)) for each in runs]
    found = [line for line in found if line[1]]
    if not found:
        return None
    figure, (ax,) = new_figure(max(each.run.last_step for each in runs), [1])
    shown: dict[str, dict[int, str]] = {}
    low, high = math.inf, -math.inf
    for each, steps, values in found:
        drawn = [100 * value for value in values] if share else values
        draw_line(ax, steps, drawn, COLORS[each.color], each.run.stage_starts())
        shown[each.name] = {step: value_text(value, about.kind) for step, value in zip(steps, values, strict=True)}
        low, high = min(low, *drawn), max(high, *drawn)
    if low > 0 and high / low > 100:
        ax.set_yscale("log")
    elif low >= 0:
        ax.set_ylim(0, high * 1.08 or 1)
    format_y(ax, "%" if share else "")
    title = about.label[:1].upper() + about.label[1:]
    legend = tuple(Legend(each.name, each.color) for each, *_ in found)
    return Plot(title, about.meaning, svg_of(figure, title, shown), legend)
