"""The page of results, written by `python -m benchmarks.rollout`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib import style
from benchmarks.rollout.cases import FORESEEN, LIMIT, PROMPTS, SAMPLES, WITHIN_CV
from benchmarks.rollout.engine import BATCH_SIZE, GPU_MEMORY, costs

GOAL = 0.03
"""Largest idle share by demand that is aimed at, up to 64 ranks."""
_STATIC, _DEMAND = "static", "demand"
Row = Mapping[str, Any]


def write_page(out: Path, rows: Sequence[Row], real: Mapping[str, Mapping[str, float]]) -> None:
    """Write README.md and idle.svg."""
    _picture(out / "idle.svg", rows)
    (out / "README.md").write_text(_text(rows, real), encoding="utf-8")


def _text(rows: Sequence[Row], real: Mapping[str, Mapping[str, float]]) -> str:
    decoding, cache = costs()
    slow, fast = real[_STATIC], real[_DEMAND]
    return f"""# Idle ranks of a rollout

Written by `python -m benchmarks.rollout OUT_DIR`. **Simulated time**, except where real ranks are named. The code that
orders and hands out the responses is that of a run (`or1/rollout/dealing.py`). The engine is a model, and no time here
was measured on a GPU.

"static" gives rank r the prompts r, r + size, ... before lengths are known. "demand" lets engines take responses as
they have room, longest expected first. The expected length is the mean of the same prompt's responses at its last
visit. "lengths unknown" is the first epoch. "foreseen" deals by demand with the length of each response known in
advance, which no run has. Idle is the part of the rollout in which a rank has no response left while another has, mean
over the ranks. "At least" is a bound in seconds for every order of the responses: an even share of all decoding steps,
with a full batch or a full cache in each, or the longest response alone.

![Idle share against the number of ranks](idle.svg)

## As many responses for each rank: 16 prompts of {SAMPLES}

{_grown(rows)}

What is left is the tail: the last responses that a rank takes are expected to be short, but some are several times as
long as the mean of their prompt. Nobody knows which before they end. The tail takes about 100 s whatever the step, so
its share is largest where the step is shortest.

{_above(rows)}

## One step of {PROMPTS} prompts of {SAMPLES}, on more and more ranks

{_fixed(rows)}

What limits dealing by demand beyond: a rank must have more responses than run at once, or there is nothing left to
deal. {PROMPTS * SAMPLES:,} responses on 64 ranks are {PROMPTS * SAMPLES // 64} for each, and about half of them run at
once. On 256 and more ranks all responses begin at once, and the step takes as long as its longest response, which one
engine generates one token at a time. More ranks then make the step hardly shorter. What helps there is a larger step, a
deadline, partial rollouts, or responses that outlive their step.

## Two real ranks, one with an engine four times as slow

Two processes, torch's store, delays in place of a model: static {slow["seconds"]:.2f} s with {slow["idle"]:.0%} idle,
by demand {fast["seconds"]:.2f} s with {fast["idle"]:.0%} idle. All responses are equal.

## The model

- Lengths: log-normal means of the prompts with the spread of the tables (standard deviation over mean), log-normal
  responses around them with a spread of {WITHIN_CV}, cut at {LIMIT:,} tokens.
- A decoding step of a 7B model on an H100, as `or1 plan` has it: {1e3 * decoding.weights_s:.1f} ms to read the weights
  and {1e6 * decoding.cache_token_s * 1000:.0f} us for every 1,000 cached tokens of all running responses (80 % of 3,350
  GB/s), or {1e6 * decoding.token_s:.0f} us a response for the products (70 % of 989 TFLOP/s) if that is longer.
- The cache holds {cache:,} tokens (gpu_memory = {GPU_MEMORY}). At most {BATCH_SIZE} responses run. If the cache is
  full, the response that began last waits and is computed again, as in vLLM.
- The counter that hands out responses costs no time here. On one machine a call takes about 0.1 ms.
"""


def _pairs(rows: Sequence[Row], step: str) -> list[tuple[int, float, int]]:
    return list(dict.fromkeys((r["mean"], r["spread"], r["ranks"]) for r in rows if r["step"] == step))


def _of(rows: Sequence[Row], step: str, key: tuple[int, float, int], order: str) -> Row | None:
    for row in rows:
        if (row["step"], row["order"]) == (step, order) and (row["mean"], row["spread"], row["ranks"]) == key:
            return row
    return None


def _grown(rows: Sequence[Row]) -> str:
    titles = ("mean", "spread", "ranks", "idle, static", "demand", "foreseen")
    titles += ("seconds, static", "demand", "foreseen", "at least", "shorter")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for key in _pairs(rows, "grown"):
        a, b, c = (_of(rows, "grown", key, order) for order in (_STATIC, _DEMAND, FORESEEN))
        if a is not None and b is not None and c is not None:
            cells = [f"{key[0]:,}", str(key[1]), str(key[2]), *(f"{row['idle']:.1%}" for row in (a, b, c))]
            cells += [*(f"{row['seconds']:,.0f}" for row in (a, b, c)), f"{b['least_s']:,.0f}"]
            lines.append(f"| {' | '.join(cells)} | {1 - b['seconds'] / a['seconds']:.0%} |")
    return "\n".join(lines)


def _above(rows: Sequence[Row]) -> str:
    """Return what holds where the idle share is above its goal."""
    lines = []
    for key in _pairs(rows, "grown"):
        row, foreseen = _of(rows, "grown", key, _DEMAND), _of(rows, "grown", key, FORESEEN)
        if row is None or foreseen is None or row["idle"] <= GOAL:
            continue
        change = foreseen["seconds"] / row["seconds"] - 1
        lines.append(
            f"- Mean {key[0]:,}, spread {key[1]}, {key[2]} ranks: {row['idle']:.1%} idle in {row['seconds']:,.0f} s. "
            f"With every length foreseen\n  {foreseen['idle']:.1%} would be idle, in {foreseen['seconds']:,.0f} s "
            f"({change:+.1%}). No order takes less than {row['least_s']:,.0f} s."
        )
    if not lines:
        return f"At most {GOAL:.0%} are idle in every row."
    return "\n".join([f"More than {GOAL:.0%} are idle in {len(lines)} of these rows:", "", *lines])


def _fixed(rows: Sequence[Row]) -> str:
    lines = ["| mean | spread | ranks | idle, static | lengths unknown | demand | seconds, static | demand |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for key in _pairs(rows, "fixed"):
        a, u, b = (_of(rows, "fixed", key, order) for order in (_STATIC, "demand, lengths unknown", _DEMAND))
        if a is not None and b is not None:
            unknown = "" if u is None else f"{u['idle']:.1%}"
            lines.append(
                f"| {key[0]:,} | {key[1]} | {key[2]:,} | {a['idle']:.1%} | {unknown} | {b['idle']:.1%} | "
                f"{a['seconds']:,.0f} | {b['seconds']:,.0f} |"
            )
    return "\n".join(lines)


def _picture(path: Path, rows: Sequence[Row]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style.rc()):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot()
        cases = list(dict.fromkeys((r["mean"], r["spread"]) for r in rows if r["step"] == "fixed"))
        for color, case in enumerate((cases[0], cases[-1])):
            for order, line in ((_STATIC, "--"), (_DEMAND, "-")):
                found = [
                    r for r in rows if r["step"] == "fixed" and (r["mean"], r["spread"]) == case and r["order"] == order
                ]
                label = f"{order}, mean {case[0]:,}, spread {case[1]}"
                shares = [100 * r["idle"] for r in found]
                axes.plot([r["ranks"] for r in found], shares, line, color=f"C{color}", marker="o", label=label)
        axes.set_xscale("log", base=2)
        counts = sorted({r["ranks"] for r in rows if r["step"] == "fixed"})
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.set_xlabel(f"ranks that share one step of {PROMPTS * SAMPLES:,} responses")
        axes.set_ylabel("idle, % of the rollout")
        axes.grid(axis="y")
        axes.legend()
        figure.savefig(path, metadata={"Date": None})
