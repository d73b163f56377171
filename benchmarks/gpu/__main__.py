"""All GPU checks in one command: each part runs in its own process with a time limit and writes one JSON file.

    python -m benchmarks.gpu OUT_DIR [--part NAME ...] [--wheels DIR] [--rehearse]

OUT_DIR/NAME.json is rewritten after every row, so a killed part keeps its finished rows. summary.json lists how each
part ended. Exit code 0: every part passed. --rehearse runs everything scaled down on a CPU.
"""

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.context import HARD_LIMIT_S, PARTS, SOFT_LIMIT_S, Context
from benchmarks.lib.paths import ROOT

# Parts whose Triton kernels need the interpreter in a rehearsal. It must be enabled before triton is imported.
_INTERPRETED = {"kernels"}


def main(argv: list[str] | None = None) -> int:
    """Parse arguments, run the parts, print the summary, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="folder for the JSON files")
    parser.add_argument("--part", action="append", choices=PARTS, help="run this part; may repeat (default: all)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="folder of wheels to install beside the environment")
    parser.add_argument("--rehearse", action="store_true", help="everything scaled down, on a CPU")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.in_process:
        return _run_part(arguments.part[0], arguments.out, arguments.rehearse)
    environment = _environment(arguments)
    if not arguments.rehearse and not _has_gpu(environment):
        print(
            "torch sees no GPU here; these are GPU checks. --rehearse runs them scaled down on a CPU.", file=sys.stderr
        )
        return 2
    results = [_spawn(name, arguments, environment) for name in arguments.part or PARTS]
    return _summary(results, arguments.out)


def _run_part(name: str, out: Path, rehearse: bool) -> int:
    module, function = PARTS[name]
    context = Context(name, out, rehearse, time.monotonic() + SOFT_LIMIT_S, [])
    part: Callable[[Context], None] = getattr(importlib.import_module(module), function)
    part(context)
    return 0 if context.rows and all(r.get("ok", True) for r in context.rows) else 1


def _spawn(name: str, arguments: argparse.Namespace, environment: dict[str, str]) -> dict:
    """Run one part in a child process. Failures of the child never raise."""
    (arguments.out / f"{name}.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", str(arguments.out), "--part", name, "--in-process"]
    if arguments.rehearse and name in _INTERPRETED:
        environment = environment | {"TRITON_INTERPRET": "1"}
    print(f"== {name}", flush=True)
    began = time.monotonic()
    try:
        command += ["--rehearse"] if arguments.rehearse else []
        code = subprocess.run(command, cwd=ROOT, env=environment, timeout=HARD_LIMIT_S).returncode
        ended = "passed" if code == 0 else f"failed (exit code {code})"
    except subprocess.TimeoutExpired:
        ended = f"killed after {HARD_LIMIT_S} s"
    return {"part": name, "ended": ended, "seconds": round(time.monotonic() - began, 1)}


def _summary(results: list[dict], out: Path) -> int:
    import json

    from rich.console import Console

    from benchmarks.lib.results import plot_head, show_head, show_plain, write_json

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
        head_rows += [r for r in rows if "variant" in r]
    console = Console(width=None if sys.stdout.isatty() else 140)
    show_head(console, head_rows, skipped)
    plot_head(out / "head.png", head_rows)
    show_plain(console, "parts", results)
    write_json(out / "summary.json", results)
    return 0 if all(r["ended"] == "passed" for r in results) else 1


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the children's environment: repository and wheels importable, threads that sleep at barriers."""
    extra = [ROOT]
    if importlib.util.find_spec("or1_kernels") is None:
        extra.append(ROOT / "kernels")
    if arguments.wheels is not None:
        extra.append(_install(arguments.wheels, arguments.out / "site"))
    path = os.pathsep.join([*map(str, extra), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path[:0] = map(str, extra)
    return environment


def _install(wheels: Path, site: Path) -> Path:
    """Install every wheel of the folder into `site`, one at a time, so that one bad wheel affects no other."""
    for wheel in sorted(wheels.glob("*.whl")):
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--target",
            str(site),
            "--upgrade",
            str(wheel),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            print(f"not installed: {wheel.name}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    return site


def _has_gpu(environment: dict[str, str]) -> bool:
    # In a child, because the parent must not hold memory on the device that the parts measure.
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
