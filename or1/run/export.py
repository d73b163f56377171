"""Export of a run's checkpoint as a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from or1.core.errors import CheckpointError, RunError
from or1.core.quiet import quiet_libraries
from or1.core.terminal import tell
from or1.run.base_weights import base_input, require_base
from or1.run.checkpoint import Checkpoint, load_checkpoint, step_folder, step_folders
from or1.run.directory import checkpoints_of, recorded_run
from or1.run.marks import lost_newest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export_run(run_dir: Path, step: int | None, out: Path | None, *, adapter: bool = False) -> Path:
    """Write checkpoint `step` of a run, the newest if None, as a Hugging Face folder. Return that folder.

    Adapters of [model.lora] are merged into the weights.

    adapter  write the adapter alone instead, as a folder that PEFT loads, by default to RUN_DIR/adapters/step_N

    Raises RunError if `run_dir` is not a run or has no such checkpoint, CheckpointError if the checkpoint is damaged.
    """
    config = recorded_run(run_dir)
    if adapter and config.model.lora is None:
        raise RunError(f"{run_dir} has no adapter, since its config has no [model.lora]; leave out --adapter")
    quiet_libraries()
    # After quiet_libraries: the Hugging Face libraries read its environment variables when they are imported.
    from or1.model.export import export_model
    from or1.model.load import load_model, load_tokenizer
    from or1.model.lora.folder import export_adapter

    steps = step_folders(checkpoints_of(run_dir))
    lost = lost_newest(run_dir)
    if not steps:
        raise RunError(
            lost
            or f"{run_dir} has no checkpoint yet; train at least checkpoint.every_steps steps, or name "
            "another run directory"
        )
    if step is None and lost:
        tell(lost)
    chosen = step if step is not None else max(steps)
    if chosen not in steps:
        raise RunError(f"{run_dir} has no checkpoint of step {chosen}; it has {steps}; name one of those with --step")
    try:
        checkpoint = load_checkpoint(step_folder(checkpoints_of(run_dir), chosen))
    except CheckpointError as error:
        others = ", ".join(str(each) for each in steps if each != chosen)
        remedy = f"name another with --step ({others})" if others else "it is the only one, so restore that file"
        raise type(error)(f"{error}; {remedy}") from error
    require_base(checkpoint.state.get("inputs", {}), base_input(config), config.model.path)
    # On the CPU: a model trained on several GPUs may not fit on one.
    plain = {"device": "cpu", "attention": "auto", "liger": "off", "compile": False, "gradient_checkpointing": "none"}
    model = load_model(config.model.model_copy(update=plain), packs=False)
    _fill(model, checkpoint, config.model.path)
    if adapter:
        return export_adapter(model, out or run_dir / "adapters" / f"step_{chosen}")
    return export_model(model, load_tokenizer(config.model.path), out or run_dir / "weights" / f"step_{chosen}")


def _fill(model: PreTrainedModel, checkpoint: Checkpoint, path: str) -> None:
    """Copy the trained tensors of a checkpoint into the model. Raises RunError if they do not fit."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            saved = checkpoint.tensors.get(f"master.{name}")
            if saved is None or saved.shape != parameter.shape:
                raise RunError(
                    f"the checkpoint of step {checkpoint.step} has no {name} of the shape that {path} "
                    "has; it belongs to another model, or was altered"
                )
            parameter.copy_(saved)
