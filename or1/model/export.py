"""Weights of the trained model: by name for an engine, and as a plain Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from or1.core.files import commit_folder
from or1.dist.fsdp import whole_tensors
from or1.dist.world import SINGLE, World
from or1.model.seal import seal_export


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The present weights under their Hugging Face names, whole and detached, one at a time; none is copied.

    A tied lm_head is named too: an engine that keeps a packed copy of it would go on with the old one otherwise.
    """
    for name, tensor in _named_state(model).items():
        # Shards are fp32 masters; an engine wants what the model computes with.
        whole = tensor.full_tensor().to(model.config.dtype) if hasattr(tensor, "full_tensor") else tensor
        yield name, whole.detach()


def weight_forms(model: PreTrainedModel) -> list[tuple[str, torch.dtype, torch.Size]]:
    """Name, dtype and whole shape of all that `named_weights` yields, in its order; nothing is gathered for it."""
    return [
        (name, model.config.dtype if hasattr(tensor, "full_tensor") else tensor.dtype, tensor.shape)
        for name, tensor in _named_state(model).items()
    ]


def _named_state(model: PreTrainedModel) -> dict[str, Tensor]:
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state.setdefault("lm_head.weight", model.get_input_embeddings().weight)
    return state


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World = SINGLE
) -> Path:
    """Write a plain Hugging Face checkpoint, committed by rename; replaces an older one there. Returns the folder.

    Collective: the ranks put the weights together, the main one writes them, in the type the model computes in.
    """
    dtype = model.config.dtype
    state = {name: t.to("cpu", dtype) for name, t in whole_tensors(model)} if world.size > 1 else None
    # A run ends here: gloo aborts a rank whose peer has gone while it still talks. Not after the main one has written,
    # which may take longer than a collective waits.
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
    """Drop the name of or1's attention from a saved config, where nobody else could resolve it; note the weights' type.

    transformers notes that of the parameters, which are fp32 masters while they are sharded.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    for key in ("_attn_implementation", "attn_implementation", "_attn_implementation_internal"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
