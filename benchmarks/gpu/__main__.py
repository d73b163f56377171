"""All GPU checks in one command: each part runs in its own process with a time limit and writes one JSON file.

    python -m benchmarks.gpu OUT_DIR [--wheels DIR] [--quick | --parts a,b] [--rehearse | --fake]

First it installs the wheels of DIR and builds the C++ module, where a compiler is. OUT_DIR/NAME.json is rewritten after
every row, so a part that is stopped keeps its finished rows. summary.json lists how each part ended. Exit code 0: every
part passed; 1: a part failed, was stopped or lacks a library; 2: no GPU; 4: --fake on a CPU build of torch.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu import bootstrap
from benchmarks.gpu.context import HARD_LIMIT_S, PARTS, QUICK, QUICK_S, SOFT_LIMIT_S, Context
from benchmarks.gpu.needs import first_line, remedy, why_not
from benchmarks.lib import interpreter
from benchmarks.lib.paths import ROOT

# Parts whose Triton kernels need the interpreter in a rehearsal. It must be enabled before triton is imported.
_INTERPRETED = {"kernels"}
# Exit codes of a part's process.
_PASSED, _FAILED, _LACKS = 0, 1, 3
NO_GPU, NO_FAKE = 2, 4
# Between the time at which a part starts no new work and its end by force.
_GRACE_S = 15


def main(argv: list[str] | None = None) -> int:
    """Parse arguments, run the parts, print the summary, and return the exit code."""
    arguments = _parsed(argv)
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.in_process:
        return _run_part(arguments)
    began = time.monotonic()
    environment = bootstrap.environment(arguments.wheels, arguments.out)
    if arguments.fake:
        command = [sys.executable, "-m", "benchmarks.gpu.fake", str(arguments.out)]
        return subprocess.run(command, cwd=ROOT, env=environment).returncode
    if not arguments.rehearse and not bootstrap.has_gpu(environment):
        print(
            "torch sees no GPU here; these are GPU checks. --rehearse runs them scaled down on a CPU.", file=sys.stderr
        )
        return NO_GPU
    # As an interrupt, so that the part that runs is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    native = bootstrap.build_native(environment)
    print(f"C++ module: {native}", flush=True)
    results = []
    for name in arguments.parts:
        limit = _limit(arguments, name, began)
        results.append(_spawn(name, arguments, environment, limit) if limit > 0 else _not_run(name, arguments.out))
    return _summary(results, arguments.out, native)


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for the JSON files")
    parser.add_argument("--parts", help=f"comma-separated, of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--part", action="append", choices=PARTS, help="run this part; may repeat")
    parser.add_argument("--quick", action="store_true", help=f"the headline figures, in {QUICK_S // 60} minutes")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of wheels (benchmarks/gpu/wheels.txt)")
    parser.add_argument("--rehearse", action="store_true", help="everything scaled down, on a CPU")
    parser.add_argument("--fake", action="store_true", help="shapes and devices with fake CUDA tensors, without a GPU")
    parser.add_argument("--in-process", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    named = (arguments.part or []) + (arguments.parts.split(",") if arguments.parts else [])
    if unknown := sorted(set(named) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    arguments.parts = named or list(QUICK if arguments.quick else PARTS)
    return arguments


def _limit(arguments: argparse.Namespace, name: str, began: float) -> float:
    """Return the seconds after which a part is stopped; 0 if --quick has none left for it."""
    if not arguments.quick:
        return HARD_LIMIT_S
    left = QUICK_S - (time.monotonic() - began)
    limit = min(PARTS[name].quick_s or HARD_LIMIT_S, left)
    return limit if limit > _GRACE_S else 0


def _run_part(arguments: argparse.Namespace) -> int:
    """Run one part in this process, which has arguments.in_process seconds. Return its exit code."""
    name = arguments.parts[0]
    soft = min(SOFT_LIMIT_S, max(5.0, arguments.in_process - _GRACE_S))
    context = Context(name, arguments.out, arguments.rehearse, time.monotonic() + soft, [], arguments.quick)
    part = PARTS[name]
    interpreted = arguments.rehearse and name in _INTERPRETED
    needs = [n for n in part.needs if n != "triton" or interpreted or not arguments.rehearse]
    if why := why_not(needs) or (interpreter.why_not() if interpreted else None):
        return _lacks(context, why)
    # Before the first row, so that a part that is stopped always leaves a file.
    context.write()
    try:
        getattr(importlib.import_module(part.module), part.function)(context)
    except ImportError as error:
        return _lacks(context, f"{first_line(error)}; {remedy(error.name or '')}")
    passed = context.rows and all(r.get("ok", True) for r in context.rows)
    context.write("passed" if passed else "failed")
    return _PASSED if passed else _FAILED


def _lacks(context: Context, why: str) -> int:
    context.skip(context.name, why)
    context.write(f"not run: {why}")
    return _LACKS


def _command(name: str, arguments: argparse.Namespace, limit: float) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", str(arguments.out), "--parts", name, "--in-process", str(limit)]
    return command + [flag for flag in ("--rehearse", "--quick") if getattr(arguments, flag[2:])]


def _spawn(name: str, arguments: argparse.Namespace, environment: dict[str, str], limit: float) -> dict:
    """Run one part in a child process for at most `limit` seconds. Failures of the child never raise."""
    path = arguments.out / f"{name}.json"
    path.unlink(missing_ok=True)
    if arguments.rehearse and name in _INTERPRETED:
        environment = environment | {"TRITON_INTERPRET": "1"}
    print(f"== {name}", flush=True)
    began = time.monotonic()
    log = arguments.out / f"{name}.log"
    with log.open("w", encoding="utf-8") as stderr:
        # A session of its own: the part's own children must end with it.
        child = subprocess.Popen(
            _command(name, arguments, limit), cwd=ROOT, env=environment, stderr=stderr, start_new_session=True
        )
        try:
            code = child.wait(limit)
            ended = {_PASSED: "passed", _LACKS: "not run"}.get(code, f"failed (exit code {code})")
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:
            # After an interrupt too. A part that ended may have left children, and its group lives as long as they do.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if ended.startswith("failed"):
        print("".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-15:]), file=sys.stderr, flush=True)
    return _close(path, name, ended, time.monotonic() - began)


def _not_run(name: str, out: Path) -> dict:
    return _close(out / f"{name}.json", name, "not run: out of time", 0.0)


def _close(path: Path, name: str, ended: str, seconds: float) -> dict:
    """Write how the part ended into its file, beside the rows that it finished. Return the summary's row."""
    whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"part": name, "rows": []}
    if whole.get("ended", "running") in ("running", "passed", "failed"):
        whole["ended"] = ended
    whole["seconds"] = round(seconds, 1)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return {"part": name, "ended": whole["ended"], "seconds": whole["seconds"]}


def _summary(results: list[dict], out: Path, native: str) -> int:
    from benchmarks.lib import conclusion, tables
    from benchmarks.lib.plots import plot_head
    from benchmarks.lib.results import write_json

    head_rows, skipped = [], {}
    for result in results:
        path = out / f"{result['part']}.json"
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        result |= {
            "rows": len(rows),
            "not_ok": sum(not r.get("ok", True) for r in rows),
            "skipped": sum("skipped" in r for r in rows),
        }
        skipped |= {r["skipped"]: r["why"] for r in rows if "skipped" in r}
        head_rows += [r for r in rows if "variant" in r and "ms" in r]
    console = tables.console(terminal=sys.stdout.isatty())
    tables.show_head(console, head_rows)
    tables.show_skipped(console, skipped)
    plot_head(out / "head.png", head_rows)
    tables.show_plain(console, "parts", results)
    said = conclusion.of_head(head_rows)
    if said is not None:
        console.print(said, highlight=False)
    write_json(out / "summary.json", results, native=native)
    return 0 if all(r["ended"] == "passed" for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
