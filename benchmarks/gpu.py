"""All GPU checks in one command, each part a process of its own with a time limit, one JSON file a part.

    python -m benchmarks.gpu OUT_DIR [--part NAME ...] [--wheels DIR] [--rehearse]

OUT_DIR/NAME.json is rewritten after every row, so a part that is stopped leaves what it has; summary.json says how
each part ended. Exit code 0: every part passed. --rehearse runs everything scaled down on a CPU.
"""

import argparse
import importlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A part stops itself after the first limit and is killed at the second; both well under 8 minutes.
SOFT_LIMIT_S, HARD_LIMIT_S = 380, 440

# Parts whose Triton kernels run under the interpreter in a rehearsal; it must be set before triton is imported.
_INTERPRETED = {"kernels"}
# name -> (module, function). The function takes a Context; see there. Add a part with one line.
PARTS: dict[str, tuple[str, str]] = {
    "kernels": ("benchmarks.gpu_kernels", "run"),
    "rows": ("benchmarks.gpu_rows", "run"),
    "head-7b": ("benchmarks.gpu_head", "run_7b"),
    "head-1.5b": ("benchmarks.gpu_head", "run_1_5b"),
    "head-32b": ("benchmarks.gpu_head", "run_32b"),
    "step-1.5b": ("benchmarks.gpu_step", "run_1_5b"),
    "step-7b": ("benchmarks.gpu_step", "run_7b"),
    "longest-1.5b": ("benchmarks.gpu_step", "run_longest_1_5b"),
    "longest-7b": ("benchmarks.gpu_step", "run_longest_7b"),
    "train": ("benchmarks.gpu_train", "run"),
}


@dataclass
class Context:
    """What a part gets: where to write, whether it rehearses on a CPU, and when to stop starting new work.

    Call add(row) for each finished measurement or check; a row with "ok" False fails the part, one with "skipped" is
    listed as such. Everything is on disk when add returns.
    """

    name: str
    out: Path
    rehearse: bool
    deadline: float
    rows: list[dict]

    @property
    def device(self):
        """The torch device of this run."""
        import torch

        return torch.device("cpu" if self.rehearse else "cuda")

    def late(self) -> bool:
        """Whether the part's time is up; then it should leave the rest out with skip()."""
        return time.monotonic() > self.deadline

    def add(self, row: dict) -> None:
        """Keep a row, on disk and on the terminal."""
        from benchmarks.results import write_json

        self.rows.append(row)
        write_json(self.out / f"{self.name}.json", self.rows, part=self.name, rehearsal=self.rehearse)
        words = (
            f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
            for k, v in row.items()
            if not isinstance(v, (list, dict))
        )
        print("  " + " ".join(words), flush=True)

    def check(self, what: str, ok: bool, **numbers: object) -> None:
        """A row that must hold."""
        self.add({"check": what, "ok": bool(ok), **numbers})

    def skip(self, what: str, why: str) -> None:
        """A row that says what was not run, once for each reason."""
        row = {"skipped": what, "why": why}
        if row not in self.rows:
            self.add(row)


def main(argv: list[str] | None = None) -> int:
    """Parse, run the parts, summarise; returns the exit code."""
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
    """Run one part in a child; never raises for what the child does."""
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

    from benchmarks.results import plot_head, show_head, show_plain, write_json

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
    """The children's environment: the repository and the given wheels importable, threads that sleep."""
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
    """Put every wheel of the folder into `site`, each by itself, so that one that does not fit costs only itself."""
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
    # In a child: the parent must not hold memory on the device that the parts measure.
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
