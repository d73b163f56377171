"""The end of the report: messages and alarms, starts with versions and command lines, and the settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from or1.config.changes import is_default
from or1.core.records import number
from or1.report.page_text import DEEPEST, clock, escaped, plain
from or1.run.message_log import read_log
from or1.run.starts import command_of, read_starts

_MESSAGES, _STARTS, _ALARMS = 300, 20, 20
_ALARM = re.compile(r"^\S+ (?:start|step \d+): alarm: (.*)")
_FACTS = ("or1", "commit", "python", "host", "system", "processors", "gpus", "cuda", "ranks")


def alarms(run_dir: Path) -> list[str]:
    """Return the newest alarms in the run's log, oldest first."""
    lines, _ = read_log(run_dir, 10 * _MESSAGES)
    return [found[1] for line in lines if (found := _ALARM.match(line))][-_ALARMS:]


def messages_section(run_dir: Path) -> Iterator[str]:
    """Yield the end of the run's log: warnings, alarms, crashes of rewards."""
    lines, more = read_log(run_dir, _MESSAGES)
    if lines:
        what = f"The last {len(lines):,} lines of log.txt." if more else "All of log.txt."
        yield f'<h2 id="messages">Messages</h2><div class="card"><p class="caption">{what}</p>'
        yield f"<pre>{escaped(chr(10).join(lines))}</pre></div>"


def starts_section(run_dir: Path) -> Iterator[str]:
    """Yield the newest start with versions and machine, and what differed in the starts before."""
    starts = read_starts(run_dir)
    if not starts:
        return
    *earlier, newest = starts
    rows = [("time", clock(number(newest.get("time")))), ("command", command_of(newest))]
    rows += [(name, plain(newest.get(name))) for name in _FACTS if newest.get(name) not in (None, [])]
    rows += [(str(name), plain(value)) for name, value in _packages(newest).items()]
    yield '<h2 id="starts">Starts</h2><div class="config"><section class="card"><h3>newest start</h3><table>'
    yield "".join(f"<tr><td>{escaped(name)}</td><td>{escaped(value)}</td></tr>" for name, value in rows)
    yield "</table></section>"
    if earlier:
        what = f"{len(earlier)} earlier" if len(earlier) <= _STARTS else f"{_STARTS} of {len(earlier)} earlier"
        yield f'<section class="card"><h3>{what}</h3><table>'
        for start in reversed(earlier[-_STARTS:]):
            others = "; ".join(_differences(start, newest)) or "same command and versions"
            yield f"<tr><td>{escaped(clock(number(start.get('time'))))}</td><td>{escaped(others)}</td></tr>"
        yield "</table></section>"
    yield "</div>"


def _packages(start: Mapping[str, Any]) -> Mapping[str, Any]:
    found = start.get("packages")
    return found if isinstance(found, dict) else {}


def _differences(start: Mapping[str, Any], newest: Mapping[str, Any]) -> Iterator[str]:
    if command_of(start) != command_of(newest):
        yield command_of(start)
    pairs = [(name, start.get(name), newest.get(name)) for name in _FACTS]
    old, new = _packages(start), _packages(newest)
    pairs += [(name, old.get(name), new.get(name)) for name in dict.fromkeys([*old, *new])]
    yield from (f"{name} {plain(was)}" for name, was, now in pairs if was != now)


class Row(NamedTuple):
    """One setting: its path, its value, and whether it differs from the default."""

    key: str
    value: Any
    is_set: bool


def config_section(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield a card for each section of the config: what differs from the default in bold, the rest folded."""
    if not raw:
        return
    yield '<h2 id="config">Config</h2><p class="caption">Settings that differ from the default; the others are folded.'
    yield '</p><div class="config">'
    loose = {key: value for key, value in raw.items() if not isinstance(value, dict | list)}
    yield _config_card("run", (), loose)
    for key, value in raw.items():
        if isinstance(value, dict):
            yield _config_card(f"[{key}]", (key,), value)
        elif isinstance(value, list):
            for index, item in enumerate(value, 1):
                values = item if isinstance(item, dict) else {"": item}
                yield _config_card(f"[[{key}]] {index}", (key, "0"), values)
    yield "</div>"


def _config_card(title: str, path: Sequence[str], values: Mapping[str, Any]) -> str:
    # What a stage leaves to the run has no value of its own.
    rows = [row for row in flat(values, path) if path[:1] != ("stage",) or row.value is not None]
    own, others = ([row for row in rows if row.is_set is wanted] for wanted in (True, False))
    folded = f"<details><summary>{len(others)} at the default</summary>{_table(others)}</details>" if others else ""
    return f'<section class="card"><h3>{escaped(title)}</h3>{_table(own)}{folded}</section>'


def _table(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    cells = "".join(
        f"<tr{' class=own' if row.is_set else ''}><td>{escaped(row.key)}</td><td>{escaped(plain(row.value))}</td></tr>"
        for row in rows
    )
    return f"<table>{cells}</table>"


def flat(values: Mapping[str, Any], path: Sequence[str] = (), prefix: str = "", depth: int = 0) -> Iterator[Row]:
    """Yield every setting of a resolved config or of the section at `path`. Tables in a list count from 0."""
    for key, value in values.items():
        place = (*path, key)
        if depth == DEEPEST and isinstance(value, dict | list):
            yield Row(prefix + key, "...", is_set=True)
        elif isinstance(value, dict):
            yield from flat(value, place, f"{prefix}{key}.", depth + 1)
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for index, item in enumerate(value):
                yield from flat(item, (*place, "0"), f"{prefix}{key}.{index}.", depth + 1)
        else:
            yield Row(prefix + key, value, is_set=not is_default(place, value))
