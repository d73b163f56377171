"""The page of results: `python -m benchmarks.real.page OUT [DIR]` keeps JSON files of benchmarks.real and writes one.

DIR is benchmarks/results/real unless given.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.paths import ROOT
from benchmarks.real.heads import is_or1
from benchmarks.real.picture import draw

KEPT = ("errors", "times", "eps", "step", "triton")
RESULTS = ROOT / "benchmarks" / "results" / "real"
OURS = "or1 native"
Row = Mapping[str, Any]
File = Mapping[str, Any]


def write_page(source: Path, target: Path) -> Path:
    """Copy the JSON files of `source` to `target`, write README.md and real.svg there, and return the page's path."""
    target.mkdir(parents=True, exist_ok=True)
    files = {}
    for name in KEPT:
        path = source / f"{name}.json"
        if path.exists():
            if source.resolve() != target.resolve():
                shutil.copyfile(path, target / path.name)
            files[name] = json.loads(path.read_text(encoding="utf-8"))
    if not files:
        raise FileNotFoundError(f"{source} has none of {', '.join(f'{name}.json' for name in KEPT)}")
    draw(target / "real.svg", files)
    page = target / "README.md"
    page.write_text(text(files), encoding="utf-8")
    return page


def text(files: Mapping[str, File]) -> str:
    """Return the page for the files that are there."""
    parts = [_HEAD, _machine(files), "![Time, rows left out, bound and error](real.svg)"]
    if "errors" in files:
        parts += [_inputs(files["errors"]), _errors(files["errors"], files.get("triton"))]
    if "times" in files:
        parts.append(_times(files["times"]))
    if "eps" in files:
        parts.append(_eps(files["eps"]))
    if "step" in files:
        parts.append(_step(files["step"]))
    return "\n\n".join([*parts, _AGAIN]) + "\n"


_HEAD = """# A real model's logits

Written by `python -m benchmarks.real`. The inputs are hidden states of a pretrained model, not random numbers: on text
("text") and on the model's own answers, sampled at temperature 1, to additions ("addition") and word problems
("questions"), before and after reinforcement learning. CPU seconds of one thread, which other processes disturb less
than the wall clock; the best round counts. No figure here is of a GPU."""

_AGAIN = """## Again

    python examples/smollm2/make.py
    or1 train examples/smollm2/addition.toml
    python -m benchmarks.real OUT --model examples/smollm2/model --after runs/smollm2-addition/weights/step_50 \\
        --text gsm8k_test.jsonl --questions gsm8k_train.jsonl
    python -m benchmarks.real.page OUT

OUT must be outside the repository. TRL, verl and Liger are compared where they are installed. For the head benchmark
on these inputs: `pytest benchmarks/head --bench-real OUT/before.safetensors`."""


def _machine(files: Mapping[str, File]) -> str:
    any_file = next(iter(files.values()))
    versions = {k: v for one in files.values() for k, v in one["versions"].items()}
    commits = sorted({one["commit"][:10] for one in files.values()})
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    load = any_file.get("load")
    return _said(
        f"Machine: {any_file['device']}, {any_file['threads']} thread. {packages}. Commit {', '.join(commits)}, "
        f"{any_file['time'][:10]}." + (f" Load: {load}." if load else "")
    )


def _inputs(errors: File) -> str:
    rows = []
    for policy, facts in errors["inputs"].items():
        for section, about in facts["sections"].items():
            reward = f"{about['reward']:.3f}" if "reward" in about else "-"
            nats = f"{about['nats']:.2f}" if "nats" in about else "-"
            rows.append((policy, section, about["source"], reward, nats, about["advantages"]))
    header = ("policy", "section", "source", "reward", "nats a token", "advantages")
    facts = next(iter(errors["inputs"].values()))
    return (
        f"## Inputs\n\n{facts['name']}: weight in {facts['weight_dtype']}, hidden states in {facts['dtype']}.\n\n"
        + table(header, rows)
    )


def _errors(errors: File, triton: File | None) -> str:
    rows = [*errors["rows"], *(triton["rows"] if triton else ())]
    ours = [row for row in rows if is_or1(row["variant"])]
    held = sum(row["three_way"] == "holds" for row in ours)
    lines = [
        (
            f"{row['policy']}, {row['section']}",
            row["dtype"],
            row["variant"],
            *(_small(row["error"][key]) for key in ("logp", "entropy", "dhidden", "dweight")),
            "yes" if row["three_way"] == "holds" else "no",
        )
        for row in rows
        if row["task"] == "policy"
    ]
    header = ("inputs", "dtype", "head", "log-prob", "entropy", "dhidden", "dweight", "within twice plain torch")
    beyond = sorted({row["variant"] for row in rows if row["three_way"] != "holds"})
    note = f" Beyond twice plain torch in some value: {', '.join(beyond)}." if beyond else ""
    few = " The Triton passes ran under the interpreter, on a few rows." if triton else ""
    count = max(row["rows"] for row in rows)
    return "## Error against fp64\n\n" + _said(
        f"Of {count} rows, spread evenly. Loss: the clipped policy loss with an entropy bonus. Log-prob and entropy: "
        "largest error in nats. Gradients: relative, in the Frobenius norm. "
        f"The rule (at most twice plain torch's error, plus two units of rounding) holds for or1 in {held} of "
        f"{len(ours)} comparisons, with and without the bonus and for cross entropy.{note}{few}{_bf16(rows)}",
        table(header, lines),
    )


def _bf16(rows: Sequence[Row]) -> str:
    """Return a sentence on log-probs in bf16: or1's logits are fp32 sums, and peers round them to bf16."""
    some = [row for row in rows if row["dtype"] == "bfloat16" and row["error"]["logp"] is not None]
    ours = [row["error"]["logp"] for row in some if row["variant"] == OURS]
    theirs = [row["error"]["logp"] for row in some if not is_or1(row["variant"])]
    if not ours or not theirs:
        return ""
    return (
        f" In bf16 the largest log-prob error of or1 is {max(ours):.1e} nats. Peers round the logits to bf16, and "
        f"theirs is {max(theirs):.1e}."
    )


def _times(times: File) -> str:
    rows = times["rows"]
    ours = {_where(row): row["cpu_s"] for row in rows if row["variant"] == OURS}
    lines = [
        (
            f"{row['section']}, {row['live_rows']} rows",
            row["dtype"],
            row["task"],
            row["variant"],
            f"{row['cpu_s']:.2f}",
            f"{row['to_gemms']:.2f}",
            f"{row['cpu_s'] / ours[_where(row)]:.2f}",
            f"{row['peak_extra_mib']:.0f}",
        )
        for row in rows
    ]
    header = ("inputs", "dtype", "loss", "head", "CPU s", "over bare GEMMs", "over or1", "peak MiB")
    peers = [row for row in rows if not is_or1(row["variant"])]
    slower = [_named(row, row["cpu_s"] / ours[_where(row)]) for row in peers if row["cpu_s"] < ours[_where(row)]]
    memory = {_where(row): row["peak_extra_mib"] for row in rows if row["variant"] == OURS}
    larger = [
        _named(row, row["peak_extra_mib"] / memory[_where(row)])
        for row in peers
        if row["peak_extra_mib"] < memory[_where(row)]
    ]
    count, rounds = len(peers), len(rows[0]["cpu_s_all"])
    said = (
        f"or1 is slower in {len(slower)} of {count}: {'; '.join(slower)}"
        if slower
        else f"or1 is fastest in all {count}"
    )
    said += f". It takes more memory in {len(larger)}: {'; '.join(larger)}." if larger else ", and takes least memory."
    skipped = "".join(f" Not compared: {name} ({why})." for name, why in times.get("skipped", {}).items())
    return "## Time and memory\n\n" + _said(
        f"Forward and backward of the head. Of comparisons with peers, {said} Peak memory is beside the inputs. "
        f"The best of {rounds} rounds; on a busy machine rounds differ by a fifth and more. "
        f'"policy" has an entropy bonus, "ce" is cross entropy.{skipped}',
        table(header, lines),
    )


def _named(row: Row, ratio: float) -> str:
    return f"{row['variant']} ({row['section']}, {row['dtype']}, {row['task']}: {ratio:.2f})"


def _eps(eps: File) -> str:
    lines = [
        (
            f"{row['policy']}, {row['section']}",
            "yes" if row["task"] == "policy" else "no",
            f"{row['eps']:g}",
            f"{row['rows_left_out']} of {row['rows']}",
            f"{row['elements_left_out'] / 1e6:.1f} M",
            f"{row['saved']:.0%}",
            _small(row["bound"]),
            _small(row["true"]),
            _small(row["dhidden"]),
            _small(row["dweight"]),
        )
        for row in eps["rows"]
    ]
    header = ("inputs", "bonus", "eps", "rows left out", "elements", "CPU time saved", "bound", "true")
    slack = ", ".join(
        f"{max(row['bound'] / row['true'] for row in some):.4f} times {what} an entropy bonus"
        for task, what in (("policy, no entropy", "without"), ("policy", "with"))
        if (some := [row for row in eps["rows"] if row["true"] and row["task"] == task])
    )
    return "## `grad_row_eps`\n\n" + _said(
        "Rows whose gradient is below eps skip the two backward GEMMs. Elements: logits without a gradient. "
        "Bound: `left_out`, which the head reports. True: the L1 norm of the left-out part of dloss/dlogits, by fp64. "
        "Both are parts of the whole gradient's L1 norm. The bound is at most this much of the "
        f"true norm: {slack or 'not measured'}. dhidden and dweight: relative error of the gradients "
        "in the Frobenius norm, rounding included. CPU time is against the "
        "same head without the option, best round; differences of 20 % are noise, and a negative number is a loss."
        + (f" {eps['note']}" if "note" in eps else ""),
        table((*header, "dhidden", "dweight"), lines),
    )


def _step(step: File) -> str:
    lines = []
    for row in step["rows"]:
        case, engines = row["case"], row["result"].get("engines", {})
        ours = engines.get("or1", {}).get("cpu_seconds")
        for label, one in engines.items():
            where = f"{case['section']}, {case['responses']} responses"
            if "error" in one:
                lines.append((where, label, one["error"], *[""] * 5))
                continue
            lines.append(
                (
                    where,
                    label,
                    f"{one['cpu_seconds']:.1f}",
                    f"{one['cpu_seconds'] / ours:.2f}" if ours else "-",
                    f"{one['peak_gib']:.2f}" if one["peak_gib"] is not None else "-",
                    f"{one['loss']:.7f}",
                    f"{one['entropy']:.6f}",
                    f"{one['grad_norm']:.6f}",
                )
            )
        if not engines:
            lines.append((case["section"], row["result"]["error"], *[""] * 6))
    header = ("rollout", "engine", "CPU s", "over or1", "peak GiB", "loss", "entropy", "gradient norm")
    return "## The whole step\n\n" + _said(
        "Forward, backward, clipping and AdamW of the whole model in fp32, on the same sampled responses and "
        "advantages: or1's update, TRL's `GRPOTrainer` (its `_compute_loss`), and plain transformers. Loss, entropy "
        "and norm are those of the first step. Peak memory is in addition to weights and moments."
        f"{_behind(step['rows'])}",
        table(header, lines),
    )


def _behind(rows: Sequence[Row]) -> str:
    """Return sentences on the rollouts where an engine of or1 takes more CPU time or memory than a peer."""
    said = []
    for row in rows:
        engines = {k: v for k, v in row["result"].get("engines", {}).items() if "error" not in v}
        for key, what in (("cpu_seconds", "is slower than"), ("peak_gib", "takes more memory than")):
            for label in filter(is_or1, engines):
                less = [peer for peer, v in engines.items() if not is_or1(peer) and v[key] < engines[label][key]]
                if less:
                    said.append(f' "{label}" {what} {", ".join(less)} on {row["case"]["section"]}.')
    return "".join(said) or " or1 takes least time and memory on every rollout, with and without shared prompts."


def _said(paragraph: str, below: str = "") -> str:
    """Return a paragraph in lines of 120 characters, and what is below it."""
    filled = textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False)
    return f"{filled}\n\n{below}" if below else filled


def _where(row: Row) -> tuple[str, ...]:
    return row["section"], row["dtype"], row["task"]


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if value else "0"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main(arguments: list[str] | None = None) -> int:
    """Write the page and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real.page", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="OUT", help="folder of python -m benchmarks.real")
    parser.add_argument("target", type=Path, nargs="?", default=RESULTS, metavar="DIR", help="default: results/real")
    options = parser.parse_args(arguments)
    print(write_page(options.source, options.target))
    return 0


if __name__ == "__main__":
    sys.exit(main())
