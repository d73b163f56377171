"""Consoles, configs and summaries for the tests of what a terminal shows."""

from __future__ import annotations

import io

from rich.console import Console

from or1.config import Config, StageConfig
from or1.report.records import EvalHistory, EvalPoint
from or1.report.summary import Summary

STAGES = (
    StageConfig(steps=2, max_response_tokens=96, prompts_per_step=16, group_size=8),
    StageConfig(steps=2, max_response_tokens=16384, prompts_per_step=16, group_size=8, minibatch_prompts=6),
)


def plain_console(encoding: str = "utf-8") -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), width=80, force_terminal=False)


def output(console: Console) -> str:
    if isinstance(console.file, io.StringIO):
        return console.file.getvalue()
    console.file.seek(0)
    return console.file.read()


def make_config() -> Config:
    return Config.model_validate(
        {
            "run_dir": "runs/[red]demo",
            "model": {"path": "models/tiny"},
            "data": {"train": ["a.jsonl", "b.jsonl"]},
            "loss": {"entropy": {"control": "adaptive", "variant": "paper"}},
            "eval": {"sets": [{"name": "heldout", "path": "h.jsonl", "samples": 4, "limit": 50}]},
            "stage": [stage.model_dump() for stage in STAGES],
        }
    )


def make_summary(**changes) -> Summary:
    fall = EvalHistory("hard", 1, (EvalPoint(0, 0.2), EvalPoint(4, 0.15)))
    rise = EvalHistory("heldout", 4, (EvalPoint(0, 0.32), EvalPoint(2, 0.5), EvalPoint(4, 0.796)))
    only = EvalHistory("late", 1, (EvalPoint(4, 1.0),))
    values = {
        "evals": (rise, fall, only),
        "steps_done": 4,
        "total_steps": 4,
        "wall_s": 277.0,
        "run_dir": "runs/demo",
        "phase_s": {"rollout": 143.0, "train": 84.0},
        "counts": {"truncated responses": 1241, "verifier timeouts": 0},
        "report_path": "runs/demo/report.html",
        "weights_path": "runs/demo/weights/step_4",
    }
    return Summary(**values | changes)
