"""From a checked config to a finished run: directory, training, export, report, summary."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from or1.config import Config
from or1.display import RunDisplay, print_plan, print_summary
from or1.run_state import RunError, checkpoints_of, prepare_run_dir


def launch(config: Config, fresh: bool = False) -> None:
    """Train, then export the weights and write the report. Raises RunError, DataError, ModelError, CheckpointError."""
    messages = prepare_run_dir(config, fresh)
    print_plan(config, [])
    quiet_libraries()
    from or1.trainer import Trainer

    with RunDisplay(config.total_steps, config.stage) as display:
        for message in messages:
            display.message(message)
        trainer = Trainer(config, display)
        for line in trainer.data.lines():
            display.message(line)
        trainer.run()
        weights = trainer.export()
    from or1.report import write_report
    from or1.summary import summarise

    report = write_report(config.run_path)
    bad_rows = sum(len(r.bad) for r in trainer.data.reports)
    print_summary(summarise(config, trainer.state, bad_rows, report=str(report), weights=weights))


def export_run(run_dir: Path, step: int | None, out: Path | None) -> Path:
    """Write checkpoint `step` (default: the newest) of a run as a Hugging Face folder; returns the folder.

    Raises RunError if the folder is not a run or has no such checkpoint.
    """
    record = run_dir / "config.resolved.json"
    if not record.is_file():
        raise RunError(f"{run_dir} has no config.resolved.json, so it is not a run; name a run directory")
    config = Config.model_validate(json.loads(record.read_text(encoding="utf-8")))
    quiet_libraries()
    from or1.checkpoint import committed_steps, load_checkpoint
    from or1.model import export_model, load_model, load_tokenizer
    from or1.optim import MasterAdamW

    steps = committed_steps(checkpoints_of(run_dir))
    chosen = step if step is not None else max(steps, default=None)
    if chosen not in steps:
        raise RunError(f"{run_dir} has no checkpoint of step {chosen}; it has {steps or 'none'}")
    checkpoint = load_checkpoint(checkpoints_of(run_dir) / f"step_{chosen}")
    model = load_model(config.model)
    MasterAdamW(model, config.optim).load_state_tensors(checkpoint.tensors, checkpoint.state["updates"])
    return export_model(model, load_tokenizer(config.model.path), out or run_dir / "weights" / f"step_{chosen}")


def quiet_libraries() -> None:
    """Keep progress bars and advice of libraries out of the display; their errors still show."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("transformers").setLevel(logging.ERROR)
