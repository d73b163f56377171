"""Page of the study: a verdict and a plot for each claim, as Markdown and SVG."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.lib.measure import stamp
from benchmarks.paper.history import claims, task
from benchmarks.paper.history.arms import ADAPTIVE, ARMS, PROMPTS, STEPS
from benchmarks.paper.history.claims import MEASURES, Claim, Finding, Record, conclude, decide

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Mapping[tuple[str, int], Record]

_SMOOTH = 5  # steps that a point of the entropy curve is the mean of
_MARKS = {"reproduced": "**reproduced**", "not reproduced": "**not reproduced**", "inconclusive": "inconclusive"}


def write_page(out: Path, chosen: Sequence[Claim], records: Records, cost: Mapping[str, float], lr: float) -> Path:
    """Write README.md, a plot for each claim and study.json to `out`. Return the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    findings = {claim.key: [decide(s, records) for s in claim.statements] for claim in chosen}
    versions = stamp()
    _write_json(out / "study.json", findings, records, versions | {"cost": dict(cost), "lr": lr})
    # A stopped study may resume with later code, so there may be several commits.
    commits = sorted({record["commit"][:12] for record in records.values()})
    parts = [_head(cost, commits, lr), _table(chosen, findings)]
    for claim in chosen:
        _plot(out / f"{claim.key}.svg", claim, records)
        parts.append(_section(claim, findings[claim.key]))
    page = out / "README.md"
    page.write_text("\n\n".join([*parts, _alarms(records)]) + "\n", encoding="utf-8")
    return page


def summary(chosen: Sequence[Claim], records: Records) -> list[tuple[str, str, str]]:
    """Return claim, verdict and the number of statements that hold, for the terminal."""
    rows = []
    for claim in chosen:
        findings = [decide(s, records) for s in claim.statements]
        rows.append((f"{claim.key}  {claim.title}", conclude(findings), _held(findings)))
    return rows


def _head(cost: Mapping[str, float], commits: Sequence[str], lr: float) -> str:
    rule, _, note = textwrap.dedent(claims.__doc__.partition("\n\n")[2]).partition("\n\n    ")
    table, _, rest = note.partition("\n\n")
    costs = ", ".join(f"{name} {value:.3g}" for name, value in cost.items())
    return "\n\n".join(
        [
            "# The report's study of entropy collapse, in miniature",
            "Made by `python -m benchmarks.paper.history OUT_DIR`; the numbers behind it are in `study.json`. It shows "
            "what a 0.2 M-parameter model on two-digit sums does, and nothing about large ones: a claim that fails "
            "here may hold there.",
            f"Commit of the runs: {', '.join(commits)}. Cost: {costs}.",
            "## The task",
            "```\n" + task.__doc__.partition("\n\n")[2].rstrip() + "\n```",
            f"Runs take {STEPS} rollout steps at lr {lr:g}, {PROMPTS} prompts by 8 responses, unless their arm says "
            "otherwise: (N_SGD, D_R, D_T, N_reuse) as in the report. Entropy coefficients are 50 times the report's; "
            f"the adaptive controller has target {ADAPTIVE['target']}, delta {ADAPTIVE['delta']}, coefficient up to "
            f"{ADAPTIVE['coef_max']}. Test accuracy is of {task.HELD_OUT} held-out problems at temperature 0.6, the "
            "mean of the last two evaluations.",
            "Batches, steps and the controller's delta were fixed in trials with other seeds, so that on-policy "
            "training learns within a run; with half as many prompts, noise hid most differences. The study was "
            "run at lr 3e-4 and at 1e-4 with the same arms, seeds and rule, and both pages stand beside each other; at "
            "3e-4 the updates of one rollout are noisier, and C3 stayed undecided.",
            "## The rule",
            f"{rule}\n\n```\n{textwrap.dedent('    ' + table)}\n```\n\n{rest.rstrip()}",
        ]
    )


def _table(chosen: Sequence[Claim], findings: Mapping[str, list[Finding]]) -> str:
    lines = ["## Verdicts", "", "| claim | verdict | statements that hold |", "|---|---|---|"]
    for claim in chosen:
        found = findings[claim.key]
        link = f"[{claim.key}](#{claim.key.lower()})"
        lines.append(f"| {link} {claim.title} | {_MARKS[conclude(found)]} | {_held(found)} |")
    return "\n".join(lines)


def _section(claim: Claim, findings: Sequence[Finding]) -> str:
    lines = [
        f"## {claim.key}",
        "",
        f"{claim.title}.",
        "",
        f"![{claim.key}]({claim.key}.svg)",
        "",
        "| statement | effect, 95 % interval | seeds | verdict |",
        "|---|---|---|---|",
    ]
    for f in findings:
        lines.append(f"| {f.statement.words()} | {_effect(f)} | {f.seeds} | {_MARKS[f.verdict]} |")
    return "\n".join(lines)


def _alarms(records: Records) -> str:
    """Return the section on the trainer's entropy alarms by arm."""
    fired: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for (arm, _), record in records.items():
        fired[arm][2] += 1
        for i, word in enumerate(("collapse", "explo")):
            fired[arm][i] += any(word in text for text in record["messages"])
    lines = [
        "## Entropy alarms",
        "",
        "Runs in which `or1 train` warned by itself:",
        "",
        "| arm | warned of collapse | warned of explosion | runs |",
        "|---|---|---|---|",
    ]
    rows = [f"| {arm} | {low} | {high} | {runs} |" for arm, (low, high, runs) in fired.items() if low or high]
    return "\n".join([*lines, *rows]) if rows else "No run made the entropy alarms speak."


def _held(findings: Sequence[Finding]) -> str:
    return f"{sum(f.verdict == 'reproduced' for f in findings)} of {len(findings)}"


def _effect(finding: Finding) -> str:
    values = (finding.mean, finding.low, finding.high)
    if MEASURES[finding.statement.measure].log:
        mean, low, high = (f"x{math.exp(min(v, 20)):.2f}" for v in values)
    else:
        mean, low, high = (f"{v:+.1f}" for v in values)
    return f"{mean} [{low}, {high}]"


def _write_json(path: Path, findings: Mapping[str, list[Finding]], records: Records, more: Mapping[str, Any]) -> None:
    claims_json = {
        key: {
            "verdict": conclude(found),
            "statements": [
                {
                    "words": f.statement.words(),
                    "mean": f.mean,
                    "low": f.low,
                    "high": f.high,
                    "seeds": f.seeds,
                    "log": MEASURES[f.statement.measure].log,
                    "verdict": f.verdict,
                }
                for f in found
            ],
        }
        for key, found in findings.items()
    }
    runs = [{k: v for k, v in record.items() if k != "settings"} for _, record in sorted(records.items())]
    arms = {name: arm.__dict__ for name, arm in ARMS.items()}
    text = json.dumps({**more, "claims": claims_json, "arms": arms, "runs": runs})
    path.write_text(text + "\n", encoding="utf-8")


def _plot(path: Path, claim: Claim, records: Records) -> None:
    """Plot entropy and test accuracy of the claim's arms: mean and range over the seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, name in enumerate(claim.arms):
        runs = [record for (arm, _), record in sorted(records.items()) if arm == name]
        scale = ARMS[name].prompts * ARMS[name].group if claim.by == "responses" else 1
        entropy = [_smooth(run["series"]["entropy"]) for run in runs]
        _band(left, [scale * (k + 1) for k in range(len(entropy[0]))], entropy, name, f"C{i}")
        steps = [scale * step for step, _ in runs[0]["evals"]]
        _band(right, steps, [[100 * a for _, a in run["evals"]] for run in runs], name, f"C{i}")
    words = {"steps": "rollout steps", "responses": "responses sampled"}[claim.by]
    left.set(xlabel=words, ylabel="entropy, nats a token", yscale="log")
    right.set(xlabel=words, ylabel="test accuracy, %")
    left.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    with matplotlib.rc_context({"svg.hashsalt": claim.key}):
        figure.savefig(path, metadata={"Date": None})


def _band(axis: Axes, x: Sequence[float], runs: Sequence[Sequence[float]], label: str, color: str) -> None:
    columns = list(zip(*runs, strict=True))
    axis.plot(x, [statistics.fmean(c) for c in columns], color=color, label=label)
    axis.fill_between(x, [min(c) for c in columns], [max(c) for c in columns], color=color, alpha=0.15, linewidth=0)


def _smooth(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[max(k - _SMOOTH + 1, 0) : k + 1]) for k in range(len(values))]
