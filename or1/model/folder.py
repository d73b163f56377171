"""Checks of a model folder: config.json settings that would change training, and unusable tensors."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from or1.core.errors import ModelError, Or1Error
from or1.dist.oom_retry import is_out_of_memory

# Exceptions that transformers raises for malformed files; running out of memory is not among them.
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError, SafetensorError)
_FLOATS = ("F64", "F32", "F16", "BF16")
# Names of settings for dropout, randomly skipped layers and router noise.
_RANDOM = re.compile(r"drop(out|_?path|_?layer|_?rate|_?prob)|layer_?drop|pdrop|jitter")
_IMPLEMENTATION = re.compile(r"\w*_implementation(_internal)?")
_SHOWN = 3


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Convert errors of reading a model's files into a ModelError that says where the model was looked for."""
    try:
        yield
    except Exception as error:
        # The tokenizers library raises plain Exception.
        if type(error) is not Exception and not isinstance(error, UNREADABLE):
            raise
        if isinstance(error, ModelError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            raise
        cause = str(error).partition("\n")[0]
        if not cause or not isinstance(error, OSError | ValueError):
            cause = f"{type(error).__name__}: {cause}"
        where = "a folder here" if Path(path).is_dir() else f"no folder here (looked in {Path.cwd()}), so a hub id"
        raise ModelError(
            f"the model {path!r}, {where}, cannot be read: {cause}; correct the path, or download "
            "the checkpoint and name its folder"
        ) from error


@contextlib.contextmanager
def making(path: str, config: PreTrainedConfig, failure: str = "") -> Iterator[None]:
    """Convert any error of building or running a model into a ModelError, with `failure` before the cause.

    Out of memory, a full disk and or1's own errors pass through.
    """
    try:
        yield
    except Exception as error:
        own = isinstance(error, Or1Error)
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if own or full or isinstance(error, MemoryError):
            raise
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        cause = f"{type(error).__name__}: {' '.join(str(error).partition(chr(10))[0].split())}"
        if isinstance(error, KeyError) and error.args == (config._attn_implementation,):
            cause = "its own attention cannot be replaced"
        raise ModelError(
            f"the model {path!r} ({config.model_type}) cannot be trained: {failure}{cause}; "
            "docs/models.md lists architectures that can"
        ) from error


def configs_of(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Yield a config and all configs inside it."""
    yield config
    for key in config.sub_configs:
        inner = getattr(config, key, None)
        if isinstance(inner, PreTrainedConfig):
            yield from configs_of(inner)


def read_config(path: str, implementation: str) -> tuple[PreTrainedConfig, list[str]]:
    """Return the config that or1 trains with, and one line for each setting of config.json that or1 overrides.

    Attention is `implementation`, whatever the file sets, and all dropout is off. Raises ModelError.
    """
    with reading(path):
        raw, _ = PreTrainedConfig.get_config_dict(path)
        _refuse_what_is_not_plain(path, raw)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"the model {path!r} ({config.model_type}) cannot be trained: transformers has no causal language model of "
            "this type; docs/models.md lists architectures that can"
        )
    remarks = []
    asked = [f"{key} = {value!r}" for key, value in _implementations(raw) if value not in (None, implementation)]
    if asked:
        remarks.append(f"config.json of {path} sets {', '.join(asked)}; or1 uses its own attention instead")
    for each in configs_of(config):
        each._attn_implementation = implementation
        each._experts_implementation = None
    # A second loop: setting the attention of a config also sets the attention of its inner configs.
    off = sorted({f"{key} = {value:g}" for each in configs_of(config) for key, value in _without_dropout(each)})
    if off:
        remarks.append(
            f"config.json of {path} sets {', '.join(off)}; or1 trains without: the trained policy must be the policy "
            "that sampled"
        )
    return config, remarks


def _refuse_what_is_not_plain(path: str, raw: dict[str, Any]) -> None:
    for key, value in _implementations(raw):
        if "/" in json.dumps(value):
            raise ModelError(
                f"the config.json of {path!r} sets {key} = {value!r}, a kernel that transformers would fetch from the "
                "hub and run; or1 never does. Remove that key"
            )
    if raw.get("quantization_config"):
        kind = raw["quantization_config"]
        kind = kind.get("quant_method", "") if isinstance(kind, dict) else kind
        raise ModelError(
            f"the config.json of {path!r} has a quantization_config ({kind}): its weights are quantized, and or1 "
            "trains floating-point weights only. Take the checkpoint from which the quantized one was made"
        )


def _implementations(raw: object) -> Iterator[tuple[str, object]]:
    """Yield key and value of every `*_implementation` of a config.json, at any depth."""
    inner = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in inner:
        if isinstance(key, str) and _IMPLEMENTATION.fullmatch(key):
            yield key, value
        else:
            yield from _implementations(value)


def _without_dropout(config: PreTrainedConfig) -> Iterator[tuple[str, float]]:
    """Set every dropout probability of a config to 0; yield the name and old value of each that was not 0."""
    for key, value in list(vars(config).items()):
        if _RANDOM.search(key) and isinstance(value, float | int) and not isinstance(value, bool) and value:
            setattr(config, key, type(value)(0))
            yield key, value


def silence_dropout(model: PreTrainedModel) -> int:
    """Set p of every dropout module to 0, whatever the config says; return the number of changed modules."""
    live = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p]
    for module in live:
        module.p = 0.0
    return len(live)


def require_implementation(path: str, model: PreTrainedModel, implementation: str) -> None:
    """Raise ModelError unless every part of the model uses the requested attention."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and config._attn_implementation != implementation:
            raise ModelError(
                f"{type(module).__name__} of {path!r} ({config.model_type}) uses the attention "
                f"{config._attn_implementation!r} instead of or1's; docs/models.md lists architectures that train"
            )


def require_weights(path: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise ModelError unless every tensor was read from the files, with the right shape, floating and finite.

    `info` is the loading info of from_pretrained. A tied tensor may be missing.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    shapes = sorted(info["mismatched_keys"])
    if shapes:
        texts = [f"{name} ({list(found)} in the file, {list(want)} in the model)" for name, found, want in shapes]
        _refuse(
            path,
            "has tensors whose shapes differ from config.json",
            texts,
            "use config.json and weights of the same checkpoint",
        )
    if missing:
        also = f"; it has unknown ones, such as {unexpected[0]}" if unexpected else ""
        _refuse(
            path,
            "lacks tensors of the model",
            missing,
            "they would be random. Download the checkpoint again, or correct the names",
            also,
        )
    if info.get("error_msgs"):
        raise ModelError(
            f"the weights of {path!r} cannot be loaded: {str(info['error_msgs'][0])[:300]}; download the "
            "checkpoint again"
        )
    _require_floats(path, model, unexpected)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # aminmax is one pass without a temporary of the tensor's size; NaN propagates to both results.
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            _refuse(
                path,
                f"has tensors with NaN or infinite values in {tensor.dtype}",
                [name],
                "download the checkpoint again",
            )


def _refuse(path: str, what: str, names: list[str], remedy: str, also: str = "") -> None:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    raise ModelError(f"the model {path!r} {what}: {', '.join(names[:_SHOWN])}{more}{also}; {remedy}")


def _require_floats(path: str, model: PreTrainedModel, unexpected: list[str]) -> None:
    """Raise ModelError for weights of an integer type: quantized weights, which transformers would cast to floats."""
    unused = set(unexpected) | {name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    patterns = [*(model._keys_to_ignore_on_load_unexpected or [])]
    for file in weight_files(path, getattr(model.config, "transformers_weights", None)):
        for name, kind in _kinds(file):
            if kind in _FLOATS or name in unused or any(re.search(pattern, name) for pattern in patterns):
                continue
            _refuse(
                path,
                f"has tensors of type {kind}",
                [f"{name} in {file.name}"],
                "or1 trains floating-point weights. Take the checkpoint from which the quantized one was made",
            )


def weight_files(path: str, named: str | None = None) -> list[Path]:
    """Return the safetensors files that transformers reads for a folder, or for a hub id in the cache.

    named  `transformers_weights` of the model's config
    """
    whole = _file(path, named or SAFE_WEIGHTS_NAME)
    if whole is not None and whole.suffix == ".safetensors":
        return [whole]
    index = whole or _file(path, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    return [index.parent / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def _file(path: str, name: str) -> Path | None:
    if Path(path).is_dir():
        return file if (file := Path(path) / name).is_file() else None
    absent = ("missing_entries", "connection_errors", "gated_repo")
    found = cached_file(path, name, **{f"_raise_exceptions_for_{what}": False for what in absent})
    return None if found is None else Path(found)


def _kinds(file: Path) -> list[tuple[str, str]]:
    """Return names and types of the tensors of a safetensors file, from its header."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    return [(name, entry["dtype"]) for name, entry in header.items() if name != "__metadata__"]
