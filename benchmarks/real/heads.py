"""Errors, time and memory of or1's head and its peers on real inputs.

Every error is against fp64, from the same stored inputs. Legend: N rows, H hidden, V vocab.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.head.variants import VARIANTS, Variant, or1_variant
from benchmarks.lib import measure
from benchmarks.lib.problems import TASKS, errors, truth
from benchmarks.real.inputs import Inputs

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
PLAIN = "naive torch"
Row = dict[str, Any]


def variants(impls: Sequence[str] = ("native", "torch")) -> list[Variant]:
    """Return or1's head by implementation, and the peers that hold no GPU kernel."""
    peers = [PLAIN, "TRL default", "TRL chunked", "verl torch", "Liger FL-GRPO", "torch linear_cross_entropy"]
    return [or1_variant(f"or1 {impl}", impl=impl) for impl in impls] + [VARIANTS[name] for name in peers]


def skipped(some: Sequence[Variant]) -> dict[str, str]:
    """Return the variants that cannot run here, with the reason."""
    return {variant.name: why for variant in some if (why := variant.why_not(CPU)) is not None}


def error_rows(
    name: str, given: Inputs, sections: Sequence[str], some: Sequence[Variant], sample: int = 64
) -> list[Row]:
    """Return one row a section, dtype, task and variant: errors, and whether the three-way rule holds.

    name    which policy the inputs are of, "before" or "after"
    sample  live rows of a section that are compared
    """
    rows = []
    for section in sections:
        for dtype in DTYPES:
            problem = given.problem(section, dtype=dtype).sample(sample)
            for task in TASKS:
                want = truth(problem, task)
                plain = errors(VARIANTS[PLAIN].runner(problem, task)(), want)
                for variant in some:
                    if task not in variant.tasks or variant.why_not(CPU) is not None:
                        continue
                    error = errors(variant.runner(problem, task)(), want)
                    rows.append(
                        _setting(name, section, dtype)
                        | {"rows": len(problem.targets), "task": task, "variant": variant.name, "error": error}
                        | {"three_way": why_not_exact(error, plain, want, dtype) or "holds"}
                    )
    return rows


def why_not_exact(
    error: Mapping[str, float | None], plain: Mapping[str, float | None], want: SimpleNamespace, dtype: torch.dtype
) -> str:
    """Return which errors exceed twice plain torch's in the same dtype, plus two units of rounding; "" for none.

    The unit is fp32's for log-probs and entropies, at the scale of the largest, and the dtype's for gradients.
    """
    beyond = []
    for key, value in error.items():
        peer = plain[key]
        if value is None or peer is None:
            continue
        if key.startswith("d"):
            unit = torch.finfo(dtype).eps
        else:
            unit = torch.finfo(torch.float32).eps * float(getattr(want, key).abs().max())
        # A nan exceeds every limit.
        if not value <= 2 * peer + 2 * unit:
            beyond.append(f"{key} {value:.1e}, plain torch {peer:.1e}")
    return "; ".join(beyond)


def time_rows(
    name: str, given: Inputs, sections: Sequence[str], some: Sequence[Variant], tokens: int = 512, rounds: int = 2
) -> list[Row]:
    """Return one row a section, dtype, task and variant: CPU seconds of the best round, and peak memory.

    tokens  rows of a problem, padding included; variants alternate, with the three bare GEMMs as one of them
    """
    rows = []
    for section in sections:
        for dtype in DTYPES:
            problem = given.problem(section, tokens, dtype=dtype)
            gemms = measure.bare_gemms(problem.hidden[problem.live], problem.weight)
            runs = {
                (variant.name, task): variant.runner(problem, task)
                for task in TASKS
                for variant in some
                if task in variant.tasks and variant.why_not(CPU) is None
            }
            peaks = {key: _peak(run) for key, run in runs.items()}
            fns = {_key(*key): run for key, run in runs.items()} | {"gemms": gemms}
            times = measure.interleaved(fns, CPU, rounds, warmup=0, timer=measure.cpu_seconds)
            for (variant_name, task), peak in peaks.items():
                rows.append(
                    _setting(name, section, dtype)
                    | {"rows": len(problem.targets), "live_rows": len(problem.live)}
                    | {"task": task, "variant": variant_name, "peak_extra_mib": peak / 2**20}
                    | _seconds(times[_key(variant_name, task)], times["gemms"])
                )
    return rows


def _setting(name: str, section: str, dtype: torch.dtype) -> Row:
    return {"policy": name, "section": section, "dtype": str(dtype).removeprefix("torch.")}


def _key(variant: str, task: str) -> str:
    return f"{variant}: {task}"


def _seconds(times: Sequence[float], gemms: Sequence[float]) -> Row:
    return {
        "cpu_s": min(times),
        "cpu_s_all": list(times),
        "gemms_cpu_s": min(gemms),
        "to_gemms": min(times) / min(gemms),
    }


def _peak(run: Any) -> float:
    # The first call allocates the libraries' persistent buffers.
    run()
    try:
        return measure.peak_extra_bytes(run, CPU)
    except RuntimeError:
        return math.nan


def is_or1(variant: str) -> bool:
    """Return True for a variant of this repository."""
    return variant.startswith("or1")
