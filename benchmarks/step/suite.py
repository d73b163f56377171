"""Cases of the step benchmark, each run in a process of its own, and the table of results.

One case that runs out of memory or time does not affect the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.paths import ROOT

PARTS = ("cpu", "1.5b", "7b", "longest-1.5b", "longest-7b")
CONTEXTS = (8192, 16384, 32768)
LONGEST = (16384, 32768, 65536, 131072, 262144)


@dataclass(frozen=True)
class EngineSpec:
    """An engine of benchmarks.step.engines: its label in the table, name and options."""

    label: str
    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A measurement in one process. groups 0: one response of the whole context. rounds 0: time the first step."""

    part: str
    architecture: str
    context: int
    groups: int
    prompt: int
    rounds: int
    engines: tuple[EngineSpec, ...]


def cpu_cases() -> list[Case]:
    """Return two contexts of the tiny model; engines alternate, without activation checkpointing."""
    engines = (
        EngineSpec("or1", "or1", {"row_tokens": 2048}),
        EngineSpec("TRL", "trl", {}),
        EngineSpec("TRL, micro-batches of 4", "trl", {"micro_batch": 4}),
        EngineSpec("plain transformers", "plain", {"micro_batch": 4}),
    )
    return [
        Case(part="cpu", architecture="tiny", context=context, groups=2, prompt=32, rounds=3, engines=engines)
        for context in (128, 256)
    ]


def gpu_engines(architecture: str) -> tuple[EngineSpec, ...]:
    """Return the engines of a GPU case. Peers take one padded response at a time, as 32K tokens need."""
    large = architecture == "qwen2.5-7b"
    or1 = {"checkpointing": "offload" if large else "layer", "optimizer": "adamw8bit" if large else "adamw"}
    peer = {"micro_batch": 1, "checkpointing": "layer"}
    return (
        EngineSpec("or1", "or1", or1),
        EngineSpec("TRL", "trl", peer),
        EngineSpec("TRL with Liger", "trl-liger", peer),
        EngineSpec("plain transformers", "plain", peer),
    )


def cases_of(part: str) -> Iterator[list[Case]]:
    """Yield chains of cases. A failure ends its chain, because the next case needs more memory."""
    if part == "cpu":
        yield from ([case] for case in cpu_cases())
        return
    architecture = "qwen2.5-" + part.removeprefix("longest-")
    longest = part.startswith("longest-")
    sizes = {"groups": 0, "prompt": 256, "rounds": 0} if longest else {"groups": 2, "prompt": 512, "rounds": 1}
    for engine in gpu_engines(architecture):
        yield [
            Case(part=part, architecture=architecture, context=context, engines=(engine,), **sizes)
            for context in (LONGEST if longest else CONTEXTS)
        ]


def run(case: Case, limit_s: float) -> dict[str, Any]:
    """Run a case in a process of its own. Return its result, or {"error": reason}."""
    # Spinning threads would also measure the machine's other work; or1 sets the same variable.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"} | os.environ
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.step.case", json.dumps(asdict(case)), str(result)]
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return {"error": f"more than {limit_s:.0f} s"}
        if result.exists():
            return json.loads(result.read_text(encoding="utf-8"))
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit status {done.returncode}: {last}"}


def run_parts(parts: list[str], out: Path, case_s: float, total_s: float) -> list[dict[str, Any]]:
    """Run all cases of `parts` in order, for at most `total_s` seconds. Rewrite `out` after every case."""
    results: list[dict[str, Any]] = []
    began = time.monotonic()
    for chain in (chain for part in parts for chain in cases_of(part)):
        for case in chain:
            left = total_s - (time.monotonic() - began)
            result = run(case, min(case_s, left)) if left > 10 else {"error": "not run: out of --seconds"}
            results.append({"case": asdict(case), "result": result})
            out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            names = ", ".join(e.label for e in case.engines)
            print(f"{case.architecture} at {case.context}: {names}: {result.get('error', 'done')}", flush=True)
            if "error" in result:
                break
    return results


HEADER = ("model", "context", "engine", "s/step", "tokens/s", "MFU", "peak GiB", "against or1", "loss", "grad norm")


def table(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return HEADER and the table's rows. "against or1" is step time over or1's step time."""
    ours = {}
    rows: list[tuple[str, ...]] = [HEADER]
    for entry in results:
        case, result = entry["case"], entry["result"]
        where = (case["architecture"], f"{case['context']:,}" + ("" if case["groups"] else " (one)"))
        for engine in case["engines"]:
            numbers = result.get("engines", {}).get(engine["label"], {"error": result.get("error", "absent")})
            if "error" in numbers:
                rows.append((*where, engine["label"], numbers["error"], *[""] * 6))
                continue
            if engine["name"] == "or1":
                ours[where] = numbers["seconds"]
            rows.append(
                (
                    *where,
                    engine["label"],
                    f"{numbers['seconds']:.2f}",
                    f"{numbers['tokens_per_s']:,.0f}",
                    f"{numbers['mfu']:.1%}" if numbers["mfu"] else "-",
                    f"{numbers['peak_gib']:.2f}" if numbers["peak_gib"] is not None else "-",
                    f"{numbers['seconds'] / ours[where]:.2f}x" if where in ours else "-",
                    f"{numbers['loss']:.7f}",
                    f"{numbers['grad_norm']:.6f}",
                )
            )
    return rows
