"""Real logits for the head: `python -m benchmarks.real OUT --model DIR [--after DIR]` measures and writes a page.

--model is a Hugging Face folder, and --after the same model after RL. OUT gets the inputs (before.safetensors,
after.safetensors; benchmarks.real.make), a JSON file a part, README.md and real.svg. Every part is a process of its own
with one thread. `--parts` selects parts, and the page uses the files that are there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.lib.paths import ROOT

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def make_inputs(options: argparse.Namespace) -> None:
    """Make the files of inputs that are absent."""
    for name, model in (("before", options.model), ("after", options.after)):
        path = options.out / f"{name}.safetensors"
        if model is None or path.exists():
            continue
        command = [str(model), str(path), "--name", options.name or options.model.resolve().name]
        for option, files in (("--text", options.text), ("--questions", [options.questions])):
            command += [option, *map(str, files)] if files and files[0] else []
        _run("benchmarks.real.make", command, {})


def _run(module: str, arguments: list[str], environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", module, *arguments]
    subprocess.run(command, check=True, env=os.environ | ONE_THREAD | environment)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, each in a process, write the page, and return the exit code."""
    from benchmarks.real.parts import PARTS

    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder outside the repository for inputs and results")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder, before RL")
    parser.add_argument("--after", type=Path, metavar="DIR", help="the same model after RL")
    parser.add_argument("--name", help="name of the model in tables (default: the folder's)")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="see benchmarks.real.make")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="see benchmarks.real.make")
    parser.add_argument("--parts", help=f"comma-separated, of {', '.join(PARTS)} (default: all; '': the page alone)")
    parser.add_argument("--load", default="", metavar="TEXT", help="what else the machine did meanwhile, for the page")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    parts = list(PARTS) if options.parts is None else [part for part in options.parts.split(",") if part]
    if unknown := sorted(set(parts) - set(PARTS)):
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.out.resolve().is_relative_to(ROOT):
        parser.error(
            f"{options.out} is inside the repository; the inputs are derived from a model, so name a folder outside"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    if options.in_process:
        for part in parts:
            print(PARTS[part](options.out, options.model.resolve(), options.load))
        return 0
    make_inputs(options)
    for part in parts:
        same = [str(options.out), "--model", str(options.model), "--load", options.load]
        environment = {"TRITON_INTERPRET": "1"} if part == "triton" else {}
        _run("benchmarks.real", [*same, "--parts", part, "--in-process"], environment)
    from benchmarks.real.page import write_page

    print(write_page(options.out, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
