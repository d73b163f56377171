"""Random damage to every kind of file of a finished run, then every command that reads it: told or right, never silent.

OR1_FUZZ_SEED repeats a run of the fuzz, OR1_FUZZ_COUNT sets how many corruptions there are, and OR1_FUZZ_ONLY
names some of them ("3,17").
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from or1.cli import main
from or1.run.metrics_log import read_metrics
from tests.helpers.small_run import ROOT, arguments

SEED = int(os.environ.get("OR1_FUZZ_SEED", "16"))
COUNT = int(os.environ.get("OR1_FUZZ_COUNT", "150"))
ONLY = os.environ.get("OR1_FUZZ_ONLY")
NUMBERS = range(COUNT) if ONLY is None else [int(number) for number in ONLY.split(",")]
HELDOUT = f'eval.sets=[{{name="held", path="{ROOT}/examples/tiny-adder/heldout.jsonl", samples=1, limit=4}}]'
TINY = {"stage__0__steps": 2, "stage__1__steps": 1, "eval__every_steps": 50}
LONGER = TINY | {"stage__1__steps": 2}
KINDS = {
    "manifest": "checkpoints/step_*/manifest.json",
    "shard": "checkpoints/step_*/*.safetensors",
    "metrics": "metrics.jsonl",
    "rollouts": "rollouts/*.parquet",
    "record": "config.resolved.json",
    "marks": ".marks.json",
    "sums": ".metrics.sums",
    "lock": ".lock",
    "weights": "weights/step_*/*",
    "log": "log.txt",
    "report": "report.html",
    "rows": "row_tokens.json",
    "transcripts": "eval/*/transcripts/*.parquet",
    "parts": "eval/*/parts/*/settings.json",
    "results": "eval/*/*.json",
    "step": "checkpoints/step_*",
    "folder": "*/",
}
# The kinds that a resume depends on come more often.
WEIGHTS = {"manifest": 5, "shard": 4, "metrics": 4, "rollouts": 4, "weights": 3, "step": 2}
CODES = {0, 2, 65, 70, 75}
# Clocks, and evaluations: the last step of a run has one, and is not the last where the run goes on.
SKIPPED = ("time", "perf", "eval")
REMEDIES = ("--fresh", "put ", "remove", "restore", "choose", "name ", "give", "replay a step", "correct", "repeat")


@dataclass
class Said:
    """What a command did: its exit code, and what it printed on both streams."""

    code: int
    text: str


@dataclass
class Truth:
    """What the undamaged run gives."""

    run_dir: Path
    manifests: dict[str, Any] = field(default_factory=dict)
    shards: dict[str, bytes] = field(default_factory=dict)
    weights: bytes = b""
    evaluation: Any = None
    replayed: dict[str, str] = field(default_factory=dict)
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    longer: dict[int, dict[str, Any]] = field(default_factory=dict)
    last: dict[str, bytes] = field(default_factory=dict)


class Shell:
    """Runs `or1` in this process; keeps what is printed."""

    def __init__(self, capfd: pytest.CaptureFixture[str]):
        self._capfd = capfd

    def __call__(self, *command: str) -> Said:
        self._capfd.readouterr()
        try:
            code = main(list(command))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except Exception:  # noqa: BLE001 - what it looks for
            code = 1
            print(traceback.format_exc())
        out, err = self._capfd.readouterr()
        return Said(code, out + err)


def plain(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Return the records of a run without the values that differ each time."""
    records = read_metrics(run_dir / "metrics.jsonl")
    return {r["step"]: {k: v for k, v in r.items() if not k.startswith(SKIPPED)} for r in records}


def replayed(text: str) -> dict[str, str]:
    """Return the third column of the table that `or1 replay` prints."""
    rows = (line.split() for line in text.splitlines())
    return {row[0]: row[2] for row in rows if len(row) > 3 and "/" in row[0]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a finished and evaluated run, ready to be damaged."""
    run_dir = tmp_path_factory.mktemp("fuzz") / "run"
    assert main([*arguments(run_dir, **TINY), "--set", HELDOUT]) == 0
    assert main(["eval", str(run_dir)]) == 0
    (run_dir / "row_tokens.json").write_text('{"max_tokens": 96}\n')
    return run_dir


def truth_of(made: Path, shell: Shell, work: Path) -> Truth:
    truth = Truth(made, weights=(made / "weights/step_3/model.safetensors").read_bytes(), records=plain(made))
    for path in made.glob("checkpoints/*/*"):
        name = path.relative_to(made).as_posix()
        if path.suffix == ".json":
            truth.manifests[name] = json.loads(path.read_text())
        else:
            truth.shards[name] = path.read_bytes()
    truth.evaluation = json.loads((made / "eval/step_3/eval.json").read_text())["sets"]
    shutil.copytree(made, work)
    said = shell("replay", str(work), "3")
    assert said.code == 0, said.text
    truth.replayed = replayed(said.text)
    assert len(truth.replayed) > 5 and "differs" not in said.text
    said = shell(*arguments(work, **LONGER), "--set", HELDOUT)
    assert said.code == 0, said.text
    truth.longer, truth.last = plain(work), shards(work, 4)
    assert sorted(truth.longer) == [0, 1, 2, 3, 4]
    shutil.rmtree(work)
    return truth


def shards(run_dir: Path, step: int) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (run_dir / "checkpoints" / f"step_{step}").glob("*.safetensors")}


def damage(run_dir: Path, dice: random.Random) -> str:
    """Damage one thing, or swap two; returns what was done."""
    kind = dice.choices(list(KINDS), [WEIGHTS.get(kind, 1) for kind in KINDS])[0]
    found = sorted(run_dir.glob(KINDS[kind]))
    path = dice.choice(found)
    name = path.relative_to(run_dir).as_posix()
    others = [other for other in found if (other != path and other.name == path.name) or kind in ("rollouts", "step")]
    others = [other for other in others if other != path]
    ways = ["delete", "rename"] if path.is_dir() else ["flip", "flip", "cut", "cut", "delete", "rename"]
    way = dice.choice([*ways, "swap", "copy"] if others else ways)
    if way == "flip" and path.stat().st_size:
        data = bytearray(path.read_bytes())
        places = [dice.randrange(8 * len(data)) for _ in range(dice.choice([1, 1, 3]))]
        for place in places:
            data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        return f"flip {name} at bits {places}"
    if way == "cut":
        size = dice.choice([0, dice.randrange(path.stat().st_size + 1)])
        os.truncate(path, size)
        return f"cut {name} to {size} bytes"
    if way == "rename":
        path.rename(path.with_name(dice.choice([f"{path.name}.bak", f"x{path.name}"])))
        return f"rename {name}"
    if way in ("swap", "copy"):
        other = dice.choice(others)
        aside = path.with_name(".aside")
        path.rename(aside)
        (shutil.copytree if other.is_dir() else shutil.copy2)(other, path)
        if way == "swap":
            shutil.rmtree(other) if other.is_dir() else other.unlink()
            aside.rename(other)
        else:
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
        return f"{way} {name} and {other.relative_to(run_dir).as_posix()}"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return f"delete {name}"


def intact(run_dir: Path, truth: Truth) -> bool:
    """Return True if all checkpoints are unchanged; older ones may be pruned."""
    newest = max(truth.manifests)
    for name, manifest in truth.manifests.items():
        if name != newest and not (run_dir / name).parent.exists():
            continue
        try:
            if json.loads((run_dir / name).read_text(errors="replace")) != manifest:
                return False
        except (OSError, ValueError):
            return False
    there = {name: data for name, data in truth.shards.items() if (run_dir / name).parent.exists()}
    return all((run_dir / name).is_file() and (run_dir / name).read_bytes() == data for name, data in there.items())


def check_verify(run_dir: Path, said: Said, truth: Truth) -> str:
    return "" if said.code or intact(run_dir, truth) else "SILENT: verify passes a checkpoint that is another one"


def check_report(run_dir: Path, said: Said, truth: Truth) -> str:
    if said.code or plain(run_dir) == truth.records:
        return ""
    page = (run_dir / "report.html").read_text()
    return "" if "metrics.jsonl" in page.replace("metrics.jsonl</code>", "") else "SILENT: a report of changed metrics"


def check_replay(run_dir: Path, said: Said, truth: Truth) -> str:
    if said.code or replayed(said.text) == truth.replayed:
        return ""
    return "SILENT: a replay of other data"


def check_export(run_dir: Path, said: Said, truth: Truth) -> str:
    if said.code:
        return ""
    same = (run_dir.parent / "out/model.safetensors").read_bytes() == truth.weights
    return "" if same or "has lost" in said.text else "SILENT: other weights are exported"


def check_eval(run_dir: Path, said: Said, truth: Truth) -> str:
    if said.code:
        return ""
    results = {path: json.loads(path.read_text())["sets"] for path in run_dir.glob("eval/step_*/eval.json")}
    newest = max(results, key=lambda path: path.stat().st_mtime)
    return "" if results[newest] == truth.evaluation or "has lost" in said.text else "SILENT: another evaluation"


def check_train(run_dir: Path, said: Said, truth: Truth, before: dict[int, Any]) -> str:
    after = plain(run_dir)
    if said.code:
        return "" if before.keys() <= after.keys() else "LOST: metrics of a run that was refused"
    if shards(run_dir, 4) != truth.last:
        return "SILENT: other weights"
    wrong = sorted(step for step in truth.longer if after.get(step) != truth.longer[step])
    if wrong and "metrics.jsonl" not in said.text:
        return f"LOST: metrics of steps {wrong} are gone or wrong, and nothing is said"
    lost = sorted(before.keys() - after.keys())
    return f"LOST: the lines of steps {lost}" if lost else ""


def trial(run_dir: Path, shell: Shell, truth: Truth) -> list[str]:
    """Run every command on a damaged run, and return the failures."""
    problems = []
    before = plain(run_dir) if (run_dir / "metrics.jsonl").is_file() else {}
    commands: list[tuple[list[str], Callable[[Path, Said, Truth], str]]] = [
        (["ckpt", "verify", str(run_dir)], check_verify),
        (["ckpt", "ls", str(run_dir)], lambda *_: ""),
        (["report", str(run_dir)], check_report),
        (["replay", str(run_dir), "3"], check_replay),
        (["export", str(run_dir), "--out", str(run_dir.parent / "out")], check_export),
        (["eval", str(run_dir)], check_eval),
        ([*arguments(run_dir, **LONGER), "--set", HELDOUT], lambda *found: check_train(*found, before)),
    ]
    for command, check in commands:
        said = shell(*command)
        verb = " ".join(command[:2]) if command[0] == "ckpt" else command[0]
        if "Traceback" in said.text or said.code not in CODES:
            problems.append(f"{verb}: TRACEBACK, exit {said.code}: {said.text[-1500:]}")
        elif said.code and not any(word in said.text for word in REMEDIES):
            problems.append(f"{verb}: no remedy, exit {said.code}: {said.text[-500:]}")
        elif problem := check(run_dir, said, truth):
            problems.append(f"{verb}: {problem}: {said.text[-800:]}")
    return problems


@pytest.mark.nightly
@pytest.mark.timeout(3 * 3600)
def test_damage_is_told_or_does_no_harm(made: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shell, counts, failures = Shell(capfd), Counter(), []
    truth = truth_of(made, shell, tmp_path / "work" / "run")
    began = time.monotonic()
    for number in NUMBERS:
        work = tmp_path / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(made, work / "run", copy_function=shutil.copy2)
        what = damage(work / "run", random.Random(SEED * 100_003 + number))
        problems = trial(work / "run", shell, truth)
        counts.update(problem.split(":")[1].strip().split(",")[0].split(" ")[0] for problem in problems)
        failures += [f"#{number} {what}: {problem}" for problem in problems]
        with capfd.disabled(), contextlib.suppress(OSError):
            said = "\n  ".join(problems)
            print(f"seed {SEED} #{number} {what}" + (f"\n  {said}" if said else ""), flush=True)
    with capfd.disabled():
        took = time.monotonic() - began
        print(f"seed {SEED}: {len(NUMBERS)} corruptions in {took:.0f} s, failures: {dict(counts) or 0}")
    assert not failures, f"seed {SEED}\n" + "\n".join(failures)
