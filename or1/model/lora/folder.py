"""An adapter as the folder that PEFT and vLLM load: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from or1.core.files import commit_folder
from or1.dist.world import SINGLE, World
from or1.model.lora.layers import NAME, adapter_settings
from or1.model.seal import seal_export

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def adapter_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the adapters' factors by PEFT's names, whole and on the CPU. Collective if sharded."""
    found = {}
    for name, parameter in model.named_parameters():
        if f".{NAME}.weight" in name and parameter.requires_grad:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            # contiguous copies: the optimizer changes its tensors in place.
            copied = whole.detach().to("cpu", copy=True).contiguous()
            found[f"base_model.model.{name.replace(f'.{NAME}.', '.')}"] = copied
    return found


def write_adapter(model: PreTrainedModel, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write the two files of an adapter into an existing folder."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    settings = adapter_settings(model).to_dict()
    settings["target_modules"] = sorted(settings["target_modules"])
    settings["inference_mode"] = True
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_adapter(model: PreTrainedModel, folder: Path, world: World = SINGLE) -> Path:
    """Write the adapter alone and return its folder; an existing folder is replaced by rename. Collective."""
    tensors = adapter_tensors(model)
    world.barrier()
    if world.is_main:
        partial = folder.with_name(f".{folder.name}.partial")
        if partial.is_symlink():
            partial.unlink()
        partial.mkdir(parents=True, exist_ok=True)
        write_adapter(model, partial, tensors)
        seal_export(partial)
        commit_folder(partial, folder)
    return folder
