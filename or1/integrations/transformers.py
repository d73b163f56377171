"""Any Hugging Face causal language model scores its labels without logits, in a Trainer or a loop of your own.

Legend: B sequences, T tokens of each, N scored tokens, H hidden.
"""

from __future__ import annotations

import functools
import sys
import types
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from or1.integrations import heads

IGNORED = -100


class UnsupportedModelError(NotImplementedError):
    """A model that cannot be patched; the message names what is missing."""


@dataclass
class ScoredOutput(ModelOutput):
    """What a patched model returns for labels. Per-token fields are [B, T - 1] ([B, T] for shift_labels).

    loss        [], sum of -log_probs over scored tokens / num_items_in_batch (their number if not given), plus the
                router's auxiliary loss where the config asks for it
    log_probs   of each next token, nats, at the patch's temperature; 0 where the label is -100; differentiable
    entropy     of the next-token distribution, nats; 0 where the label is -100; differentiable
    label_mask  bool, where a token was scored
    aux_loss    [], load-balancing loss of a mixture of experts, if router logits were asked for
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass(frozen=True)
class ScoreSettings:
    """How a patched model scores.

    flag      None: every call with labels is scored. Else only one that also passes this keyword, as True
    fp32      multiply in the weight's dtype even under autocast
    options   of linear_logprob_entropy: temperature, impl, stash_bytes, ...
    """

    flag: str | None = None
    fp32: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def patch_model(model: nn.Module, *, temperature: float = 1.0, **options: Any) -> nn.Module:
    """From now on model(input_ids, labels=labels) returns ScoredOutput, and no logits exist. Returns the model.

    model        a causal language model of transformers, bare or inside PEFT, DDP, FSDP or torch.compile. Patch it
                 before it is wrapped for training
    temperature  logits are divided by it; 1 for SFT
    options      of or1_kernels.HeadOptions, e.g. impl="torch", preset="lean", stash_bytes=2**30

    labels are token ids with -100 where nothing is scored, shifted inside as transformers shifts them; shift_labels
    are taken as they are. num_items_in_batch divides the loss, so Trainer's gradient accumulation stays exact. With
    no token to score the loss is 0, connected to every parameter, where transformers returns nan. Calls without
    labels, generate() included, are untouched.

    Raises UnsupportedModelError or heads.UnsupportedHeadError.
    """
    install(model, ScoreSettings(options={"temperature": temperature} | options))
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undo patch_model. Returns the model."""
    inner = unwrap(model)
    if hasattr(inner, "_or1_forward"):
        heads.remove(unwrap(inner.get_output_embeddings()))
        inner.forward = inner._or1_forward
        del inner._or1_forward, inner._or1_settings
    return model


def install(model: nn.Module, settings: ScoreSettings) -> None:
    """patch_model, with everything that can be set; a second call replaces the settings."""
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{type(inner).__name__} has no LM head; patch a transformers model for causal "
                                    "language modelling")
    if inner.base_model is inner:
        raise UnsupportedModelError(f"{type(inner).__name__} has no backbone of its own (base_model_prefix "
                                    f"{inner.base_model_prefix!r}), so hidden states cannot be had without logits")
    heads.install(unwrap(inner.get_output_embeddings()))
    inner._or1_settings = ScoreSettings(settings.flag, settings.fp32, logit_transform(inner.config) | settings.options)
    if not hasattr(inner, "_or1_forward"):
        inner._or1_forward = inner.forward
        # Trainer and generate() look at the signature of forward.
        inner.forward = types.MethodType(functools.wraps(type(inner).forward)(_forward), inner)


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers."""
    while True:
        if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif not isinstance(model, PreTrainedModel) and isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def logit_transform(config: Any) -> dict[str, float | None]:
    """softcap and logit_scale of a model's config, under the names that transformers' families use for them."""
    text = config.get_text_config()
    scale = next((value for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
                  if (value := getattr(text, name, None)) is not None), None)
    divisor = getattr(text, "logits_scaling", None)
    if scale is None and divisor is not None:
        # HyperCLOVA X multiplies by what Granite and MiniCPM3 divide by.
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    return {"softcap": getattr(text, "final_logit_softcapping", None), "logit_scale": 1.0 if scale is None else scale}


def _forward(
    self: PreTrainedModel, *args: Any, labels: Tensor | None = None, shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None, **kwargs: Any
) -> Any:
    settings = self._or1_settings
    scored = labels is not None or shift_labels is not None
    if settings.flag is not None:
        scored = kwargs.pop(settings.flag, False)
    if not scored:
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        return self._or1_forward(*args, **kwargs, **{name: x for name, x in given.items() if x is not None})
    for name in ("return_dict", "logits_to_keep"):
        kwargs.pop(name, None)
    text_config = self.config.get_text_config()
    if getattr(text_config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    outputs = self.base_model(*args, **kwargs | {"use_cache": False})
    hidden_BTH = outputs.last_hidden_state
    if shift_labels is None:
        hidden_BTH, labels = hidden_BTH[:, :-1], labels[:, 1:]
    else:
        labels = shift_labels
    log_probs, entropy, mask = score_hidden(self, hidden_BTH, labels)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    aux_loss = None
    if kwargs.get("output_router_logits"):
        aux_loss = _router_loss(self, outputs.router_logits, kwargs.get("attention_mask"))
        loss = loss + getattr(text_config, "router_aux_loss_coef", 0.0) * aux_loss
    return ScoredOutput(loss=loss, log_probs=log_probs, entropy=entropy, label_mask=mask, aux_loss=aux_loss)


def score_hidden(model: PreTrainedModel, hidden_BTH: Tensor, targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log_probs, entropy, mask), each [B, T], of hidden states that predict targets; rows of -100 reach no GEMM."""
    settings = model._or1_settings
    # FSDP and PEFT replace the head after patching, so it is looked up each time.
    head = model.get_output_embeddings()
    targets_BT = targets_BT.to(hidden_BTH.device)
    mask_BT = targets_BT != IGNORED
    options = settings.options | {"fp32": settings.fp32}
    logp_N, entropy_N = head(hidden_BTH[mask_BT], score_targets=targets_BT[mask_BT], score_options=options)
    mask_BT = mask_BT.to(logp_N.device)
    # Out of place, so that with no row at all the zeros still hang on the model and every rank can call backward.
    spread = (x.new_zeros(mask_BT.shape).masked_scatter(mask_BT, x) for x in (logp_N, entropy_N))
    return *spread, mask_BT


def _router_loss(model: PreTrainedModel, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
    module = sys.modules[type(model).__module__]
    if not hasattr(module, "load_balancing_loss_func"):
        raise UnsupportedModelError(f"{type(model).__name__} returns router logits but its module has no "
                                    "load_balancing_loss_func; set output_router_logits=False")
    config = model.config.get_text_config()
    experts = next(x for name in ("num_experts", "num_local_experts") if (x := getattr(config, name, None)) is not None)
    return module.load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, attention_mask)
