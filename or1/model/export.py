"""Export of the trained weights: by name for an engine, or as a plain Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from or1.core.errors import ModelError
from or1.core.files import commit_folder
from or1.dist.fsdp import whole_tensors
from or1.dist.world import SINGLE, World
from or1.model.seal import seal_export


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield current weights by Hugging Face name, unsharded and detached, one at a time. Collective if sharded.

    Unsharded models yield their own tensors, not copies. A tied lm_head is yielded too: an engine that keeps a packed
    copy of the head would otherwise keep the old one.
    """
    for name, tensor in _named_state(model).items():
        # Shards are fp32 masters; an engine needs the dtype that the model computes in.
        whole = tensor.full_tensor().to(_compute_dtype(model)) if isinstance(tensor, DTensor) else tensor
        yield name, whole.detach()


def weight_forms(model: PreTrainedModel) -> list[tuple[str, torch.dtype, torch.Size]]:
    """Return name, dtype and unsharded shape of every weight, in the order of `named_weights`. Not collective."""
    return [
        (name, _compute_dtype(model) if isinstance(tensor, DTensor) else tensor.dtype, tensor.shape)
        for name, tensor in _named_state(model).items()
    ]


def _compute_dtype(model: PreTrainedModel) -> torch.dtype:
    dtype = model.config.dtype
    # transformers replaces the dtype by its name when a config is saved.
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ModelError(
            f"the config of this {type(model).__name__} has the dtype {dtype!r}; load the model with "
            "or1.model.load.load_model, which sets a torch.dtype"
        )
    return found


def _named_state(model: PreTrainedModel) -> dict[str, Tensor]:
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.setdefault("lm_head.weight", model.get_input_embeddings().weight)
    return state


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World = SINGLE
) -> Path:
    """Write a plain Hugging Face checkpoint and return its folder; an existing folder is replaced by rename.

    Collective: all ranks gather the weights, and the main rank writes them in the dtype that the model computes in.
    """
    dtype = _compute_dtype(model)
    state = {name: t.to("cpu", dtype) for name, t in whole_tensors(model)} if world.size > 1 else None
    # The run may end after this call, and gloo aborts a rank whose peer exits during a collective. Not after the write,
    # which may take longer than the timeout of a collective.
    world.barrier()
    if not world.is_main:
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.is_symlink():
        partial.unlink()
    partial.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(partial, state_dict=state)
    tokenizer.save_pretrained(partial)
    _forget_attention(partial / "config.json", dtype)
    seal_export(partial)
    commit_folder(partial, folder)
    return folder


def _forget_attention(path: Path, dtype: torch.dtype) -> None:
    """Remove the name of or1's attention from a saved config.json, and set its dtype to that of the weights.

    Other programs cannot resolve the name. transformers would save the dtype of the parameters, which are fp32 masters
    while they are sharded.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
