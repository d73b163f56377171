"""Any Hugging Face causal language model scores its labels without logits, in a Trainer or a loop of your own.

Legend: B sequences, T tokens of each, N scored tokens, H hidden.
"""

from __future__ import annotations

import inspect
import logging
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from or1.integrations import heads
from or1.integrations.notice import say
from or1_kernels import HeadOptions
from or1_kernels.options import head_options

IGNORED = -100
_OPTIONS = {option.name for option in fields(HeadOptions)}


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
    the others  what the backbone returns if it is asked, as in transformers; there is no cache
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class ScoreSettings:
    """How a patched model scores.

    flag      None: every call with labels is scored. Else only one that also passes this keyword, as True
    fp32      multiply in the weight's dtype even under autocast
    options   of linear_logprob_entropy: temperature, impl, stash_bytes, ...
    """

    flag: str | None = None
    fp32: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def patch_model(model: nn.Module, *, temperature: float = 1.0, **options: Any) -> nn.Module:
    """From now on model(input_ids, labels=labels) returns ScoredOutput, and no logits exist. Returns the model.

    model        a causal language model of transformers, bare or inside PEFT, DDP, FSDP or torch.compile. Patch it
                 before it is wrapped for training
    temperature  logits are divided by it; 1 for SFT
    options      of or1_kernels.HeadOptions, e.g. impl="torch", preset="lean", stash_bytes=2**30

    labels are token ids with -100 where nothing is scored, shifted inside as transformers shifts them; shift_labels
    are taken as they are. ignore_index names another label than -100, as in transformers. num_items_in_batch divides
    the loss, so Trainer's gradient accumulation stays exact. With no token to score the loss is 0, connected to every
    parameter, where transformers returns nan. Calls without labels, generate() included, are untouched; one in
    training is told once, since Trainer makes such for label_smoothing_factor and for a compute_loss_func.

    Saving, pickling and copying a patched model gives a patched model. After resize_token_embeddings the new head is
    scored. Raises TypeError for an unknown option, ValueError for a value that no call could take,
    UnsupportedModelError or heads.UnsupportedHeadError.
    """
    install(model, ScoreSettings(options={"temperature": temperature} | options))
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undo patch_model. Returns the model."""
    inner = unwrap(model)
    if "_or1_settings" in vars(inner):
        # PEFT may have put an adapter around a head that was patched, or resizing another in its place.
        for module in inner.modules():
            heads.remove(module)
        if inner._or1_forward is None:
            del inner.forward
        else:
            inner.forward = inner._or1_forward
        del inner._or1_forward, inner._or1_settings
    return model


def install(model: nn.Module, settings: ScoreSettings) -> None:
    """patch_model, with everything that can be set; a second call replaces the settings."""
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no LM head; patch a transformers model for causal language modelling"
        )
    if inner.base_model is inner:
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no backbone of its own (base_model_prefix "
            f"{inner.base_model_prefix!r}), so hidden states cannot be had without logits"
        )
    options = logit_transform(inner.config) | _checked(settings.options)
    heads.install(unwrap(inner.get_output_embeddings()))
    inner._or1_settings = ScoreSettings(settings.flag, settings.fp32, options)
    if not isinstance(vars(inner).get("forward"), _Forward):
        # None where the class's own forward stood; another library may have put its own in its place.
        inner._or1_forward = vars(inner).get("forward")
        inner.forward = _Forward(inner)
    say(
        logging.INFO,
        f"or1: {type(inner).__name__} scores its labels with or1's fused LM head, without logits "
        f"({', '.join(f'{name} {value}' for name, value in _facts(inner, options).items())})",
    )


def _checked(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options, if a call of the head can take them: a mistake shows where it is made, not in the first step."""
    for name, why in (("bias", "the model's own head has it"), ("grad_row_eps", "it needs or1's own loss")):
        if options.get(name) is not None:
            raise ValueError(f"{name} cannot be set for a patched model, since {why}; remove it")
    for name, value in options.items():
        try:
            head_options({name: value})
        except TypeError as error:
            if name not in _OPTIONS:
                raise
            raise TypeError(
                f"{name} is {value!r}, a {type(value).__name__}, which is no value for it ({error}); see "
                "or1_kernels.HeadOptions"
            ) from error
    temperature = options.get("temperature", 1.0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature!r}; a patched model takes one number above 0 for all tokens")
    return options


def _facts(inner: PreTrainedModel, options: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary = getattr(inner.config.get_text_config(), "vocab_size", "unknown")
    return {
        "impl": options.get("impl", "auto"),
        "vocabulary": vocabulary,
        "temperature": options.get("temperature", 1.0),
    }


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
    scale = next(
        (
            value
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if (value := getattr(text, name, None)) is not None
        ),
        None,
    )
    divisor = getattr(text, "logits_scaling", None)
    if scale is None and divisor is not None:
        # HyperCLOVA X multiplies by what Granite and MiniCPM3 divide by.
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    return {"softcap": getattr(text, "final_logit_softcapping", None), "logit_scale": 1.0 if scale is None else scale}


class _Forward:
    """The forward of a patched model. An object, because pickle finds a method by its name in the class."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        # Trainer and generate() look at the signature of forward.
        return inspect.signature(types.MethodType(type(self.model).forward, self.model))

    def __call__(
        self,
        *args: Any,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        model = self.model
        # accelerate makes a method of it again when it takes its own wrapper for mixed precision away.
        args = args[1:] if args and args[0] is model else args
        settings = model._or1_settings
        scored = labels is not None or shift_labels is not None
        if settings.flag is not None:
            scored = kwargs.pop(settings.flag, False)
        if scored:
            return _scored_call(model, args, kwargs, (labels, shift_labels), num_items_in_batch)
        if model.training and torch.is_grad_enabled():
            self._warn_of_logits()
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        stock = model._or1_forward or types.MethodType(type(model).forward, model)
        return stock(*args, **kwargs, **{name: x for name, x in given.items() if x is not None})

    def _warn_of_logits(self) -> None:
        if not getattr(self, "warned", False) and not torch.compiler.is_compiling():
            self.warned = True
            say(
                logging.WARNING,
                f"or1: {type(self.model).__name__} was called in training without labels, so it makes "
                "logits and or1's head is not used. Trainer takes the labels away for label_smoothing_factor > 0 and "
                "for compute_loss_func; leave these out, or unpatch the model",
            )


def _scored_call(
    model: PreTrainedModel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    labels: tuple[Tensor | None, Tensor | None],
    num_items: Tensor | int | None,
) -> ScoredOutput | tuple[Any, ...]:
    as_dict = kwargs.pop("return_dict", None)
    ignore_index = kwargs.pop("ignore_index", IGNORED)
    kwargs.pop("logits_to_keep", None)
    text_config = model.config.get_text_config()
    if getattr(text_config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    outputs = model.base_model(*args, **kwargs | {"use_cache": False, "return_dict": True})
    hidden_BTH = outputs.last_hidden_state
    targets, shifted = labels
    if shifted is None:
        hidden_BTH, targets = hidden_BTH[:, :-1], targets[:, 1:]
    else:
        targets = shifted
    log_probs, entropy, mask = score_hidden(model, hidden_BTH, targets, ignore_index)
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if num_items is None else num_items)
    aux_loss = None
    if kwargs.get("output_router_logits"):
        aux_loss = _router_loss(model, outputs.router_logits, kwargs.get("attention_mask"))
        loss = loss + getattr(text_config, "router_aux_loss_coef", 0.0) * aux_loss
    others = {name: outputs.get(name) for name in ("hidden_states", "attentions", "router_logits")}
    out = ScoredOutput(loss=loss, log_probs=log_probs, entropy=entropy, label_mask=mask, aux_loss=aux_loss, **others)
    wanted = getattr(model.config, "return_dict", True) if as_dict is None else as_dict
    return out if wanted else out.to_tuple()


def score_hidden(
    model: PreTrainedModel, hidden_BTH: Tensor, targets_BT: Tensor, ignore_index: int = IGNORED
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_probs, entropy, mask), each [B, T], of hidden states that predict targets; ignored rows reach no GEMM."""
    settings = model._or1_settings
    # FSDP, PEFT and resize_token_embeddings replace the head after patching, so it is looked up each time.
    head = model.get_output_embeddings()
    if not heads.is_installed(unwrap(head)):
        heads.install(unwrap(head))
    targets_BT = targets_BT.to(hidden_BTH.device)
    mask_BT = targets_BT != ignore_index
    options = settings.options | {"fp32": settings.fp32}
    logp_N, entropy_N = head(hidden_BTH[mask_BT], score_targets=targets_BT[mask_BT], score_options=options)
    mask_BT = mask_BT.to(logp_N.device)
    # Out of place, so that with no row at all the zeros still hang on the model and every rank can call backward.
    spread = (x.new_zeros(mask_BT.shape).masked_scatter(mask_BT, x) for x in (logp_N, entropy_N))
    return *spread, mask_BT


def _router_loss(model: PreTrainedModel, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
    module = sys.modules[type(model).__module__]
    if not hasattr(module, "load_balancing_loss_func"):
        raise UnsupportedModelError(
            f"{type(model).__name__} returns router logits but its module has no "
            "load_balancing_loss_func; set output_router_logits=False"
        )
    config = model.config.get_text_config()
    experts = next(x for name in ("num_experts", "num_local_experts") if (x := getattr(config, name, None)) is not None)
    return module.load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, attention_mask)
