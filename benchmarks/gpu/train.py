"""GPU part: `or1 train` end to end on the device, the quickstart with fewer steps."""

import json
import subprocess
import sys
import time

from benchmarks.gpu.context import Context
from benchmarks.lib.paths import ROOT

_LIMIT_S = 300


def run(context: Context) -> None:
    """Train, then check the run directory: recorded steps, an accuracy before and after, a checkpoint."""
    run_dir = context.out / "train-run"
    steps = (1, 1) if context.rehearse else (8, 8)
    settings = {
        "run_dir": run_dir,
        "model.device": context.device.type,
        "seed": 1,
        "eval.every_steps": 8,
        "checkpoint.every_steps": 8,
    }
    config = _config(context.out / "train.toml", steps, small=context.rehearse)
    command = [sys.executable, "-m", "or1", "train", str(config), "--fresh"]
    command += [x for key, value in settings.items() for x in ("--set", f"{key}={value}")]
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_LIMIT_S)
    except subprocess.TimeoutExpired:
        context.check(f"or1 train ends within {_LIMIT_S} s", False)
        return
    seconds = time.monotonic() - began
    context.check(
        "or1 train exits with 0",
        done.returncode == 0,
        seconds=seconds,
        code=done.returncode,
        stderr=done.stderr[-2000:] if done.returncode else "",
    )
    if done.returncode:
        return
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    trained = [r for r in records if "policy/entropy" in r]
    context.check("every step is recorded", len(trained) >= sum(steps), steps=len(trained))
    accuracy = [r["eval/greedy/avg@1"] for r in records if "eval/greedy/avg@1" in r]
    context.check("held-out accuracy is measured", len(accuracy) >= 2, first=accuracy[0], last=accuracy[-1])
    for r in trained:
        context.add({k: v for k, v in r.items() if isinstance(v, (int, float))})
    context.check("a checkpoint is left", any((run_dir / "checkpoints").iterdir()))


def _config(path, steps, small):
    """Write the quickstart config with `steps` steps in its two stages, and return its path."""
    text = (ROOT / "examples" / "quickstart.toml").read_text(encoding="utf-8")
    head, *stages = text.split("[[stage]]\n")
    if len(stages) != len(steps):
        raise ValueError(f"examples/quickstart.toml has {len(stages)} stages; this part expects {len(steps)}")
    parts = [head]
    for count, stage in zip(steps, stages, strict=True):
        lines = [f"steps = {count}" if x.startswith("steps") else x for x in stage.splitlines()]
        if small:
            lines = ["prompts_per_step = 4" if x.startswith("prompts_per_step") else x for x in lines]
        parts.append("\n".join(lines) + "\n")
    path.write_text("[[stage]]\n".join(parts), encoding="utf-8")
    return path
