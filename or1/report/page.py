"""`or1 report RUN`: one self-contained HTML page about a run, for light and dark mode, without scripts.

Responses are untrusted text: everything from the run passes through `escaped`, and the content security policy forbids
scripts and external resources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from or1.core.errors import ReportError
from or1.core.records import number
from or1.core.text import count_text, duration, value_text
from or1.report.page_data import RecordedRun, load_run
from or1.report.page_frame import framed, plot_card, write_page
from or1.report.page_plots import Plot, render_plots
from or1.report.page_samples import Sample, SampleStep, load_samples
from or1.report.page_settings import alarms, config_section, messages_section, starts_section
from or1.report.page_text import clock, escaped, plain
from or1.report.records import Course, EvalHistory, EvalPoint, eval_histories
from or1.report.run_plan import stage_settings
from or1.reward.terms import NO_THINK_CLOSE, status_word

__all__ = ["ReportError", "write_report"]

_HEAD_TOKENS, _TAIL_TOKENS = 2500, 1000
_CHARS_PER_TOKEN = 4
_SHADES = ((0.9, ""), (0.5, "p1"), (0.2, "p2"), (0.05, "p3"), (0.0, "p4"))
_DOT = " \u00b7 "
_Clipped = TypeVar("_Clipped", str, Sequence[tuple[str, float]])


def write_report(run_dir: Path, refresh_s: int = 0, out: Path | None = None) -> Path:
    """Write `run_dir/report.html`, or `out`, and return its path.

    The run may be alive or killed, and may lack config or rollouts; the page lists what is missing.
    Raises ReportError if the folder is not a run with a step.

    refresh_s  seconds after which a browser loads the page again; 0: never
    """
    run = load_run(Path(run_dir))
    samples, notes = load_samples(run)
    plots, missing = render_plots(run)
    body = "".join(_body(run, plots, missing, samples, [*run.notes, *notes]))
    name = escaped(_run_name(run))
    return write_page(out or run.path / "report.html", framed(name, "".join(_header(run, name)), body, refresh_s))


def _body(
    run: RecordedRun, plots: Sequence[Plot], missing: Sequence[str], samples: Sequence[SampleStep], notes: Sequence[str]
) -> Iterator[str]:
    yield from _eval_cards(eval_histories(run.records), run.graded)
    yield _facts(_key_facts(run))
    yield _facts(_health_facts(run))
    if sounded := alarms(run.path):
        yield f'<ul class="card notes alarms">{"".join(f"<li>{escaped(alarm)}</li>" for alarm in sounded)}</ul>'
    if notes:
        yield f'<ul class="card notes">{"".join(f"<li>{escaped(note)}</li>" for note in notes)}</ul>'
    yield '<h2 id="curves">Curves</h2><div class="grid">'
    yield from map(plot_card, plots)
    yield "</div>"
    if missing:
        yield f'<p class="caption" style="margin-top:12px">Not recorded in this run: {", ".join(missing)}.</p>'
    yield from _eval_table(eval_histories(run.records), run.graded)
    yield from _samples(samples)
    yield from messages_section(run.path)
    yield from starts_section(run.path)
    yield from config_section(run.raw_config)


def _run_name(run: RecordedRun) -> str:
    return run.path.resolve().name or "run"


def _percent(fraction: float) -> str:
    return "-" if math.isnan(fraction) else f"{100 * fraction:.1f} %"


def _header(run: RecordedRun, name: str) -> Iterator[str]:
    if run.finished:
        badge = '<span class="badge done">finished</span>'
    else:
        badge = '<span class="badge open">not finished</span>'
    words = []
    if run.config is not None:
        model = Path(run.config.model.path)
        stages = "1 stage" if len(run.config.stage) == 1 else f"{len(run.config.stage)} stages"
        words = [model.name if model.is_absolute() else str(model), stages, run.config.in_stage(0).loss.kind]
        words.append(f"seed {run.config.seed}")
    first, last = (number(run.records[i].get("time")) for i in (0, -1))
    if math.isfinite(first + last):
        words.append(f"{clock(first).removesuffix(' UTC')} to {clock(last)}")
    yield f'<header><p class="brand">or1 report</p><h1>{name}{badge}</h1>'
    yield f'<p class="sub">{escaped(_DOT.join(words))}</p>'
    for stage, sets in () if run.config is None else stage_settings(run.config):
        yield f'<p class="sub">{escaped(f"{stage}: {sets}")}</p>'
    yield "</header>"


def _eval_cards(histories: Sequence[EvalHistory], graded: bool) -> Iterator[str]:
    if not histories:
        return
    yield '<section class="evals">'
    for history in histories:
        lead, *others = history.courses(graded)
        what = f"avg@{history.k}" if lead.kind == "percent" else "mean reward"
        yield f'<div class="card"><h3>{escaped(history.name)} <span class="caption">{what}</span></h3>{_score(lead)}'
        if lead.kind == "percent":
            yield f'{_track(lead)}<div class="scale"><span>0 %</span><span>50 %</span><span>100 %</span></div>'
        for course in others:
            change = "so far" if course.change is None else f"&rarr; {course.last}, {course.change_text}"
            yield f'<p class="caption">accuracy avg@{history.k}: {course.first} {change}</p>'
        yield "</div>"
    yield "</section>"


def _score(course: Course) -> str:
    if course.change is None:
        return f'<p class="score"><span class="to">{course.first}</span><span class="by">so far</span></p>'
    way = "up" if course.change > 0 else "down" if course.change < 0 else ""
    return (
        f'<p class="score"><span class="from">{course.first} &rarr;</span>'
        f'<span class="to">{course.last}</span><span class="by {way}">{course.change_text}'
        "</span></p>"
    )


def _track(course: Course) -> str:
    """Return a bar of 0-100 %: grey up to the smaller value, coloured for the change, a line for the 95 % interval."""
    before, last = course.values[0], course.values[-1]
    low, high = sorted((100 * before, 100 * last))
    kind = "gain" if last >= before else "loss"
    bar = f'<i class="was" style="width:{low:.2f}%"></i>'
    bar += f'<i class="{kind}" style="left:{low:.2f}%;width:{high - low:.2f}%"></i>'
    if math.isfinite(course.ci95):
        left, right = max(0, 100 * (last - course.ci95)), min(100, 100 * (last + course.ci95))
        bar += f'<i class="ci" style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'
    return f'<div class="track">{bar}</div>'


def _facts(facts: Sequence[tuple[str, str, bool]]) -> str:
    if not facts:
        return ""
    cells = (
        f"<div{' class=alert' if alert else ''}><b>{escaped(value)}</b><span>{escaped(label)}</span></div>"
        for value, label, alert in facts
    )
    return f'<section class="card facts">{"".join(cells)}</section>'


def _key_facts(run: RecordedRun) -> list[tuple[str, str, bool]]:
    responses = sum(run.responses(record) for record in run.records)
    tokens = math.fsum(number(r.get("completion/len_mean"), 0.0) * run.responses(r) for r in run.records)
    speeds = sorted(run.series("perf/tokens_per_s")[1])
    total = "" if run.total_steps is None else f" / {run.total_steps}"
    facts = [(f"{run.last_step}{total}", "steps", False), (duration(run.wall_seconds()), "wall time", False)]
    if responses:
        facts += [(count_text(responses), "responses", False), (count_text(tokens), "sampled tokens", False)]
    if speeds:
        facts.append((count_text(speeds[len(speeds) // 2]), "tokens/s, median", False))
    if run.series("optim/updates")[0]:
        facts.append((count_text(run.total("optim/updates")), "optimizer updates", False))
    return facts


def _health_facts(run: RecordedRun) -> list[tuple[str, str, bool]]:
    """Return counts of problems. Counts that should be 0 are highlighted if they are not."""
    usual = ("truncated responses", "without an answer", NO_THINK_CLOSE)
    return [(count_text(n), label, n > 0 and label not in usual) for label, n in run.health_counts().items()]


def _eval_table(histories: Sequence[EvalHistory], graded: bool) -> Iterator[str]:
    if not histories:
        return
    reward = "<th>mean reward</th>" if graded else ""
    yield '<h2 id="evaluations">Evaluations</h2><div class="card scroll">'
    yield f"<table><tr><th>set</th><th>step</th>{reward}<th>accuracy</th>"
    yield "<th>95 % interval</th><th>pass@k</th><th>mean tokens</th><th>truncated</th></tr>"
    for history in histories:
        for point in history.points:
            yield _eval_row(history, point, graded)
    yield "</table></div>"


def _eval_row(history: EvalHistory, point: EvalPoint, graded: bool) -> str:
    interval = "-" if math.isnan(point.ci95) else f"&plusmn; {100 * point.ci95:.1f}"
    length = "-" if math.isnan(point.len_mean) else f"{point.len_mean:,.1f}"
    reward = [value_text(point.reward, "fixed3")] if graded else []
    cells = [str(point.step), *reward, _percent(point.avg), interval, _percent(point.pass_at_k), length]
    cells.append(_percent(point.truncated))
    return f"<tr><td>{escaped(history.name)} avg@{history.k}</td><td>{'</td><td>'.join(cells)}</td></tr>"


def _samples(steps: Sequence[SampleStep]) -> Iterator[str]:
    if not steps:
        return
    yield '<h2 id="transcripts">Transcripts</h2>'
    if any(sample.pieces for step in steps for sample in step.samples):
        yield '<p class="key">Shading: probability the policy gave the token it sampled, '
        yield '<i class="p1">below 0.9</i><i class="p2">below 0.5</i><i class="p3">below 0.2</i>'
        yield '<i class="p4">below 0.05</i></p>'
    for step in steps:
        yield f'<h3 style="margin-top:18px">Step {step.step}</h3><div class="samples">'
        yield from map(_sample_card, step.samples)
        yield "</div>"


def _sample_card(sample: Sample) -> str:
    row = sample.row
    golds = ", ".join(row.get("golds") or ()) or "-"
    words = [f"reward {plain(row.get('reward'))}", status_word(row["status"], row["finish"])]
    words += [f"{len(row['token_ids']):,} tokens"] if row.get("token_ids") else []
    if row.get("advantage") is not None:
        words.append(f"advantage {row['advantage']:+.2f}")
    elif row.get("kept") is False:
        words.append("group rejected")
    words += [str(row["prompt_id"])] if row.get("prompt_id") else []
    return (
        f'<article class="card sample"><div><span class="tag {sample.kind}">{sample.kind}</span>'
        f'<div class="meta">{escaped(_DOT.join(words))}</div></div>'
        f'<div><p class="label">Prompt</p><pre class="short">{escaped(row["prompt"])}</pre></div>'
        f'<div><p class="label">Gold answer</p><pre class="short">{escaped(golds)}</pre></div>'
        f'<div><p class="label">Response</p><pre>{_response(sample)}</pre></div></article>'
    )


def _response(sample: Sample) -> str:
    if sample.pieces is None:
        text, head, tail = sample.row["response"] or "", _HEAD_TOKENS, _TAIL_TOKENS
        return _clipped(text, head * _CHARS_PER_TOKEN, tail * _CHARS_PER_TOKEN, "characters", escaped)
    return _clipped(sample.pieces, _HEAD_TOKENS, _TAIL_TOKENS, "tokens", _shaded)


def _clipped(items: _Clipped, head: int, tail: int, unit: str, show: Callable[[_Clipped], str]) -> str:
    """Return a response as HTML. The middle of a long response is replaced by the number of `unit` left out."""
    if len(items) <= head + tail:
        return show(items)
    cut = f'\n<span class="cut">[{len(items) - head - tail:,} {unit} left out]</span>\n'
    return show(items[:head]) + cut + show(items[-tail:])


def _shaded(pieces: Sequence[tuple[str, float]]) -> str:
    parts = []
    for text, logp in pieces:
        # NaN: an environment wrote the token.
        probability = 1.0 if math.isnan(logp) else math.exp(min(logp, 0.0))
        shade = next(name for limit, name in _SHADES if probability >= limit)
        parts.append(f'<i class="{shade}" title="p {probability:.3g}">{escaped(text)}</i>' if shade else escaped(text))
    return "".join(parts)
