"""Parts of benchmarks.real. Each reads OUT/before.safetensors and OUT/after.safetensors, and writes one JSON file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.lib.results import write_json
from benchmarks.real import heads, inputs, row_eps
from benchmarks.real.make import rollouts_of
from benchmarks.step.suite import model_cases, run_chains

# One section a policy: errors depend on how certain the rows are, and these two are the extremes.
SECTIONS: Mapping[str, str] = {"before": "text", "after": "addition"}
STEP_RESPONSES = {"addition": 8, "questions": 4}
# The interpreter takes seconds a row.
_TRITON_ROWS = 4
_ROWS = 48
_EPS_ROWS = {"addition": 768, "questions": 384}
_STEP_S = 3600.0


def given(out: Path) -> dict[str, inputs.Inputs]:
    """Return the inputs by policy, "before" and, where there is one, "after"."""
    paths = {name: input_path(out, name) for name in SECTIONS}
    return {name: inputs.load(path) for name, path in paths.items() if path.exists()}


def input_path(out: Path, policy: str) -> Path:
    """Return the path of a policy's inputs."""
    return out / f"{policy}.safetensors"


def errors(out: Path, model: Path, load: str) -> Path:
    """Write the errors of or1's implementations and of its peers."""
    some = heads.variants()
    rows = [
        row for name, one in given(out).items() for row in heads.error_rows(name, one, [SECTIONS[name]], some, _ROWS)
    ]
    facts = {name: dict(one.facts) | {"tensors_sha256": one.sha256} for name, one in given(out).items()}
    return write_json(out / "errors.json", rows, load=load, skipped=heads.skipped(some), inputs=facts)


def triton(out: Path, model: Path, load: str) -> Path:
    """Write the errors of the Triton passes on a few rows. Needs TRITON_INTERPRET=1 on a CPU."""
    some = heads.variants(("triton",))[:1]
    rows = [
        row
        for name, one in given(out).items()
        for row in heads.error_rows(name, one, [SECTIONS[name]], some, _TRITON_ROWS)
    ]
    return write_json(out / "triton.json", rows, load=load)


def eps(out: Path, model: Path, load: str) -> Path:
    """Write what grad_row_eps leaves out of answers to additions and to --questions."""
    rows = [
        row
        for task in row_eps.TASKS
        for section, count in _EPS_ROWS.items()
        for name, one in given(out).items()
        if section in one.sections
        for row in row_eps.rows(name, one, section, count, task=task)
    ]
    return write_json(out / "eps.json", rows, load=load)


def step(out: Path, model: Path, load: str) -> Path:
    """Write time and memory of the whole step beside TRL's trainer and plain transformers."""
    one = given(out)["before"]
    batches = {section: count for section, count in STEP_RESPONSES.items() if section in one.sections}
    cases = model_cases(str(model), str(rollouts_of(input_path(out, "before"))), batches)
    rows = run_chains([[case] for case in cases], out / "step.partial.json", _STEP_S, _STEP_S)
    (out / "step.partial.json").unlink()
    for row in rows:
        # The paths of this machine say nothing to a reader.
        row["case"] |= {"architecture": one.shape.name, "rollout": ""}
    return write_json(out / "step.json", rows, load=load)


def times(out: Path, model: Path, load: str) -> Path:
    """Write time and memory of the head beside its peers, on text, where every row is live."""
    some = [variant for variant in heads.variants() if variant.name != "or1 torch"]
    rows = heads.time_rows("before", given(out)["before"], ["text"], some)
    return write_json(out / "times.json", rows, load=load, skipped=heads.skipped(some))


PARTS: Mapping[str, Callable[[Path, Path, str], Path]] = {
    "errors": errors,
    "eps": eps,
    "step": step,
    "times": times,
    "triton": triton,
}
