"""A tuning from the config to the record: for `or1 tune`, and for a run before its first update."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from or1.config import Config, ModelConfig
from or1.core.display import Display
from or1.tune import cache
from or1.tune.apply import is_open, settled
from or1.tune.case import Case, case_of
from or1.tune.choice import Choice, Record, Trial
from or1.tune.machine import PINS, device_of, key_of
from or1.tune.options import GROUPS, candidates
from or1.tune.process import BENCHES, Child
from or1.tune.search import Budget, Candidates, search

LAZY_BUDGET_S = 60.0
"""Seconds of a tuning that a run does by itself."""


def measure(
    config: Config,
    display: Display,
    budget_s: float,
    *,
    sequence_size: int = 1,
    all_groups: bool = False,
    benches: str = BENCHES,
) -> Record:
    """Measure the candidates of a config for at most `budget_s` seconds, and keep the result in the user's cache.

    sequence_size  ranks that share a packed row
    all_groups     measure what has a single candidate too, for the rates of `or1 plan`
    benches        the function that makes the benches, as module:function

    Raises ModelError if the config.json of the model is missing or unusable.
    """
    case = case_of(config, sequence_size)
    index = torch.cuda.current_device() if case.device == "cuda" else 0
    found: Candidates = partial(candidates, case, config.model, torch.get_num_threads())
    groups = [group for group in GROUPS if len(found(group, {})) >= (1 if all_groups else 2)]
    budget = Budget(budget_s, display.progress("tune"))
    with Child(case.as_json() | {"index": index}, budget, benches) as child:
        trials, values = search(groups, found, child, budget, all_groups=all_groups)
    record = Record(
        key=key_of(case, config.model),
        choice=Choice.of({name: value for name, value in values.items() if is_open(config.model, name)}),
        rates=_rates(case, trials),
        trials=tuple(trials),
        made=time.strftime("%Y-%m-%d %H:%M"),
    )
    cache.keep(record, display.message)
    return record


def _rates(case: Case, trials: list[Trial]) -> dict[str, float]:
    """Return the useful operations a second of the chosen candidates, by activity."""
    flops = {"head": case.head_flops, "chunk": case.head_flops}
    # `or1 plan` counts the second forward of a checkpointed layer as work.
    flops |= {"attention": case.attention_flops, "mlp": case.mlp_flops * (4 / 3 if case.checkpointed else 1)}
    rates = {}
    for trial in trials:
        if trial.chosen and trial.seconds and trial.group in flops:
            # The chunk size is chosen after the implementation, so its time replaces that of the head.
            rates["head" if trial.group == "chunk" else trial.group] = flops[trial.group] / trial.median
    return rates


def choice_of_run(
    config: Config, display: Display, *, first: bool, sequence_size: int = 1, benches: str = BENCHES
) -> Choice:
    """Return the choice that a run uses, and record it in the run directory. For the main rank.

    A run keeps the choice of its first start, so that a resumed run computes what an unbroken one would.

    first  whether the run has no checkpoint yet

    Whatever goes wrong is shown, and the defaults apply: a tuning never ends a run.
    """
    try:
        return _choice_of_run(config, display, first, sequence_size, benches)
    # A main rank that raised here would leave the other ranks waiting, and the defaults are always right.
    except Exception as error:  # noqa: BLE001
        display.message(f"tune: nothing was measured ({error}); the defaults apply")
        return Choice()


def _choice_of_run(config: Config, display: Display, first: bool, sequence_size: int, benches: str) -> Choice:
    path, message = config.run_path / cache.RUN_FILE, display.message
    recorded = cache.read(path, message)
    if config.tune == "off" or config.deterministic:
        if recorded is not None:
            message(f"tune: the choice in {path} is not used ({_why_off(config)})")
        return Choice()
    if not first:
        return _resumed(config, recorded, path, message)
    device = "cuda" if torch.cuda.is_available() and config.model.device != "cpu" else "cpu"
    if (device == "cpu" and config.tune == "auto") or not _anything_open(config.model, device):
        return Choice()
    key = key_of(case_of(config, sequence_size), config.model)
    record, where = recorded, f"recorded in {path}"
    if record is None or record.key != key:
        record, where = cache.find(key, message), "from an earlier measurement"
    if record is None:
        message(f"tune: measuring what is fastest here, at most {LAZY_BUDGET_S:g} s (once; --no-tune skips this)")
        record = measure(config, display, LAZY_BUDGET_S, sequence_size=sequence_size, benches=benches)
        where = "measured now; or1 tune shows the details"
        for trial in record.trials:
            if trial.failed:
                message(f"tune: {trial.group} {trial.name} is out: {trial.why_out}")
    cache.write(path, record)
    return _usable(config.model, record, where, message)


def _resumed(config: Config, recorded: Record | None, path: Path, message: Callable[[str], None]) -> Choice:
    """Return the choice that a run recorded at its first start; the defaults if the run moved to another device."""
    if recorded is None:
        return Choice()
    there = recorded.key.get("device", {})
    here = device_of(there.get("kind", "cpu")) if there.get("kind") != "cuda" or torch.cuda.is_available() else {}
    if not here or any(here[name] != there.get(name) for name in ("name", "capability")):
        message(f"tune: {path} was measured on {there.get('name')}, which this machine is not; the defaults apply")
        return Choice()
    return _usable(config.model, recorded, f"recorded in {path}", message)


def _why_off(config: Config) -> str:
    return 'tune = "off"' if config.tune == "off" else "deterministic = true"


def _anything_open(model: ModelConfig, device: str) -> bool:
    """Return whether a setting is left to the measurement."""
    return device == "cpu" or any(is_open(model, name) for name in PINS)


def _usable(model: ModelConfig, record: Record, where: str, message: Callable[[str], None]) -> Choice:
    """Return the choice of a record after a check that it can be applied here."""
    try:
        settled(model, Choice(**{**record.choice.values(), "threads": None, "cpu_gemms": None}))  # type: ignore[arg-type]
    except ValueError as error:
        message(f"tune: the choice {where} does not fit this or1 ({error}); the defaults apply")
        return Choice()
    message(f"tune: {record.choice.line()} ({where})")
    return record.choice
