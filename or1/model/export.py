"""Export of the trained weights: by name for an engine, or as a plain Hugging Face folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from or1.core.errors import ModelError
from or1.core.files import commit_folder
from or1.dist.fsdp import whole_tensors
from or1.dist.world import SINGLE, World
from or1.model.lora.layers import has_adapters
from or1.model.lora.merge import adapted_weights, dequantized, plain_name
from or1.model.seal import seal_export


def named_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield current weights by Hugging Face name, unsharded and detached, one at a time. Collective if sharded.

    Unsharded models yield their own tensors, not copies. A tied lm_head is yielded too: an engine that keeps a packed
    copy of the head would otherwise keep the old one. A weight with an adapter is merged as it is yielded: a copy of
    one tensor exists at a time, and the model stays as it is.
    """
    adapted = adapted_weights(model)
    for name, tensor in _named_state(model).items():
        whole = _whole(tensor)
        if name in adapted:
            whole = adapted[name].merged(whole, _compute_dtype(model), _whole)
        elif isinstance(tensor, DTensor):
            # Shards are fp32 masters; an engine needs the dtype that the model computes in.
            whole = whole.to(_compute_dtype(model))
        yield name, dequantized(whole).detach()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weight_forms(model: PreTrainedModel) -> list[tuple[str, torch.dtype, torch.Size]]:
    """Return name, dtype and unsharded shape of every weight, in the order of `named_weights`. Not collective."""
    adapted, compute = adapted_weights(model), _compute_dtype(model)
    return [
        (name, compute, adapted[name].shape)
        if name in adapted
        else (name, compute if isinstance(tensor, DTensor) else tensor.dtype, tensor.shape)
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
    state: dict[str, Any] = dict(model.state_dict())
    if has_adapters(model):
        # By parameter and not by state_dict: the packed form of a 4-bit weight has its scales beside it there.
        kept = dict(model.named_parameters(remove_duplicate=False))
        state = {
            plain: kept.get(name, tensor) for name, tensor in state.items() if (plain := plain_name(name)) is not None
        }
    if model.config.tie_word_embeddings:
        state.setdefault("lm_head.weight", model.get_input_embeddings().weight)
    return state


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World = SINGLE
) -> Path:
    """Write a plain Hugging Face checkpoint and return its folder; an existing folder is replaced by rename.

    Collective: all ranks gather the weights, and the main rank writes them in the dtype that the model computes in.
    Adapters are merged.
    """
    dtype = _compute_dtype(model)
    saved, state = model, None
    if has_adapters(model):
        saved, state = _without_adapters(model), {name: t.to("cpu", dtype) for name, t in _untied_weights(model)}
    elif world.size > 1:
        state = {name: t.to("cpu", dtype) for name, t in whole_tensors(model)}
    # The run may end after this call, and gloo aborts a rank whose peer exits during a collective. Not after the write,
    # which may take longer than the timeout of a collective.
    world.barrier()
    if not world.is_main:
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    if partial.is_symlink():
        partial.unlink()
    partial.mkdir(parents=True, exist_ok=True)
    saved.save_pretrained(partial, state_dict=state)
    tokenizer.save_pretrained(partial)
    _forget_attention(partial / "config.json", dtype)
    seal_export(partial)
    commit_folder(partial, folder)
    return folder


def _untied_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    tied = model.config.tie_word_embeddings
    return ((name, tensor) for name, tensor in named_weights(model) if not (tied and name == "lm_head.weight"))


def _without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same class without values, adapters and quantization, for its save_pretrained."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.generation_config = model.generation_config
    return plain


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
