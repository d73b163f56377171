"""Score the labels of any Hugging Face causal language model without logits, in a Trainer or in your own loop.

Legend: B sequences, T tokens of each, N scored tokens, H hidden.
"""

from __future__ import annotations

import inspect
import logging
import sys
import types
from dataclasses import dataclass, field, fields
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from or1.integrations import heads
from or1.integrations.notice import say
from or1_kernels import HeadOptions, HeadOptionsDict
from or1_kernels.options import head_options

IGNORED = -100
# Attributes of a patched model: its ScoreSettings, and the forward that its instance had.
_SETTINGS, _FORWARD = "_or1_settings", "_or1_forward"
_OPTIONS = {option.name for option in fields(HeadOptions)}


class UnsupportedModelError(NotImplementedError):
    """A model that cannot be patched; the message names what is missing."""


@dataclass
class ScoredOutput(ModelOutput):
    """Output of a patched model for labels. Per-token fields are [B, T - 1], or [B, T] for shift_labels.

    loss        [], sum of -log_probs over scored tokens / num_items_in_batch (default: the number of scored tokens),
                plus the router's auxiliary loss if the config enables it
    log_probs   of each next token, nats, at the patch's temperature; 0 where the label is -100; differentiable
    entropy     of the next-token distribution, nats; 0 where the label is -100; differentiable
    label_mask  bool, True for scored tokens
    aux_loss    [], load-balancing loss of a mixture of experts, with output_router_logits

    hidden_states, attentions and router_logits are the backbone's, as in transformers. There is no cache.
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
    """Settings of a patched model.

    flag      None: score every call with labels. Else score only calls that pass this keyword as True
    fp32      multiply in the weight's dtype even under autocast
    options   of linear_logprob_entropy: temperature, impl, stash_bytes, ...
    """

    flag: str | None = None
    fp32: bool = False
    options: HeadOptionsDict = field(default_factory=HeadOptionsDict)


def patch_model(model: nn.Module, **options: Unpack[HeadOptionsDict]) -> nn.Module:
    """Make model(input_ids, labels=labels) return ScoredOutput, computed without logits. Return the model.

    labels are token ids, -100 for tokens that are not scored; they are shifted inside, as in transformers. shift_labels
    are not shifted. ignore_index replaces -100, as in transformers. num_items_in_batch divides the loss, so Trainer's
    gradient accumulation stays exact. Without any token to score the loss is 0 and connected to every parameter, where
    transformers returns nan. Calls without labels, generate() included, are unchanged. The first such call in training
    logs a warning, because Trainer removes the labels for label_smoothing_factor and for a compute_loss_func.

    A saved, pickled or copied patched model is patched too. After resize_token_embeddings the new head scores.

    Args:
        model: a causal language model of transformers, bare or inside PEFT, DDP, FSDP or torch.compile. Patch the model
            before you wrap it for training.
        **options: the fields of or1_kernels.HeadOptions without bias and grad_row_eps. temperature is one float above 0
            that divides the logits; its default 1 is right for SFT.

    Returns:
        The same model.

    Raises:
        TypeError: an unknown option, or a value of a wrong type.
        ValueError: a value that no call accepts.
        UnsupportedModelError: a model without an LM head or without a backbone of its own.
        UnsupportedHeadError: a head that is not a plain or LoRA linear layer (or1.integrations.heads).
    """
    install(model, ScoreSettings(options=HeadOptionsDict(temperature=1.0) | options))
    return model


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undo patch_model.

    Args:
        model: a patched model, or one that is not patched, which stays as it is.

    Returns:
        The same model.
    """
    state = vars(unwrap(model))
    if _SETTINGS in state:
        # The patched head may now be inside a PEFT adapter, or resizing may have replaced it.
        for module in unwrap(model).modules():
            heads.remove(module)
        forward = state.pop(_FORWARD)
        if forward is None:
            del state["forward"]
        else:
            state["forward"] = forward
        del state[_SETTINGS]
    return model


def install(model: nn.Module, settings: ScoreSettings) -> None:
    """Patch a model as patch_model does, with all settings. A second call replaces the settings.

    Args:
        model: as in patch_model.
        settings: which calls score their labels, and how.

    Raises:
        Exception: whatever patch_model raises.
    """
    inner = unwrap(model)
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no LM head; patch a transformers model for causal language modelling"
        )
    if inner.base_model is inner:
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no backbone of its own (base_model_prefix "
            f"{inner.base_model_prefix!r}), so its hidden states are not available without logits"
        )
    options = logit_transform(inner.config) | _checked(settings.options)
    heads.install(unwrap(inner.get_output_embeddings()))
    state = vars(inner)
    state[_SETTINGS] = ScoreSettings(settings.flag, settings.fp32, options)
    if not isinstance(state.get("forward"), _Forward):
        # None means the class's own forward. Another library may have set one on the instance.
        state[_FORWARD] = state.get("forward")
        state["forward"] = _Forward(inner)
    say(
        logging.INFO,
        f"or1: {type(inner).__name__} scores its labels with or1's fused LM head, without logits "
        f"({', '.join(f'{name} {value}' for name, value in _facts(inner, options).items())})",
    )


def _checked(options: HeadOptionsDict) -> HeadOptionsDict:
    """Return the options. Raise for values that a call would refuse, so that mistakes appear before the first step."""
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


def _facts(inner: PreTrainedModel, options: HeadOptionsDict) -> dict[str, Any]:
    vocabulary = getattr(inner.config.get_text_config(), "vocab_size", "unknown")
    return {
        "impl": options.get("impl", "auto"),
        "vocabulary": vocabulary,
        "temperature": options.get("temperature", 1.0),
    }


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers.

    Args:
        model: a module in any number of wrappers.

    Returns:
        The wrapped module itself, not a copy.
    """
    inner: Any = model  # Wrappers are recognised by their attributes.
    while True:
        if hasattr(inner, "get_base_model") and hasattr(inner, "peft_config"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):
            inner = inner._orig_mod
        elif not isinstance(inner, PreTrainedModel) and isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module
        else:
            return inner


def logit_transform(config: Any) -> HeadOptionsDict:
    """Return softcap and logit_scale of a model's config, whichever names its family uses for these.

    Args:
        config: the model's configuration, a transformers PretrainedConfig.

    Returns:
        Options of the head; logit_scale is 1.0 and softcap None where the config names none.
    """
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
        # HyperCLOVA X multiplies by logits_scaling; Granite and MiniCPM3 divide by it.
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    return {"softcap": getattr(text, "final_logit_softcapping", None), "logit_scale": 1.0 if scale is None else scale}


class _Forward:
    """The forward of a patched model. An object, because pickle looks methods up by name in their class."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        # Trainer and generate() inspect the signature of forward.
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
        # accelerate turns this object into a method when it removes its mixed-precision wrapper.
        args = args[1:] if args and args[0] is model else args
        settings = _settings_of(model)
        scored = labels is not None or shift_labels is not None
        if settings.flag is not None:
            scored = kwargs.pop(settings.flag, False)
        if scored:
            return _scored_call(model, args, kwargs, (labels, shift_labels), num_items_in_batch)
        if model.training and torch.is_grad_enabled():
            self._warn_of_logits()
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        stock = getattr(model, _FORWARD) or types.MethodType(type(model).forward, model)
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
    if shifted is not None:
        targets = shifted
    elif targets is not None:
        hidden_BTH, targets = hidden_BTH[:, :-1], targets[:, 1:]
    else:
        raise ValueError(
            f"{type(model).__name__} is to score tokens but got neither labels nor shift_labels; pass the token ids"
        )
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
    """Return log-probs and entropies of the tokens that hidden states predict. Ignored rows enter no GEMM.

    Args:
        model: a patched model, whose LM head is called.
        hidden_BTH: [B, T, H], the backbone's last hidden states.
        targets_BT: i64[B, T], the next token of every position.
        ignore_index: target of positions that are not scored.

    Returns:
        (log_probs, entropy, mask), each [B, T]: f32 in nats and 0 where ignored, twice, and bool.
    """
    settings = _settings_of(model)
    # FSDP, PEFT and resize_token_embeddings replace the head after patching, so every call looks it up.
    head = model.get_output_embeddings()
    if not heads.is_installed(unwrap(head)):
        heads.install(unwrap(head))
    targets_BT = targets_BT.to(hidden_BTH.device)
    mask_BT = targets_BT != ignore_index
    logp_N, entropy_N = head(
        hidden_BTH[mask_BT], score_targets=targets_BT[mask_BT], score_options=settings.options, score_fp32=settings.fp32
    )
    mask_BT = mask_BT.to(logp_N.device)
    # Out of place: without any row the zeros stay connected to the model, so every rank can call backward.
    logp_BT, entropy_BT = (x.new_zeros(mask_BT.shape).masked_scatter(mask_BT, x) for x in (logp_N, entropy_N))
    return logp_BT, entropy_BT, mask_BT


def _settings_of(model: PreTrainedModel) -> ScoreSettings:
    return getattr(model, _SETTINGS)


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
