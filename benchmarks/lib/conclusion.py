"""One sentence that says what the rows of a benchmark show, also where or1 loses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.lib.load import MET, MISSED, NOT_JUDGED

Row = dict[str, Any]
OURS, PLAIN = "or1", "naive torch"
SETTING = ("shape", "tokens", "logits", "masked", "dtype", "tf32")
_TASK = "policy"
_PACKER = "or1 best fit (C++)"


def by_setting(rows: Sequence[Row]) -> dict[tuple, list[Row]]:
    """Return the rows of each setting, settings in the order of their first rows."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in SETTING), []).append(row)
    return groups


def of_head(rows: Sequence[Row], targets: Sequence[Row] = (), busy: str | None = None) -> str | None:
    """Return the sentence on the head and its targets, or None without a measurement of either.

    rows     as benchmarks.head.cases.row returns them
    targets  as Target.row returns them
    busy     what disturbed the whole session
    """
    clauses = [*_time_and_memory(rows), *_targets(targets)]
    if not clauses:
        return None
    if busy is not None:
        clauses.append(f"times are rough, because the machine was busy ({busy})")
    return _sentence(clauses)


def of_packing(rows: Sequence[Row]) -> str | None:
    """Return the sentence on the packer at the largest number of sequences, or None without rows to compare."""
    largest = max((r["sequences"] for r in rows), default=0)
    at = {r["packer"]: r for r in rows if r["sequences"] == largest}
    mine, peers = at.pop(_PACKER, None), list(at.values())
    if mine is None or not peers:
        return None
    best = min(peers, key=lambda r: r["empty"])
    return _sentence(
        [
            f"or1's packer leaves {mine['empty']:.1%} of the row slots of {largest:,} sequences empty, where "
            f"{best['packer']} leaves {best['empty']:.1%}, in {times(mine['ms'] / best['ms'])} the time"
        ]
    )


def times(ratio: float) -> str:
    """Return a ratio as text, such as "0.081 x" or "1.39 x"."""
    digits = 0 if ratio >= 10 else 2 if ratio >= 0.1 else 3
    return f"{ratio:.{digits}f} x"


def _time_and_memory(rows: Sequence[Row]) -> list[str]:
    """Return clauses on the policy loss: against naive torch, the bare GEMMs and the peers."""
    tables = [{r["variant"]: r for r in group if r["task"] == _TASK} for group in by_setting(rows).values()]
    tables = [table for table in tables if OURS in table]
    if not tables:
        return []
    both = [(table[OURS], table[PLAIN]) for table in tables if PLAIN in table]
    clauses = []
    gemms = f"{_range([table[OURS]['to_gemms'] for table in tables])} the time of the bare GEMMs"
    if both:
        ratios = [mine["ms"] / plain["ms"] for mine, plain in both]
        less = f"less in {sum(r < 1 for r in ratios)} of {len(ratios)} settings"
        clauses.append(f"or1 takes {_range(ratios)} the time of naive torch for the policy loss ({less}), {gemms}")
        # A peak of 0 means that the call fitted into memory the process already had.
        sizes = [
            mine["peak_extra_gib"] / plain["peak_extra_gib"] for mine, plain in both if plain["peak_extra_gib"] > 0
        ]
        if sizes:
            clauses[0] += f", and {_range(sizes)} its extra memory"
    else:
        clauses.append(f"or1 takes {gemms} for the policy loss, and naive torch was not measured")
    return [*clauses, *_peers(tables)]


def _peers(tables: Sequence[dict[str, Row]]) -> list[str]:
    """Return a clause on how often any peer is faster than or1, and which peer it usually is."""
    fastest = []
    for table in tables:
        peers = [r for name, r in table.items() if name != PLAIN and not name.startswith(OURS)]
        if peers:
            fastest.append((min(peers, key=lambda r: r["ms"]), table[OURS]))
    if not fastest:
        return ["no peer was measured"]
    ahead = Counter(peer["variant"] for peer, mine in fastest if peer["ms"] < mine["ms"])
    if not ahead:
        return ["no peer is faster"]
    often = f", most often {ahead.most_common(1)[0][0]}" if len(ahead) > 1 else f" ({next(iter(ahead))})"
    return [f"a peer is faster in {ahead.total()} of {len(fastest)}{often}"]


def _targets(targets: Sequence[Row]) -> list[str]:
    if not targets:
        return []
    met, missed, unjudged = ([r for r in targets if r["verdict"] == verdict] for verdict in (MET, MISSED, NOT_JUDGED))
    clauses = [f"targets met: {len(met)} of {len(targets)}"]
    if missed:
        clauses.append("missed: " + ", ".join(f"{r['target']} ({r['value']:.3g}, {limit_of(r)})" for r in missed))
    if unjudged:
        clauses.append(f"not judged: {', '.join(r['target'] for r in unjudged)}")
    return clauses


def limit_of(target: Row) -> str:
    """Return the limit of a target's row in words."""
    return f"at {'least' if target['at_least'] else 'most'} {target['limit']:g}"


def _range(ratios: Sequence[float]) -> str:
    low, high = times(min(ratios)), times(max(ratios))
    return low if low == high else f"{low.removesuffix(' x')} to {high}"


def _sentence(clauses: Sequence[str]) -> str:
    text = "; ".join(clauses)
    return (text if text.startswith(OURS) else text[0].upper() + text[1:]) + "."
