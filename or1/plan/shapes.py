"""The shapes of all parameters of a Llama-like model, dense or with experts, from its config.json alone."""

# H hidden, I intermediate, Q width of all query heads, K width of all key (or value) heads, D head dimension, V vocab,
# E experts

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from or1.core.errors import PlanError
from or1.plan.known_models import KNOWN


@dataclass(frozen=True)
class Experts:
    """The experts of every layer: `count` gated MLPs of `width`, of which a token passes through `active`."""

    count: int
    active: int
    width: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder with gated MLPs or experts, and grouped-query attention. Counts are scalars, not bytes."""

    name: str
    family: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    experts: Experts | None = None

    @property
    def mlp_width(self) -> int:
        """Width of the MLP, or of all experts together that one token passes through."""
        return self.intermediate if self.experts is None else self.experts.active * self.experts.width

    @property
    def q_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads together."""
        return self.kv_heads * self.head_dim

    def layer_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the parameter shapes of one layer, by name."""
        h, q, k = self.hidden, self.q_width, self.kv_width
        shapes: dict[str, tuple[int, ...]] = {}
        linears = [
            ("q_proj", q, h, self.qkv_bias),
            ("k_proj", k, h, self.qkv_bias),
            ("v_proj", k, h, self.qkv_bias),
            ("o_proj", h, q, self.out_bias),
            *self._mlp(),
        ]
        for name, rows, columns, bias in linears:
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)
        if self.experts is not None:
            e, i = self.experts.count, self.experts.width
            shapes |= {"gate.weight": (e, h), "experts.gate_up_proj": (e, 2 * i, h), "experts.down_proj": (e, h, i)}
        if self.qk_norm:
            shapes |= {"q_norm.weight": (self.head_dim,), "k_norm.weight": (self.head_dim,)}
        return shapes | {"input_layernorm.weight": (h,), "post_attention_layernorm.weight": (h,)}

    def _mlp(self) -> list[tuple[str, int, int, bool]]:
        h, i = self.hidden, self.intermediate
        if self.experts is not None:
            return []
        return [(name, i, h, self.mlp_bias) for name in ("gate_proj", "up_proj")] + [("down_proj", h, i, self.mlp_bias)]

    def root_tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the parameter shapes outside the layers, by name. A tied head shares the embedding: not listed."""
        shapes: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (self.vocab, self.hidden),
            "norm.weight": (self.hidden,),
        }
        return shapes if self.tied else shapes | {"lm_head.weight": (self.vocab, self.hidden)}

    def tensor_sizes(self) -> Iterator[int]:
        """Yield the number of scalars of every parameter tensor of the model."""
        yield from (prod(shape) for shape in self.root_tensors().values())
        layer = [prod(shape) for shape in self.layer_tensors().values()]
        for _ in range(self.layers):
            yield from layer

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        return sum(prod(shape) for shape in self.layer_tensors().values())

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return sum(self.tensor_sizes())

    @property
    def matrix_parameters(self) -> int:
        """Scalars of all layers' matrices that a token meets. Each costs two floating-point operations a token."""
        dense = sum(prod(shape) for shape in self.layer_tensors().values() if len(shape) == 2)
        return self.layers * (dense + (0 if self.experts is None else 3 * self.hidden * self.mlp_width))


def shape_of(path: str) -> ModelShape:
    """Return the shape of a checkpoint folder, of a hub id in the local cache, or of a known hub id.

    Only config.json is read. Raises PlanError if `path` is none of the three, or for an unknown architecture.
    """
    for folder in (Path(path).expanduser(), *_cached(path)):
        if (folder / "config.json").is_file():
            return _read_shape(folder / "config.json", path)
    if path.lower() in (names := {name.lower(): name for name in KNOWN}):
        return parse_shape(KNOWN[names[path.lower()]], path)
    raise PlanError(
        f"no config.json for model.path = {path!r}: it is no folder, not in the Hugging Face cache, and not a "
        f"known model ({', '.join(KNOWN)}). Put the model's config.json in a folder and name that"
    )


def _read_shape(file: Path, name: str) -> ModelShape:
    try:
        return parse_shape(json.loads(file.read_text(encoding="utf-8")), name)
    except PlanError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError) as error:
        raise PlanError(
            f"{file} does not describe a model ({type(error).__name__}: {error}); take the file of the checkpoint"
        ) from error


def _cached(hub_id: str) -> list[Path]:
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    snapshots = hub / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    return sorted(snapshots.glob("*"), key=lambda p: p.stat().st_mtime, reverse=True) if snapshots.is_dir() else []


def parse_shape(config: Mapping[str, Any], name: str) -> ModelShape:
    """Return the shape that a config.json describes. Raises PlanError for an unknown architecture."""
    family = config.get("model_type")
    rules = {
        "qwen2": _qwen2,
        "qwen3": _qwen3,
        "llama": _llama,
        "mistral": _mistral,
        "qwen3_moe": _qwen3_moe,
        "mixtral": _mixtral,
    }
    if family not in rules:
        raise PlanError(
            f"model_type {family!r} of {name!r} is not supported by or1 plan; it supports {', '.join(rules)}. "
            "Train with a small optim.max_tokens_per_rank and watch perf/peak_mem_gib instead"
        )
    missing = [
        key
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if key not in config
    ]
    if missing:
        raise PlanError(f"the config.json of {name!r} has no {', '.join(missing)}; take the file of the checkpoint")
    heads = config["num_attention_heads"]
    return ModelShape(
        name=name,
        family=family,
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        tied=bool(config.get("tie_word_embeddings", False)),
        **rules[family](config),
    )


def _even_head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _qwen2(config: Mapping[str, Any]) -> dict[str, Any]:
    # transformers' Qwen2 reads head_dim too, though no published checkpoint sets it.
    return {"head_dim": _even_head_dim(config), "qkv_bias": True}


def _qwen3(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {"head_dim": config.get("head_dim") or 128, "qkv_bias": bias, "out_bias": bias, "qk_norm": True}


def _llama(config: Mapping[str, Any]) -> dict[str, Any]:
    bias = bool(config.get("attention_bias", False))
    return {
        "head_dim": _even_head_dim(config),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(config.get("mlp_bias", False)),
    }


def _mistral(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"head_dim": _even_head_dim(config)}


def _qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise PlanError(
            "or1 plan knows qwen3_moe with experts in every layer only, and this model has layers without. Train with "
            "a small optim.max_tokens_per_rank and watch perf/peak_mem_gib instead"
        )
    count = config.get("num_experts") or config.get("num_local_experts")
    experts = Experts(_counted(count), config["num_experts_per_tok"], config["moe_intermediate_size"])
    return _qwen3(config) | {"experts": experts}


def _mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    experts = Experts(
        _counted(config.get("num_local_experts")), config["num_experts_per_tok"], config["intermediate_size"]
    )
    return {"head_dim": _even_head_dim(config), "experts": experts}


def _counted(experts: Any) -> int:
    if not isinstance(experts, int) or experts < 1:
        raise PlanError(f"the config.json names {experts!r} experts; take the file of the checkpoint")
    return experts
