"""One case of benchmarks.step, in a process of its own: `python -m benchmarks.step.case SPEC_JSON RESULT_FILE`.

A case names an architecture, a context and engines. Engines of one case alternate, so that a load on the machine
affects all of them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.needs import why_not
from benchmarks.lib.measure import interleaved, peak_extra_bytes, stamp, wall_and_cpu_seconds
from benchmarks.step.batch import (
    PEAK_FLOPS,
    equal_documents,
    one_long_sequence,
    ragged_batch,
    rollout,
    sizes_of,
    useful_flops,
)
from benchmarks.step.engines import make_engine
from benchmarks.step.suite import fitted
from or1.core.errors import MemoryLimitError, OptimizerError
from or1.core.types import TrainSequence


def run_case(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of every engine by label, or an "error". The spec is a `benchmarks.step.suite.Case`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sequences = _batch_of(spec)
    result: dict[str, Any] = {"tokens": sum(s.packed_tokens for s in sequences), "engines": {}}
    engines, used = {}, {}
    for engine in spec["engines"]:
        used[engine["label"]] = options = _options(engine, spec, device)
        try:
            engines[engine["label"]] = make_engine(engine["name"], spec["architecture"], sequences, device, **options)
        except (ImportError, OptimizerError) as error:
            result["engines"][engine["label"]] = {"error": f"not installed: {error}"}
    first, peaks = {}, {}
    weighed: dict[str, list[tuple[float, float]]] = {label: [] for label in engines}
    for label, engine in engines.items():
        began = time.perf_counter()
        first[label] = engine.step().as_dict() | {"first_seconds": time.perf_counter() - began}
        if spec["rounds"] and device.type == "cpu":
            with contextlib.suppress(RuntimeError):
                peaks[label] = peak_extra_bytes(_timed(engine.step, device, weighed[label]), device)
    steps = {label: e.step for label, e in engines.items()}
    times = interleaved(steps, device, spec["rounds"], warmup=0, timer=wall_and_cpu_seconds)
    for label in engines:
        times[label] += weighed[label]
        if device.type == "cuda":
            # On a GPU a process has one engine, so weights, optimizer and activations are all its own.
            peaks[label] = torch.cuda.max_memory_allocated()
        wall, cpu = zip(*times[label], strict=True) if times[label] else ((), ())
        seconds = min(wall, default=first[label]["first_seconds"])
        result["engines"][label] = (
            _numbers(spec, sequences, seconds)
            | first[label]
            | {"all_seconds": wall, "cpu_seconds": min(cpu, default=None)}
            | {"peak_gib": peaks[label] / 2**30 if label in peaks else None}
            | {"options": used[label]}
        )
    return result | {"stamp": stamp()}


def _timed(step: Callable[[], object], device: torch.device, times: list[tuple[float, float]]) -> Callable[[], None]:
    """Return a function that runs the step and adds its wall and CPU seconds to `times`."""
    return lambda: times.append(wall_and_cpu_seconds(step, device))


def _options(engine: dict[str, Any], spec: dict[str, Any], device: torch.device) -> dict[str, Any]:
    if engine["name"] != "or1" or device.type != "cuda":
        return engine["options"]
    card = torch.cuda.get_device_properties(device).total_memory
    return fitted(engine["options"], card, why_not(("torchao",)) is None) | (
        {"row_tokens": spec["context"]} if spec.get("documents") else {}
    )


def _batch_of(spec: dict[str, Any]) -> list[TrainSequence]:
    if spec.get("rollout"):
        return rollout(spec["rollout"], spec["section"], spec["responses"])
    vocab = sizes_of(spec["architecture"])["vocab_size"]
    if spec.get("documents"):
        return equal_documents(spec["context"], spec["documents"], vocab)
    if spec["groups"] == 0:
        return one_long_sequence(spec["context"], vocab)
    return ragged_batch(spec["context"], spec["groups"], spec["prompt"], vocab)


def _numbers(spec: dict[str, Any], sequences: list[TrainSequence], seconds: float) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    flops = useful_flops(spec["architecture"], sequences)
    return {
        "seconds": seconds,
        "tokens_per_s": sum(s.packed_tokens for s in sequences) / seconds,
        "mfu": flops / seconds / peak if peak else None,
    }


def main(spec: str, result_file: str) -> int:
    """Run the case of the JSON `spec` and write its numbers. Out of memory is a result: the exit code is 0 too."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        result = run_case(json.loads(spec))
    except (torch.OutOfMemoryError, MemoryLimitError) as error:
        result = {"error": "out of memory", "detail": str(error).split("\n")[0], "stamp": stamp()}
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
