"""Any LM head of a Hugging Face model as (hidden, weight, bias), and a forward that scores tokens with them.

The head is scored inside its own forward: only there do FSDP and DeepSpeed hold its weight in full.
Legend: N scored tokens, H hidden, V vocab, R adapter rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from or1_kernels import linear_logprob_entropy


class UnsupportedHeadError(NotImplementedError):
    """An LM head whose logits are not hidden times a weight; the message names it and the remedy."""


class Operands(NamedTuple):
    """logits = hidden weight^T + bias, with hidden [N, H or H + R] and weight [V, H or H + R]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def install(head: nn.Module) -> None:
    """Let head(hidden [N, H], score_targets=i64[N], score_options={...}) return (logp f32[N], entropy f32[N]).

    Without score_targets the head is what it was. Installing twice changes nothing. Raises UnsupportedHeadError.
    """
    require_supported(head)
    if not is_installed(head):
        head._or1_logits = head.forward
        head.forward = _HeadForward(head)


def is_installed(head: nn.Module) -> bool:
    """Return whether `install` was called for this head."""
    return hasattr(head, "_or1_logits")


def remove(head: nn.Module) -> None:
    """Undo install."""
    if is_installed(head):
        # What stood there before is the method of the class, unless another library had put its own in its place.
        if getattr(head._or1_logits, "__func__", None) is type(head).forward:
            del head.forward
        else:
            head.forward = head._or1_logits
        del head._or1_logits


class _HeadForward:
    """The forward of a head that can score. An object, because pickle finds a method by its name in the class."""

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def __call__(
        self,
        *args: Any,
        score_targets: Tensor | None = None,
        score_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        if score_targets is None:
            return self.head._or1_logits(*args, **kwargs)
        return _score(operands(self.head, args[0]), score_targets, **(score_options or {}))


def _score(o: Operands, targets_N: Tensor, fp32: bool = False, **options: Any) -> tuple[Tensor, Tensor]:
    """Autocast is obeyed as nn.Linear obeys it, by its dtype, unless fp32; logits and statistics are fp32 always."""
    device = o.weight.device.type
    autocast = torch.is_autocast_enabled(device) and not fp32
    dtype = torch.get_autocast_dtype(device) if autocast else o.weight.dtype
    hidden, weight, bias = (None if x is None else x.to(dtype) for x in o)
    # The engine chooses the dtype of each product itself; autocast would round its fp32 ones.
    with torch.autocast(device, enabled=False):
        return linear_logprob_entropy(hidden, weight, targets_N, bias=bias, **options)


def require_supported(head: nn.Module) -> None:
    """Raise UnsupportedHeadError for a head that operands cannot express."""
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
        raise UnsupportedHeadError(
            f"the LM head is {type(head).__name__}; it must be torch.nn.Linear, or one with a LoRA or modules_to_save "
            "adapter of PEFT"
        )
    elif not head.weight.is_floating_point():
        raise UnsupportedHeadError(
            f"the LM head's weight is {head.weight.dtype}; leave lm_head out of the quantization"
        )


def operands(head: nn.Module, hidden_NH: Tensor) -> Operands:
    """What the head multiplies now, given which adapters are active; call it inside the head's forward only.

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
    weight = head.weight
    if isinstance(weight, DTensor):
        raise UnsupportedHeadError(
            f"the LM head's weight is a DTensor {weight.placements} inside its own forward (tensor parallelism); "
            "leave lm_head out of the parallelize plan, or score shards with linear_logprob_entropy(group=...)"
        )
    return Operands(hidden_NH.to(weight.dtype), weight, head.bias)


def _with_adapters(head: nn.Module, base: Operands) -> Operands:
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


def _is_lora(head: nn.Module) -> bool:
    return hasattr(head, "lora_A") and hasattr(head, "base_layer")


def _is_modules_to_save(head: nn.Module) -> bool:
    return hasattr(head, "modules_to_save") and hasattr(head, "original_module")
