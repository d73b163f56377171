"""Random configs through `or1 train --dry-run`: none ends in a traceback, and each that is accepted can run a step.

OR1_FUZZ_SEED repeats one seed, OR1_FUZZ_CONFIGS sets how many configs each seed makes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from or1.cli import main
from or1.config import Config
from or1.config.load import load_config
from or1.config.peers import settings
from or1.core.errors import ConfigError

SEEDS = [int(os.environ["OR1_FUZZ_SEED"])] if "OR1_FUZZ_SEED" in os.environ else range(6)
CONFIGS = int(os.environ.get("OR1_FUZZ_CONFIGS", "50"))
REFUSALS = (2, 65, 70, 75)
LONGEST_S = 120
# What a step may cost here; a larger valid value is tried in the dry run, and lowered for the step.
TINY = {
    "steps": 1,
    "prompts_per_step": 2,
    "minibatch_prompts": 2,
    "group_size": 3,
    "reuse": 2,
    "max_response_tokens": 6,
}
BROKEN = [
    -1,
    0,
    -0.5,
    1e308,
    -1e308,
    5e-324,
    10**30,
    2**63,
    2**31,
    True,
    "",
    " ",
    "x",
    "\0",
    "a\udc80",
    "x" * 300,
    "../" * 2000,
    "\u00b2",
    "0",
    "1e3",
    [],
    [1],
    [[1]],
    {},
    {"a": 1},
    [{"a": 1}],
    "auto",
    "none",
    None,
    "nan",
    "/proc/1/mem",
    "/proc",
    ".",
    "no/such",
    "https://x",
    "\x1b[2J",
    1.5,
    3,
    "examples",
]
ODD_FILES: list[Callable[[bytes, random.Random], bytes]] = [
    lambda text, rng: text[: rng.randrange(len(text))],
    lambda text, rng: text + text,
    lambda text, rng: b"\xef\xbb\xbf" + text,
    lambda text, rng: text.replace(b"\n", b"\r\n"),
    lambda text, rng: bytes(rng.randrange(256) for _ in range(200)),
    lambda text, rng: text + b"\nx = " + b"[" * 5000 + b"]" * 5000,
    lambda text, rng: text + b"\nx = " + b"9" * 5000,
    lambda text, rng: text.replace(b"=", b"==", 1),
    lambda text, rng: _flipped(text, rng),
    lambda text, rng: b"",
    lambda text, rng: b"[" * 3 + b"a" + b"]" * 3,
    lambda text, rng: text + b"\n[a" + b".a" * 3000 + b"]\n",
]


def _flipped(text: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(text))
    return text[:place] + bytes([text[place] ^ 1 << rng.randrange(8)]) + text[place + 1 :]


def base(folder: Path, adder: Path, number: int) -> dict[str, Any]:
    """Return a run of one tiny step."""
    return {
        "run_dir": str(folder / f"run-{number}"),
        "model": {"path": str(adder), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(folder / "train.jsonl")], "max_prompt_tokens": 32},
        "rollout": {"engine": "hf"},
        "reward": {"workers": 1},
        "log": {"tensorboard": False},
        "optim": {"max_tokens_per_rank": 256},
        "eval": {"sets": [{"name": "held", "path": str(folder / "held.jsonl"), "temperature": 0.0}]},
        "stage": [{"steps": 1, "max_response_tokens": 6, "prompts_per_step": 2, "group_size": 2}],
    }


def schema_of(path: str) -> dict[str, Any]:
    """Return the JSON schema of one setting."""
    whole = Config.model_json_schema()
    node: Any = whole
    for part in path.split("."):
        while "$ref" in node:
            node = whole["$defs"][node["$ref"].rpartition("/")[2]]
        node = node["items"] if part.isdecimal() else node["properties"][part]
    return node


def valid(schema: dict[str, Any], rng: random.Random) -> Any:
    """Return a value that the schema allows, often at a bound."""
    if "anyOf" in schema:
        return valid(rng.choice(schema["anyOf"]), rng)
    if "enum" in schema:
        return rng.choice(schema["enum"])
    match schema.get("type"):
        case "boolean":
            return rng.random() < 0.5
        case "integer" | "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
            high = schema.get("maximum", schema.get("exclusiveMaximum", 1000))
            choices = [
                low,
                high,
                low + 1,
                min(high, low + rng.randrange(1, 20)),
                rng.uniform(low, min(high, 2.0)),
                (low + high) / 2,
                schema.get("default") or low,
            ]
            value = rng.choice(choices)
            return int(value) if schema["type"] == "integer" else float(value)
        case "array" if "prefixItems" in schema:
            return [valid(each, rng) for each in schema["prefixItems"]]
        case "array":
            return [valid(schema["items"], rng) for _ in range(rng.randrange(3))] if "type" in schema["items"] else []
        case "null":
            return None
    return rng.choice(["held", "auto", "cpu", "examples/tiny-adder", "math", "code", "x", "http://localhost:1/v1"])


def mutated(config: dict[str, Any], paths: list[str], rng: random.Random) -> list[str]:
    """Change some settings, in the config or as the overrides that are returned."""
    overrides = []
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 5])):
        path = rng.choice(paths)
        value = valid(schema_of(path), rng) if rng.random() < 0.75 else rng.choice(BROKEN)
        if rng.random() < 0.1:
            path = rng.choice(
                [
                    path.upper(),
                    path + ".x",
                    path.partition(".")[2] or "y",
                    path.replace("0", "7"),
                    "..",
                    "stage.\u00b2.steps",
                    path[:-1],
                ]
            )
            overrides.append(f"{path}={value}")
        elif rng.random() < 0.3:
            overrides.append(f"{path}={json.dumps(value) if not isinstance(value, str) else value}")
        else:
            _put(config, path, value)
    return overrides


def _put(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node: Any = config
    for part in parents:
        key: Any = int(part) if part.isdecimal() else part
        if isinstance(node, list):
            if not node:
                node.append({})
            node = node[key]
        elif isinstance(node, dict):
            node = node.setdefault(part, {} if part != "mix" else [])
        else:
            return
    if isinstance(node, list) and last.isdecimal():
        node[:1] = [value]
    elif isinstance(node, dict):
        node[last] = value


def toml(table: dict[str, Any]) -> str:
    """Return a config as TOML, without the values that TOML cannot write."""
    return "".join(f"{name} = {_toml(value)}\n" for name, value in table.items() if value is not None)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(each) for each in value if each is not None) + "]"
    return json.dumps(value)


def called(arguments: list[str]) -> tuple[int, str]:
    """Exit code and output of a command; a traceback is code 1."""
    shown = io.StringIO()

    def too_long(*_: object) -> None:
        raise TimeoutError(f"takes more than {LONGEST_S} s")

    former = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LONGEST_S)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            code = main(arguments)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:  # noqa: BLE001 - any is what this test looks for
        code = 1
        shown.write(traceback.format_exc())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        _undo_deterministic()
    return code, shown.getvalue()


def _undo_deterministic() -> None:
    import torch

    torch.use_deterministic_algorithms(False)


def lowered(config: Config) -> Iterator[str]:
    """Return overrides that make a step of an accepted config tiny."""
    for i, stage in enumerate(config.stage):
        for name, limit in TINY.items():
            if (getattr(stage, name) or 0) > limit:
                yield f"stage.{i}.{name}={limit}"
    for i, each in enumerate(config.eval.sets):
        yield from (f"eval.sets.{i}.samples=2",) if each.samples > 2 else ()
    if (config.eval.max_response_tokens or 0) > 6:
        yield "eval.max_response_tokens=6"
    if config.reward.overlong_buffer > 6:
        yield "reward.overlong_buffer=6"
    if config.loss.refill_rounds > 1:
        yield "loss.refill_rounds=1"
    if config.reward.workers > 2:
        yield "reward.workers=2"


def tried(folder: Path, adder: Path, number: int, rng: random.Random) -> tuple[str, str]:
    """Run one random config; return the outcome, and the report of a failure."""
    config = base(folder, adder, number)
    overrides = mutated(config, list(settings(Config)), rng)
    text = toml(config).encode("utf-8", errors="surrogatepass")
    if rng.random() < 0.12:
        text = rng.choice(ODD_FILES)(text, rng)
    path = folder / f"config-{number}.toml"
    path.write_bytes(text)
    command = ["train", str(path), *(part for each in overrides for part in ("--set", each))]
    code, said = called([*command, "--dry-run"])
    told = f"config {number}: {command}\n{text.decode(errors='replace')[:3000]}\n{said[-3000:]}"
    if code not in (0, *REFUSALS) or "Traceback" in said:
        return "traceback", told
    if code:
        return "refused", "" if said.strip() else f"silent refusal: {told}"
    if "not here: " in said:
        return "not here", ""
    try:
        accepted = load_config(path, overrides)
    except ConfigError as error:
        return "accepted that cannot run", f"{told}\n{error}"
    if not accepted.run_path.resolve().is_relative_to(folder.resolve()):
        return "elsewhere", ""  # A test writes nowhere but in its own folder.
    smaller = [part for each in lowered(accepted) for part in ("--set", each)]
    code, said = called([*command, *smaller])
    if code:
        kind = "traceback in the step" if code not in REFUSALS else "accepted that cannot run"
        return kind, f"{told}\nthe step, with {smaller}: exit {code}\n{said[-3000:]}"
    return "ran", ""


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_configs_are_refused_in_words_or_run(
    seed: int, adder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for name, rows in (("train", 6), ("held", 2)):
        lines = (adder / ("train.jsonl" if name == "train" else "heldout.jsonl")).read_text().splitlines()[:rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    failures = []
    for number in range(CONFIGS):
        kind, told = tried(tmp_path, adder, number, rng)
        counts[kind] += 1
        if told:
            failures.append(f"--- {kind}\n{told}")
    print(f"seed {seed}: {dict(counts)}")
    assert not failures, f"OR1_FUZZ_SEED={seed}\n" + "\n".join(failures)
