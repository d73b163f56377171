"""Any LM head of a Hugging Face model as (hidden, weight, bias), and a forward that scores tokens with these.

The head scores tokens inside its own forward, because FSDP and DeepSpeed hold the whole weight only there.
Legend: N scored tokens, H hidden, V vocab, R adapter rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from or1_kernels import HeadOptionsDict, linear_logprob_entropy

_LOGITS = "_or1_logits"  # attribute of a patched head: its own forward


class UnsupportedHeadError(NotImplementedError):
    """An LM head whose logits are not hidden times a weight; the message names the head and the remedy."""


class Operands(NamedTuple):
    """Operands of logits = hidden weight^T + bias, with hidden [N, H or H + R] and weight [V, H or H + R]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class _LoraHead(Protocol):
    """The attributes of PEFT's lora.Linear that are read here."""

    base_layer: nn.Module
    lora_A: Mapping[str, nn.Linear]
    lora_B: Mapping[str, nn.Linear]
    lora_dropout: Mapping[str, nn.Module]
    scaling: Mapping[str, float]
    active_adapters: list[str]
    disable_adapters: bool
    merged: bool

    def unmerge(self) -> None: ...


class _SavedHead(Protocol):
    """The attributes of PEFT's ModulesToSaveWrapper that are read here."""

    original_module: nn.Module
    modules_to_save: Mapping[str, nn.Module]
    active_adapters: list[str]
    disable_adapters: bool


def install(head: nn.Module) -> None:
    """Let head(hidden [N, H], score_targets=i64[N], score_options={...}) return (logp f32[N], entropy f32[N]).

    score_fp32=True multiplies in the weight's dtype even under autocast. Calls without score_targets are unchanged.
    Idempotent. Raises UnsupportedHeadError.
    """
    require_supported(head)
    if not is_installed(head):
        state = vars(head)
        state[_LOGITS] = head.forward
        state["forward"] = _HeadForward(head)


def is_installed(head: nn.Module) -> bool:
    """Return True if `install` was called for this head."""
    return hasattr(head, _LOGITS)


def remove(head: nn.Module) -> None:
    """Undo install."""
    if is_installed(head):
        state = vars(head)
        logits = state.pop(_LOGITS)
        # `logits` is the class's own method, unless another library replaced forward before install.
        if getattr(logits, "__func__", None) is type(head).forward:
            del state["forward"]
        else:
            state["forward"] = logits


class _HeadForward:
    """The forward of a head that can score. An object, because pickle looks methods up by name in their class."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def __call__(
        self,
        *args: Any,
        score_targets: Tensor | None = None,
        score_options: HeadOptionsDict | None = None,
        score_fp32: bool = False,
        **kwargs: Any,
    ) -> Any:
        # Options are a dict and not HeadOptions: FSDP1 copies dataclass arguments by assigning to their fields, which a
        # frozen dataclass refuses.
        if score_targets is None:
            return getattr(self.head, _LOGITS)(*args, **kwargs)
        return _score(operands(self.head, args[0]), score_targets, score_options or {}, score_fp32)


def _score(o: Operands, targets_N: Tensor, given: HeadOptionsDict, fp32: bool) -> tuple[Tensor, Tensor]:
    """Return (logp, entropy), each f32[N]. As in nn.Linear, autocast sets the operands' dtype, unless fp32."""
    device = o.weight.device.type
    autocast = torch.is_autocast_enabled(device) and not fp32
    dtype = torch.get_autocast_dtype(device) if autocast else o.weight.dtype
    options = given.copy()
    options["bias"] = None if o.bias is None else o.bias.to(dtype)
    # The engine chooses the dtype of each product itself; autocast would round its fp32 products.
    with torch.autocast(device, enabled=False):
        return linear_logprob_entropy(o.hidden.to(dtype), o.weight.to(dtype), targets_N, **options)


def require_supported(head: nn.Module) -> None:
    """Raise UnsupportedHeadError for a head that `operands` cannot express."""
    if _is_modules_to_save(head):
        for module in (head.original_module, *head.modules_to_save.values()):
            require_supported(module)
    elif _is_lora(head):
        variants = getattr(head, "lora_variant", {})
        if variants:
            raise UnsupportedHeadError(
                f"the LM head has the LoRA variant {next(iter(variants.values()))!r}; only plain LoRA (also with "
                "dropout, bias and rslora) is a matrix product. Drop the variant, or take lm_head out of the targets"
            )
        require_supported(head.base_layer)
    elif not isinstance(head, nn.Linear):
        raise _not_linear(head)
    elif not head.weight.is_floating_point():
        raise UnsupportedHeadError(
            f"the LM head's weight is {head.weight.dtype}; leave lm_head out of the quantization"
        )


def operands(head: nn.Module, hidden_NH: Tensor) -> Operands:
    """Return the operands of the head's product, given the active adapters. Call only inside the head's forward.

    LoRA adds columns: h W^T + s (h A^T) B^T = [h, s h A^T] [W, B]^T, exact also under the adapter's dropout.
    """
    if _is_modules_to_save(head):
        active = [] if head.disable_adapters else head.active_adapters
        return operands(head.modules_to_save[active[0]] if active else head.original_module, hidden_NH)
    if _is_lora(head):
        if head.disable_adapters and head.merged:
            head.unmerge()
        base = operands(head.base_layer, hidden_NH)
        return base if head.disable_adapters or head.merged else _with_adapters(head, base)
    if not isinstance(head, nn.Linear):
        raise _not_linear(head)
    weight = head.weight
    if isinstance(weight, DTensor):
        raise UnsupportedHeadError(
            f"the LM head's weight is a DTensor {weight.placements} inside its own forward (tensor parallelism); "
            "leave lm_head out of the parallelize plan, or score shards with linear_logprob_entropy(group=...)"
        )
    return Operands(hidden_NH.to(weight.dtype), weight, head.bias)


def _with_adapters(head: _LoraHead, base: Operands) -> Operands:
    hidden, weights, bias = [base.hidden], [base.weight], base.bias
    dtype = base.weight.dtype
    for name in head.active_adapters:
        if name not in head.lora_A:
            continue
        a, b = head.lora_A[name], head.lora_B[name]
        low_NR = a(head.lora_dropout[name](base.hidden.to(a.weight.dtype)))
        hidden.append((low_NR * head.scaling[name]).to(dtype))
        weights.append(b.weight.to(dtype))
        if b.bias is not None:
            extra_V = (b.bias * head.scaling[name]).to(dtype)
            bias = extra_V if bias is None else bias + extra_V
    return Operands(torch.cat(hidden, dim=-1), torch.cat(weights, dim=-1), bias)


def _not_linear(head: nn.Module) -> UnsupportedHeadError:
    return UnsupportedHeadError(
        f"the LM head is {type(head).__name__}; it must be torch.nn.Linear, or one with a LoRA or modules_to_save "
        "adapter of PEFT"
    )


def _is_lora(head: nn.Module) -> TypeGuard[_LoraHead]:
    return hasattr(head, "lora_A") and hasattr(head, "base_layer")


def _is_modules_to_save(head: nn.Module) -> TypeGuard[_SavedHead]:
    return hasattr(head, "modules_to_save") and hasattr(head, "original_module")
