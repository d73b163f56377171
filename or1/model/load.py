"""Load any Hugging Face causal language model with packed attention and an LM head that computes losses."""

# T packed tokens, H hidden

from __future__ import annotations

import contextlib
import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from or1.config import ModelConfig
from or1.core.errors import AttentionError, ModelError, Or1Error
from or1.dist.fsdp import fill_shards
from or1.dist.world import SINGLE, World
from or1.model import attention
from or1.model.attention_backends import require_features
from or1.model.compiled import uncompiled
from or1.model.folder import (
    UNREADABLE,
    making,
    read_config,
    reading,
    require_implementation,
    require_weights,
    silence_dropout,
)
from or1.model.isolation import require_isolation
from or1.model.lora.layers import add_adapters, require_peft
from or1.model.lora.quantize import quantization_options
from or1.model.prepare import prepare_model, put_head
from or1.model.source import require_source, require_tokenizer

_INDEX = ".safetensors.index.json"
_PLAIN_WEIGHTS = re.compile(r"[^/\\\0]+\.safetensors")


def resolve_device(name: str) -> torch.device:
    """Return the device of the setting `model.device`; "auto" is the GPU if there is one, else the CPU.

    Raises ModelError for "cuda" without a GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError('model.device = "cuda", but torch finds no GPU; install a CUDA build of torch or use "auto"')
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint, without running code from the checkpoint. Raises ModelError."""
    require_source(path)
    require_tokenizer(path)
    with reading(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {path!r} has no eos_token; name one in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig, world: World = SINGLE, packs: bool = True) -> PreTrainedModel:
    """Load weights from safetensors into a model with packed attention, without dropout, and with an LMHead.

    The LMHead shares the parameter of the `lm_head` that it replaces. With [model.lora], PEFT's adapters are on the
    layers, and only the adapters require a gradient.
    `packs` checks that packed rows give the same result as single sequences (or1.model.isolation).

    Raises ModelError if that check fails, or if the folder lacks a tensor or a plain `lm_head`; AttentionError and
    MemoryOptionError for an explicit option that cannot run here.
    """
    require_source(config.path)
    device, dtype = resolve_device(config.device), getattr(torch, config.dtype)
    name = attention.register(attention.choose_backend(config.attention, device, dtype))
    settings, remarks = read_config(config.path, name)
    require_features(config.attention, settings, device)
    _require_safetensors(config.path)
    if config.lora is not None:
        require_peft()
    quantized = quantization_options(config, device, world.size, trains=packs)
    options = {"config": settings, "dtype": dtype, "attn_implementation": name, "trust_remote_code": False}
    # Before minutes of reading weights: errors that architecture and config.json alone reveal.
    with torch.device("meta"), making(config.path, settings):
        put_head(AutoModelForCausalLM.from_config(**options | {"config": copy.deepcopy(settings)}), config.path)
    if world.size == 1:
        model = prepare_model(_read(config.path, options | quantized), config, device)
        if packs:
            # The check asks for several gradients of one graph, and compiled graphs free their buffers.
            with uncompiled():
                require_isolation(model, config.path)
    else:
        whole = _read_on_main(config, options, world, packs)
        model = prepare_model(_without_values(config.path, options), config, device, world)
        fill_shards(model, whole, world)
    # Not by assignment: torch's types allow only tensors and modules as attributes of a module.
    vars(model)["or1_remarks"] = remarks
    return model


def _read_on_main(config: ModelConfig, options: dict[str, Any], world: World, packs: bool) -> PreTrainedModel | None:
    """Load the whole model into the main rank's host memory; return None on the other ranks. Collective.

    An error on the main rank is raised on every rank: as itself on the main rank, as a ModelError on the others.
    """
    whole: PreTrainedModel | None = None
    problem: Or1Error | None = None
    if world.is_main:
        try:
            whole = _read(config.path, options)
            if packs:
                require_isolation(put_head(whole, config.path), config.path)
            if config.lora is not None:
                add_adapters(whole, config.lora, config.path)
        except (ModelError, AttentionError) as error:
            problem = error
    found = world.gather(str(problem or "").encode())[0].decode()
    if problem is not None:
        raise problem
    if found:
        raise ModelError(found)
    return whole


def remarks_of(model: PreTrainedModel) -> list[str]:
    """Return one line for each setting of the checkpoint's config.json that `load_model` has overridden."""
    return vars(model)["or1_remarks"]


def _read(path: str, options: dict[str, Any]) -> PreTrainedModel:
    with making(path, options["config"]), reading(path):
        # With `ignore_mismatched_sizes`, wrong shapes are listed in `info` instead of raised one at a time.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        model, info = loaded
        require_weights(path, model, info)
    require_implementation(path, model, options["attn_implementation"])
    silence_dropout(model)
    return model


def _without_values(path: str, options: dict[str, Any]) -> PreTrainedModel:
    """Return the model of `_read` with its tensors on the meta device."""
    with torch.device("meta"), making(path, options["config"]):
        model = AutoModelForCausalLM.from_config(**options).eval()
    silence_dropout(model)
    # As from_pretrained does; without the file, the model keeps the settings that its config implies.
    with reading(path), contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def _require_safetensors(path: str) -> None:
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{path!r} has no *.safetensors; or1 reads no pickled weights. Convert them with transformers' "
            "save_pretrained"
        )
    for index in _indexes(path):
        _require_plain_names(index)


def _indexes(path: str) -> list[Path]:
    """Return the index files that list the shards of a checkpoint; those of a hub id are downloaded if missing.

    Raises ModelError for a config that names pickled weights, which transformers would read instead.
    """
    with reading(path):
        # If a config has this key, transformers reads weights from that file only.
        named = getattr(AutoConfig.from_pretrained(path, trust_remote_code=False), "transformers_weights", None)
    if named is not None and not (isinstance(named, str) and named.endswith((".safetensors", _INDEX))):
        raise ModelError(
            f"the config.json of {path!r} takes weights from {named!r} (transformers_weights), which is not a "
            "safetensors file; or1 reads no pickled weights. Remove that key"
        )
    also = [named] if named is not None and named.endswith(_INDEX) else []
    if Path(path).is_dir():
        return sorted({*Path(path).glob(f"*{_INDEX}"), *(Path(path) / name for name in also)})
    absent = ("missing_entries", "connection_errors", "gated_repo")
    options = {f"_raise_exceptions_for_{what}": False for what in absent}
    with reading(path):
        found = [cached_file(path, name, **options) for name in sorted({SAFE_WEIGHTS_INDEX_NAME, *also})]
    return [Path(file) for file in found if file is not None]


def _require_plain_names(index: Path) -> None:
    """Raise ModelError if an index would make transformers read pickled weights or a file outside the folder."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        bad = sorted(str(name) for name in names if not _PLAIN_WEIGHTS.fullmatch(name))
    except UNREADABLE as error:
        raise ModelError(
            f"{index} does not say which file holds which weight ({type(error).__name__}: {error}); download it again"
        ) from error
    if bad:
        raise ModelError(
            f"{index} takes weights from {bad[0]!r}; or1 reads only *.safetensors in the folder of the index, never "
            "pickled weights or other folders. Convert the checkpoint with transformers' save_pretrained"
        )


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of tokens that end a response, ascending: from the tokenizer and generation_config.json."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({i for i in [tokenizer.eos_token_id, *listed] if i is not None})
