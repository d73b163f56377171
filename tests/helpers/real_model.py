"""A few steps of SmolLM2-135M-Instruct on additions: the config, the problems and their reward."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

NUMBER = re.compile(r"\d+")
STEPS = 3

CONFIG = """
run_dir = "{run_dir}"
seed = 1

[model]
path = "{model}"
dtype = "bfloat16"
device = "cpu"

[data]
train = "{data}"
max_prompt_tokens = 64

[reward]
kind = "{reward}:reward"
workers = 1

[optim]
lr = 1e-5
warmup_steps = 0
max_tokens_per_rank = 1024

[checkpoint]
every_steps = 1
keep = 2

[log]
tensorboard = false

[eval]
every_steps = {steps}
max_response_tokens = 12

[filter]
samples = 2
max_response_tokens = 8

[[eval.sets]]
name = "greedy"
path = "{data}"
temperature = 0.0
limit = 8

[[stage]]
steps = {steps}
max_response_tokens = 8
prompts_per_step = 4
group_size = 4
"""


def reward(completions: list[str], answer: list[str], **columns: object) -> list[float]:
    """Return 1.0 for a response whose last number is the answer, and up to 0.5 for a short number.

    The second part makes rewards differ within most groups, so that every step trains.
    """
    found = []
    for text, right in zip(completions, answer, strict=True):
        numbers = NUMBER.findall(text)
        found.append(1.0 if numbers[-1:] == [right] else 0.5 / (1 + len(text)))
    return found


def rows() -> list[dict[str, str]]:
    """Return sixteen problems."""
    pairs = [(11 + 5 * i, 13 + 4 * i) for i in range(16)]
    return [{"question": f"What is {a} + {b}? Reply with the number only.", "answer": str(a + b)} for a, b in pairs]


def write_config(folder: Path, model: Path, name: str = "run", steps: int = STEPS) -> Path:
    """Write sixteen problems and a config below `folder`, and return the config's path. The run is `folder`/`name`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "additions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    config = folder / f"{name}.toml"
    text = CONFIG.format(run_dir=folder / name, model=model, data=data, reward=Path(__file__), steps=steps)
    config.write_text(text, encoding="utf-8")
    return config


def records(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl without times, memory and rates, which no two runs share."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    varying = ("time/", "perf/", "memory/")
    return [{k: v for k, v in json.loads(line).items() if k != "time" and not k.startswith(varying)} for line in lines]
