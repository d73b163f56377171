"""The results page, written from the JSON of runs on a GPU: `python -m benchmarks.gpu.page [OUT_DIR]`.

With OUT_DIR, the output of `python -m benchmarks.gpu OUT_DIR`, its files are first kept under
benchmarks/results/gpu/DATE-DEVICE/. Without it the page is written again from what is kept. Rehearsals are refused: the
page has numbers of GPUs alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.context import PARTS
from benchmarks.lib.paths import ROOT

FOLDER = ROOT / "benchmarks" / "results" / "gpu"
HEADING = "# Results on GPUs\n"
EMPTY = """
No GPU run is recorded yet. Every statement of this repository about the speed of a GPU is a prediction until one is.

    python -m benchmarks.gpu OUT_DIR --wheels wheels --quick     on the GPU machine
    python -m benchmarks.gpu.page OUT_DIR                        writes this page
"""
_LEGEND = """
Written by `python -m benchmarks.gpu.page` from the JSON files beside this page. "predicted" is what was expected before
the run and is no measurement; "target" is an aim. "x GEMMs" is the time over that of three bare GEMMs in the same run.
"""
# Columns of a row that say which row it is, in the order of the page.
_NAMES = (
    *("variant", "task", "backend", "architecture", "engine", "context", "documents"),
    *("pass", "impl", "gemm", "shape", "rows", "tokens", "logits", "masked", "dtype", "tf32"),
)
_FIGURES = {
    "ms": "ms",
    "to_gemms": "x GEMMs",
    "gemms_ms": "GEMMs ms",
    "peak_extra_gib": "peak extra GiB",
    "seconds": "s/step",
    "mfu": "MFU",
    "peak_gib": "peak GiB",
    "forward_ms": "forward ms",
    "backward_ms": "backward ms",
    "forward_tflops": "forward TFLOP/s",
    "backward_tflops": "backward TFLOP/s",
    "tflops": "TFLOP/s",
    "gb_per_s": "GB/s",
}


def keep(out: Path, folder: Path) -> Path:
    """Copy the parts' files of a run into a folder named by date and device, and return that folder.

    Raises ValueError for a folder without parts, and for a rehearsal.
    """
    found = {name: out / f"{name}.json" for name in PARTS if (out / f"{name}.json").exists()}
    runs = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items()}
    # A part that never started has no stamp, and nothing to say about a machine.
    stamped = {name: run for name, run in runs.items() if "device" in run}
    if not stamped:
        raise ValueError(f"{out} has no results of benchmarks.gpu; run python -m benchmarks.gpu {out}")
    if other := sorted(name for name, run in stamped.items() if run.get("rehearsal") or run.get("cuda") is None):
        raise ValueError(f"{out}: {', '.join(other)} did not run on a GPU; the page takes GPU runs alone")
    stamp = next(iter(stamped.values()))
    name = re.sub(r"[^a-z0-9]+", "-", stamp["device"].lower()).strip("-")
    kept = folder / f"{stamp['time'][:10]}-{name}"
    kept.mkdir(parents=True, exist_ok=True)
    for path in found.values():
        shutil.copyfile(path, kept / path.name)
    return kept


def page(folder: Path) -> str:
    """Return the page for the runs kept in a folder, latest first."""
    runs = sorted((path for path in folder.glob("*/") if any(path.glob("*.json"))), reverse=True)
    if not runs:
        return HEADING + EMPTY
    return HEADING + _LEGEND + "".join(_run(path) for path in runs)


def _run(path: Path) -> str:
    parts = {name: json.loads(p.read_text(encoding="utf-8")) for name in PARTS if (p := path / f"{name}.json").exists()}
    stamp: dict[str, Any] = next((run for run in parts.values() if "device" in run), {})
    versions = ", ".join(f"{k} {v}" for k, v in stamp.get("versions", {}).items())
    lines = [
        f"\n## {stamp.get('device')}, {stamp.get('time', '')[:10]}\n",
        f"Commit {stamp.get('commit')}, driver {stamp.get('driver')}, CUDA {stamp.get('cuda')}, {versions}.\n",
    ]
    for name, part in parts.items():
        lines.append(f"\n### {name}: {part.get('ended', 'ended unknown')}, {part.get('seconds', 0):.0f} s\n")
        lines += _tables(part["rows"])
    return "\n".join(lines)


def _tables(rows: list[dict]) -> list[str]:
    """Return one table for each kind of row, then checks that failed, and what was skipped."""
    kinds: dict[tuple, list[dict]] = {}
    for row in rows:
        names = tuple(k for k in _NAMES if k in row)
        figures = tuple(k for k in _FIGURES if isinstance(row.get(k), int | float))
        if figures:
            kinds.setdefault((names, figures), []).append(row)
    lines = []
    for (names, figures), group in kinds.items():
        head = [*names, *(_FIGURES[k] for k in figures), "predicted", "target"]
        lines += ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
        lines += ["| " + " | ".join(_cells(row, names, figures)) + " |" for row in group] + [""]
    checks = [row for row in rows if "check" in row]
    if checks:
        lines.append(f"{sum(row['ok'] for row in checks)} of {len(checks)} checks hold.\n")
    lines += [f"- failed: {row['check']}" for row in checks if not row["ok"]]
    lines += [
        f"- not timed: {row.get('variant', '?')}, {row.get('task', '?')}: {row['wrong']}"
        for row in rows
        if "wrong" in row
    ]
    lines += [
        f"- error: {row.get('engine')} at {row.get('context')}: {row['error']}"
        for row in rows
        if "engine" in row and "error" in row
    ]
    lines += [f"- skipped: {row['skipped']}: {row['why']}" for row in rows if "skipped" in row]
    return lines


def _cells(row: dict, names: tuple, figures: tuple) -> list[str]:
    beside = [
        "; ".join(f"{_FIGURES[k]}: {v}" for k, v in row.get(word, {}).items()) for word in ("predicted", "target")
    ]
    return [*(str(row[k]) for k in names), *(f"{row[k]:.4g}" for k in figures), *beside]


def main(argv: list[str] | None = None) -> int:
    """Keep the files of OUT_DIR, if given, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.page", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT_DIR", help="output of python -m benchmarks.gpu")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the page (default: %(default)s)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.out is not None:
            print(keep(arguments.out, arguments.folder))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    arguments.folder.mkdir(parents=True, exist_ok=True)
    readme = arguments.folder / "README.md"
    readme.write_text(page(arguments.folder), encoding="utf-8")
    print(readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
