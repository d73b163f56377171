"""Idle ranks of a rollout: `python -m benchmarks.rollout OUT_DIR` writes rollout.json, README.md and idle.svg.

Simulates the ranks of a step with the dealing of `or1.rollout.dealing`, in simulated time, and runs two real ranks with
engines of unequal speed. `--quick` takes two distributions and at most 64 ranks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.lib.results import write_json
from benchmarks.rollout.cases import FORESEEN, MEANS, ORDERS, PROMPTS, RANKS, SPREADS, Step, simulate
from benchmarks.rollout.page import write_page

EACH = 16
"""Prompts of a rank where the step grows with the ranks: those of 8 ranks with the step of the recipe."""
MOST_GROWN = 64
PACES_S = (0.012, 0.003)


def fixed_step(mean: int, spread: float, ranks: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return rows of one step of 128 prompts on different numbers of ranks."""
    step, rows = Step.draw(mean, spread, seed=1), []
    for count in ranks:
        for order in ORDERS if count <= MOST_GROWN else (ORDERS[0], ORDERS[2]):
            rows.append(_row("fixed", mean, spread, count, order, simulate(step, count, order)))
    return rows


def grown_step(mean: int, spread: float) -> list[dict[str, Any]]:
    """Return rows of steps with 16 prompts a rank."""
    rows = []
    for count in (8, MOST_GROWN):
        step = Step.draw(mean, spread, seed=2, prompts=EACH * count)
        orders = (ORDERS[0], ORDERS[2], FORESEEN)
        rows += [_row("grown", mean, spread, count, order, simulate(step, count, order)) for order in orders]
    return rows


def _row(step: str, mean: int, spread: float, ranks: int, order: str, found: dict[str, float]) -> dict[str, Any]:
    row = {"step": step, "mean": mean, "spread": spread, "ranks": ranks, "order": order} | found
    print(
        f"{step:6} mean {mean:6,} spread {spread} {ranks:5} ranks, {order:24} idle {found['idle']:6.1%} "
        f"{found['seconds']:8,.0f} s, at least {found['least_s']:,.0f} s",
        flush=True,
    )
    return row


def two_ranks() -> dict[str, dict[str, float]]:
    """Return idle share and seconds of two real ranks, one four times as slow, for both ways to deal."""
    from benchmarks.rollout.paced import one_rollout
    from tests.helpers.ranks import run_ranks

    found = {}
    for name, by_demand in (("static", False), ("demand", True)):
        first, second = run_ranks(one_rollout, 2, PACES_S, by_demand)
        if first["tokens"] != second["tokens"]:
            raise ValueError(f"{name}: the ranks have different responses")
        found[name] = {"idle": first["idle"], "seconds": first["seconds"]}
        print(f"two real ranks, {name:8} idle {first['idle']:6.1%} {first['seconds']:8.2f} s", flush=True)
    return found


def main() -> None:
    """Run everything and write the files."""
    parser = argparse.ArgumentParser(description="Idle ranks of a rollout.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    ranks = tuple(count for count in RANKS if count <= MOST_GROWN or not arguments.quick)
    cases = [(mean, spread) for mean in MEANS for spread in SPREADS]
    if arguments.quick:
        cases = [cases[0], cases[-1]]
    real = two_ranks()
    rows = [row for mean, spread in cases for row in fixed_step(mean, spread, ranks)]
    rows += [row for mean, spread in cases for row in grown_step(mean, spread)]
    write_json(arguments.out / "rollout.json", rows, prompts=PROMPTS, two_ranks=real)
    write_page(arguments.out, rows, real)


if __name__ == "__main__":
    main()
