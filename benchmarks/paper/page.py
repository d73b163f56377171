"""The page of the study: what the report says beside what the ladder says, a plot for each claim, and JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.measure import stamp
from benchmarks.paper import ladder, study
from benchmarks.paper.arms import MODEL_ROLLOUTS, ROLLOUTS
from benchmarks.paper.claims import Claim, Statement
from benchmarks.paper.measures import MIDDLE, Check, Record, Records, at, of_arm, over
from benchmarks.paper.plots import plot
from benchmarks.paper.rule import Finding

_TOP_KEPT = 0.05  # mean probability of the top rung, at the end, in a run that climbed it


def write_page(out: Path, records: Sequence[Record], minutes: float, first_seed: int) -> Path:
    """Write README.md, a plot for each claim and study.json to `out`. Return the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    sections = []
    for tier in "AB":
        of_tier = study.of_tier(records, tier)
        for claim in study.claims_of(tier):
            checks, findings = study.findings(claim, of_tier, study.looks_of(tier, of_tier))
            rows = list(zip(claim.statements, checks, findings, strict=True))
            found[claim.key] = as_json(tier, claim, rows, of_tier)
            sections.append(section(claim, rows))
            plot(out / f"{claim.key}.svg", claim, of_tier)
    arms = {tier: _arms(study.of_tier(records, tier)) for tier in "AB"}
    costs = {"runs": len(records), "processor_minutes": round(minutes, 1), "first_seed": first_seed}
    study.write(out / "study.json", {**stamp(), **costs, "claims": found, "arms": arms})
    page = out / "README.md"
    parts = [
        _head(costs, records),
        _verdicts(found),
        *sections,
        *_remarks(out),
        _LIMITS,
        *(_arm_table(tier, arms[tier]) for tier in "AB"),
    ]
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def as_json(
    tier: str, claim: Claim, rows: Sequence[tuple[Statement, Check, Finding]], records: Records
) -> dict[str, Any]:
    """Return a claim's findings, with the differences of every seed, from which the verdicts follow."""
    statements = [
        {
            "words": s.words(),
            "expect": s.expect,
            "control": s.control,
            "check": c.text,
            "tested": c.passed,
            "verdict": f.verdict,
            "mean": f.effect.mean,
            "low": f.effect.low,
            "high": f.effect.high,
            "log": s.number.log,
            "least": s.number.least,
            "margin": s.number.margin,
            "won": f.won,
            "lost": f.lost,
            "p": f.p,
            "look": f.look,
            "differences": [round(x, 6) for x in s.differences(records)],
        }
        for s, c, f in rows
    ]
    return {"tier": tier, "title": claim.title, "report": claim.report, "statements": statements}


def _arms(records: Records) -> dict[str, dict[str, float]]:
    """Return numbers of every arm, means over the seeds; entropies are geometric means."""
    table = {}
    for arm in dict.fromkeys(arm for arm, _ in records):
        runs = of_arm(records, arm)
        middle, end = ([math.log(at(r, "entropy", share)) for r in runs] for share in (MIDDLE, 1.0))
        table[arm] = {
            "seeds": len(runs),
            "early accuracy": statistics.fmean(at(r, "accuracy", 0.15) for r in runs),
            "accuracy": statistics.fmean(over(r, "accuracy", 0.75, 1.0) for r in runs),
            "start entropy": math.exp(statistics.fmean(math.log(at(r, "entropy", 0.0)) for r in runs)),
            "entropy": math.exp(statistics.fmean(middle)),
            "end entropy": math.exp(statistics.fmean(end)),
            "top rung kept": sum(at(r, "top", 1.0) > _TOP_KEPT for r in runs),
            "clipped": statistics.fmean(over(r, "clipped", 0.0, 1.0) for r in runs),
            "bonus on": statistics.fmean(over(r, "bonus", 0.0, 1.0) for r in runs),
            "updates a rollout": statistics.fmean(over(r, "updates", 0.0, 1.0) for r in runs),
            "cpu_s": statistics.fmean(r["cpu_s"] for r in runs),
        }
    return table


_HEAD = """\
# The ladder: the report's study of entropy collapse, in miniature

Made by `python -m benchmarks.paper OUT_DIR`: {runs} runs in {processor_minutes} processor minutes; numbers in
`study.json`. Verdicts follow [RULE.md](../../paper/RULE.md), committed before the runs. In plain words: [Keeping
entropy alive](../../../docs/entropy.md).

## The task

{task}

Tier A is a table of logits with or1's advantages, rejection, token loss, denominator and entropy controller: {a}
seeds, rate {table_lr:g}, {rollouts} rollouts. Tier B is a one-layer Qwen2 that or1's Trainer trains: {b} seeds,
rate {model_lr:g}, {model_rollouts} rollouts. A rollout has 64 prompts by 8 responses unless the arm says otherwise.
An arm is named (N_SGD, D_R, D_T, N_reuse), as in the report. (1,32,32,1) and (1,16,16,1) have 2 and 4 times as many
rollouts, so that updates and responses equal those of (2,64,32,1) and (4,64,16,1). Accuracy and entropy are exact.

In the plots a line is the mean of the seeds, and its band their middle half."""

_LIMITS = """\
## What the miniature cannot say

- A positive result says that a mechanism suffices, not that it is what happened at 7 B. The ladder builds in that
  early gains compete with later ones.
- A table shares less between prompts than a transformer. Tier B is a transformer, with one base model for all
  seeds.
- Coefficients and targets are in the units of this task: 0.3 nats here is not 0.3 nats there.
- The best policy has entropy 0. Where many different solutions are equally good, or where a policy is trained
  further on other data, entropy has a worth of its own that the ladder does not show.
- In tier A the kept groups are cut into as many minibatches as the arm's name says. or1 and the released code take
  fewer when few groups are kept: arm "filled".
- Intervals of equivalence are not corrected for the number of statements."""


def _remarks(out: Path) -> list[str]:
    """Return the remarks that a person wrote on these results, if there are any: OUT_DIR/remarks.md."""
    path = out / "remarks.md"
    return [path.read_text(encoding="utf-8").rstrip()] if path.exists() else []


def _head(costs: Mapping[str, Any], records: Sequence[Record]) -> str:
    seeds = {tier.lower(): len({r["seed"] for r in records if r["tier"] == tier}) for tier in "AB"}
    task = (ladder.__doc__ or "").partition("\n\n")[2].rstrip()
    rates = {"table_lr": study.TABLE_LR, "model_lr": study.MODEL_LR}
    return _HEAD.format(task=task, rollouts=ROLLOUTS, model_rollouts=MODEL_ROLLOUTS, **costs, **seeds, **rates)


def _verdicts(found: Mapping[str, Any]) -> str:
    lines = [
        "## What the report says, and what the ladder says",
        "",
        "| claim | the report | verdicts of its statements here |",
        "|---|---|---|",
    ]
    for key, claim in found.items():
        verdicts = [s["verdict"] for s in claim["statements"]]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
        lines.append(f"| [{key}](#{key.lower()}) {claim['title']} | {claim['report']} | {counts} |")
    return "\n".join(lines)


def section(claim: Claim, rows: Sequence[tuple[Statement, Check, Finding]]) -> str:
    """Return the part of the page about a claim."""
    lines = [f"## {claim.key}", "", f"{claim.title}.", "", f"The report: {claim.report}", ""]
    lines += [f"![{claim.key}]({claim.key}.svg)", ""]
    lines += ["| statement | effect, 90 % interval | seeds won : lost | verdict |", "|---|---|---|---|"]
    for statement, _, f in rows:
        words = statement.words() + (" (control)" if statement.control else "")
        look = f", sign test at {f.look} seeds" if f.look and f.verdict not in ("not tested", "equivalent") else ""
        look += ", as claimed" if (statement.expect, f.verdict) == ("same", "equivalent") else ""
        lines.append(f"| {words} | {_effect(statement, f)} | {f.won} : {f.lost} | **{f.verdict}**{look} |")
    checks = dict.fromkeys(f"- {'passed' if c.passed else '**failed**'}: {c.text}" for _, c, _ in rows)
    return "\n".join([*lines, "", "Manipulation checks:", "", *checks])


def _effect(statement: Statement, f: Finding) -> str:
    values = (f.effect.mean, f.effect.low, f.effect.high)
    if statement.number.log:
        mean, low, high = (f"x{math.exp(x):.2f}" for x in values)
    else:
        mean, low, high = (f"{x:+.3f}" for x in values)
    return f"{mean} [{low}, {high}]"


def _arm_table(tier: str, arms: dict[str, dict[str, float]]) -> str:
    lines = [
        f"## Arms of tier {tier}",
        "",
        "| arm | accuracy after 15 %, last quarter | entropy at start, 30 %, end | top rung kept | clipped | bonus | "
        "steps a rollout |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, a in arms.items():
        cells = (
            name,
            f"{a['early accuracy']:.2f}, {a['accuracy']:.3f}",
            f"{a['start entropy']:.2f}, {a['entropy']:.3f}, {a['end entropy']:.3f}",
            f"{a['top rung kept']} of {a['seeds']}",
            f"{a['clipped']:.2%}",
            f"{a['bonus on']:.0%}",
            f"{a['updates a rollout']:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
