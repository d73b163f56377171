"""A run of the quickstart small enough to be repeated many times."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "model.path": str(ROOT / "examples/tiny-adder"),
    # 400 problems: to encode the 6000 of the training file takes longer than the steps.
    "data.train": str(ROOT / "examples/tiny-adder/heldout.jsonl"),
    "eval.sets": "[]",
    "checkpoint.every_steps": 1,
    "checkpoint.keep": 100,
    "log.tensorboard": "false",
    "reward.workers": 1,
    "stage.0.prompts_per_step": 4,
    "stage.1.prompts_per_step": 4,
    "stage.0.group_size": 4,
    "stage.1.group_size": 4,
    "stage.0.steps": 4,
    "stage.1.steps": 2,
    "optim.max_tokens_per_rank": 96,
    "dist.timeout_s": 60,
    "dist.heartbeat_timeout_s": 5,
}


def arguments(run_dir: Path, *flags: str, **settings: object) -> list[str]:
    """Return the `or1` arguments of a small run; settings have `__` for the dot."""
    merged = SMALL | {"run_dir": run_dir} | {key.replace("__", "."): value for key, value in settings.items()}
    overrides = [part for key, value in merged.items() for part in ("--set", f"{key}={value}")]
    return ["train", str(ROOT / "examples/quickstart.toml"), *overrides, *flags]


def lines(run_dir: Path) -> list[dict]:
    """Return the records of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
