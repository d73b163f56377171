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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """A measurement in one process.

    groups     prompts with several responses each; 0: one response of the whole context
    documents  above 0: this many responses of equal length in one row of `context` tokens, instead of groups
    rounds     steps that are timed after the first, besides the step whose memory is measured; 0: the first is timed
    rollout    file of benchmarks.real.make, whose `section` gives the first `responses` responses, instead of groups
    """

    part: str
    architecture: str
    context: int
    groups: int
    prompt: int
    rounds: int
    engines: tuple[EngineSpec, ...]
    documents: int = 0
    rollout: str = ""
    section: str = ""
    responses: int = 0


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


def model_cases(model: str, rollout: str, batches: Mapping[str, int], rounds: int = 1) -> list[Case]:
    """Return a case for each section of a rollout file: a model folder takes a step on sampled responses.

    batches  responses by section, a multiple of GROUP_SIZE
    """
    engines = (
        EngineSpec("or1", "or1", {"row_tokens": 2048}),
        EngineSpec("or1, prompts not shared", "or1", {"row_tokens": 2048, "sharing": "off"}),
        EngineSpec("TRL", "trl", {}),
        EngineSpec("plain transformers", "plain", {}),
    )
    sizes = {"context": 0, "groups": 0, "prompt": 0, "rounds": rounds, "engines": engines}
    return [
        Case(part="model", architecture=model, rollout=rollout, section=section, responses=count, **sizes)
        for section, count in batches.items()
    ]


# A smaller card has no room for the 7B model's fp32 masters and gradient sums beside its moments: 92 GB.
_ROOMY_BYTES = 100 << 30


def or1_options(architecture: str, longest: bool = False) -> dict[str, Any]:
    """Return or1's options for a model on any card. `fitted` completes them where the card is known."""
    large = architecture == "qwen2.5-7b"
    return {"checkpointing": "offload" if longest else "layer", "optimizer": "adamw8bit" if large else "adamw"}


def fitted(options: dict[str, Any], card_bytes: int, torchao: bool) -> dict[str, Any]:
    """Return or1's options for a card of this size.

    8-bit moments stand for a large model. Without torchao its moments are in host memory. A card below 100 GiB has no
    fp32 masters and sums gradients in bf16: 46 GB for 7B instead of 92.
    """
    if options.get("optimizer") != "adamw8bit":
        return options
    options = options | ({} if torchao else {"optimizer": "offload"})
    return options | ({} if card_bytes >= _ROOMY_BYTES else {"weights": "stochastic", "grad_dtype": "bfloat16"})


def gpu_engines(architecture: str, longest: bool = False) -> tuple[EngineSpec, ...]:
    """Return the engines of a GPU case. Peers take one padded response at a time, as 32K tokens need."""
    peer = {"micro_batch": 1, "checkpointing": "layer"}
    return (
        EngineSpec("or1", "or1", or1_options(architecture, longest)),
        EngineSpec("TRL", "trl", peer),
        EngineSpec("TRL with Liger", "trl-liger", peer),
        EngineSpec("plain transformers", "plain", peer),
    )


def row_cases(part: str, architecture: str) -> Iterator[list[Case]]:
    """Yield or1's headline: one row of 32768 tokens, of one document and of four."""
    for documents in (1, 4):
        yield [
            Case(
                part=part,
                architecture=architecture,
                context=32768,
                groups=0,
                prompt=256,
                rounds=1,
                engines=gpu_engines(architecture)[:1],
                documents=documents,
            )
        ]


def cases_of(part: str, quick: bool = False) -> Iterator[list[Case]]:
    """Yield chains of cases. A failure ends its chain, because the next case needs more memory.

    quick  on a GPU only or1's rows of 32768 tokens
    """
    if part == "cpu":
        yield from ([case] for case in cpu_cases())
        return
    architecture = "qwen2.5-" + part.removeprefix("longest-")
    longest = part.startswith("longest-")
    sizes = {"groups": 0, "prompt": 256, "rounds": 0} if longest else {"groups": 2, "prompt": 512, "rounds": 1}
    if not longest:
        yield from row_cases(part, architecture)
        if quick:
            return
    for engine in gpu_engines(architecture, longest):
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


def run_parts(
    parts: list[str],
    out: Path,
    case_s: float,
    total_s: float,
    *,
    quick: bool = False,
    done: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> list[dict[str, Any]]:
    """Run all cases of `parts` in order, for at most `total_s` seconds. Rewrite `out` after every case.

    done  called with each finished case and its result
    """
    chains = (chain for part in parts for chain in (cases_of(part, quick=True) if quick else cases_of(part)))
    return run_chains(chains, out, case_s, total_s, done=done)


def run_chains(
    chains: Iterable[Sequence[Case]],
    out: Path,
    case_s: float,
    total_s: float,
    *,
    done: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> list[dict[str, Any]]:
    """Run chains of cases as `run_parts` does. A failure ends its chain."""
    results: list[dict[str, Any]] = []
    began = time.monotonic()
    for chain in chains:
        for case in chain:
            left = total_s - (time.monotonic() - began)
            result = run(case, min(case_s, left)) if left > 10 else {"error": "not run: out of --seconds"}
            results.append({"case": asdict(case), "result": result})
            out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            done(results[-1])
            names = ", ".join(e.label for e in case.engines)
            at = case.section or case.context
            print(f"{case.architecture} at {at}: {names}: {result.get('error', 'done')}", flush=True)
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
        kind = f" (in {n})" if (n := case.get("documents", 0)) else ("" if case["groups"] else " (one)")
        where = (case["architecture"], case.get("section") or f"{case['context']:,}{kind}")
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
