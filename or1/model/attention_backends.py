"""Which attention kernel computes packed rows: what each can do, whether it can run here, and the choice.

One table, BACKENDS, says what each backend supports. The values are those that the sources check: flash-attn 2.8.4 and
its hopper/ folder, flash-attn-4 4.0.0b36, torch 2.11 and 2.13.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from or1.core.errors import AttentionError

_16_BIT = (torch.bfloat16, torch.float16)
_ANY = 1 << 30
_CUDNN = 90000
# What an installed library that cannot work here raises while it is imported.
_BROKEN = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError, LookupError, AssertionError)
_GPUS = {8: "Ampere and Ada", 9: "Hopper", 10: "Blackwell", 11: "Blackwell (Thor)", 12: "Blackwell (RTX)"}


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What one backend can do. Every backend has grouped heads, sliding windows and shared prompts.

    title              its name for people
    source             module and function whose import proves that the backend is there; None: part of or1
    install            what to do if that import fails
    max_head           largest head dimension for each major compute capability that has kernels; empty: any device
    head_multiple      what must divide the head dimension
    other_heads        further pairs (dimension of queries and keys, of values) without a soft cap or sinks
    softcap, sinks     True if the kernel computes these
    deterministic_max  largest head dimension with a deterministic backward; 0: none has one
    own_windows, own_sharing  False: torch's varlen attention computes documents with these
    """

    title: str
    source: tuple[str, str] | None
    install: str = ""
    max_head: Mapping[int, int] = field(default_factory=dict)
    head_multiple: int = 1
    other_heads: frozenset[tuple[int, int]] = frozenset()
    softcap: bool = False
    sinks: bool = False
    deterministic_max: int = _ANY
    own_windows: bool = True
    own_sharing: bool = True


_VARLEN = ("torch.nn.attention.varlen", "varlen_attn")

BACKENDS: dict[str, Backend] = {
    "flash3": Backend(
        title="flash-attn 3",
        source=("flash_attn_interface", "flash_attn_varlen_func"),
        install="build hopper/ of github.com/Dao-AILab/flash-attention",
        max_head={9: 256},
        head_multiple=8,
        other_heads=frozenset({(192, 128)}),
        softcap=True,
        # mha_bwd rounds larger head dimensions up to 256 and refuses to be deterministic there.
        deterministic_max=192,
    ),
    "flash4": Backend(
        title="flash-attn 4",
        source=("flash_attn.cute", "flash_attn_varlen_func"),
        install='pip install "or1[flash-attn-4]"',
        # The forward knows 8.x and 12.x too, but there is no backward for 8.x, and that for 12.x lacks soft caps and
        # sinks.
        max_head={9: 256, 10: 128, 11: 128},
        head_multiple=8,
        other_heads=frozenset({(192, 128), (256, 256)}),
        softcap=True,
        sinks=True,
    ),
    "cudnn": Backend(
        title="cuDNN through torch",
        source=_VARLEN,
        install="install torch 2.11 or later",
        max_head={8: 128, 9: 128, 10: 128, 11: 128, 12: 128},
        head_multiple=8,
        # torch refuses cuDNN's attention if only deterministic algorithms are allowed.
        deterministic_max=0,
        own_windows=False,
        own_sharing=False,
    ),
    "flash": Backend(
        title="flash-attn 2",
        source=("flash_attn", "flash_attn_varlen_func"),
        install='pip install "or1[flash-attn]"',
        max_head={8: 256, 9: 256, 10: 256, 11: 256, 12: 256},
        softcap=True,
    ),
    "varlen": Backend(
        title="torch's varlen attention",
        source=_VARLEN,
        install="install torch 2.11 or later",
        max_head={8: 256, 9: 256, 10: 256, 11: 256, 12: 256},
        head_multiple=8,
    ),
    # Soft caps and sinks are computed without a kernel, by or1.model.soft_attention.
    "sdpa": Backend(title="torch's SDPA, padded", source=None, softcap=True, sinks=True),
}

# Fastest first. The order is a prediction from published rates (no GPU was measured): kernels for the GPU's own
# generation reach 1.6 to 1.8 times the rate of flash-attn 2, which torch's varlen attention is too.
_ORDER = {
    8: ("flash", "varlen", "sdpa"),
    9: ("flash3", "flash4", "cudnn", "flash", "varlen", "sdpa"),
    10: ("flash4", "cudnn", "flash", "varlen", "sdpa"),
    11: ("flash4", "flash", "varlen", "sdpa"),
    12: ("flash", "varlen", "sdpa"),
}


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a call of attention needs. A head dimension of 0 is not known yet."""

    head_dim: int = 0
    value_dim: int = 0
    softcap: bool = False
    sinks: bool = False
    deterministic: bool = field(default_factory=torch.are_deterministic_algorithms_enabled)


class Refusal(NamedTuple):
    """Why a backend cannot be used, after its name in a sentence; and what to do."""

    reason: str
    remedy: str


def choose_backend(wanted: str, device: torch.device, dtype: torch.dtype, features: Features | None = None) -> str:
    """Return the backend for the setting `model.attention`: a key of BACKENDS.

    "auto" is the first of `candidates`. Raises AttentionError if an explicit choice cannot run.
    """
    features = features or Features()
    if wanted == "auto":
        return candidates(device, dtype, features)[0]
    if refusal := refusal_of(wanted, device, dtype, features):
        raise AttentionError(f'model.attention = "{wanted}" {refusal.reason}; {refusal.remedy}')
    return wanted


def candidates(device: torch.device, dtype: torch.dtype, features: Features | None = None) -> list[str]:
    """Return the backends that can run here, those expected to be fastest first; the last is "sdpa"."""
    features = features or Features()
    return [name for name in order_for(device) if refusal_of(name, device, dtype, features) is None]


def order_for(device: torch.device) -> tuple[str, ...]:
    """Return the backends that "auto" tries on a device, in order."""
    if device.type != "cuda":
        return ("sdpa",)
    major = _major(device)
    return _ORDER[8] if major is None else _ORDER.get(major, ("sdpa",))


def refusal_of(name: str, device: torch.device, dtype: torch.dtype, features: Features) -> Refusal | None:
    """Return why a backend cannot run on this device with these features, or None if it can."""
    return _cannot_run(name, device, dtype) or _lacks(name, features, _major(device))


def serving(name: str, device: torch.device, dtype: torch.dtype, features: Features) -> str:
    """Return the backend that computes a call for which `name` was chosen.

    That is `name` itself, unless the kernel lacks a feature of the call: a model may have layers of several kinds.
    """
    return _serving(name, device, dtype, features)


@lru_cache(maxsize=256)
def _serving(name: str, device: torch.device, dtype: torch.dtype, features: Features) -> str:
    return name if _lacks(name, features, _major(device)) is None else candidates(device, dtype, features)[0]


def features_of(settings: Any) -> Features:
    """Return what the attention of a model needs, as far as its transformers config tells."""
    text = settings.get_text_config()
    heads, hidden = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", 0)
    head_dim = getattr(text, "head_dim", None) or (hidden // heads if isinstance(heads, int) and heads else 0)
    if getattr(text, "qk_nope_head_dim", None):
        # Latent attention: queries and values have dimensions of their own, which each call knows.
        head_dim = 0
    return Features(
        head_dim=head_dim if isinstance(head_dim, int) else 0,
        softcap=bool(getattr(text, "attn_logit_softcapping", None)),
        # The sinks of GPT-OSS are parameters of its layers; no setting names them.
        sinks=getattr(text, "model_type", "") in ("gpt_oss", "openai_privacy_filter"),
    )


def require_features(wanted: str, settings: Any, device: torch.device) -> None:
    """Raise AttentionError if an explicit `model.attention` lacks something that the model's config asks for."""
    if wanted == "auto":
        return
    if refusal := _lacks(wanted, features_of(settings), _major(device)):
        raise AttentionError(f'model.attention = "{wanted}" {refusal.reason}; {refusal.remedy}')


def function_of(name: str) -> Callable[..., Any]:
    """Return the library function of a backend. Raises AttentionError with the reason if its import fails."""
    source = BACKENDS[name].source
    found = None if source is None else _imported(*source)
    if not callable(found):
        refusal = _not_imported(name, str(found))
        raise AttentionError(f'model.attention = "{name}" {refusal.reason}; {refusal.remedy}')
    return found


@cache
def _imported(module: str, function: str) -> Callable[..., Any] | str:
    """Return the function, or why it cannot be imported.

    A spec is no proof: flash-attn-4 leaves a namespace `flash_attn` without flash-attn 2 in it, and a library that was
    built for another torch is found and does not load.
    """
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            return "is not installed"
        return f"does not import (it lacks {error.name})"
    except _BROKEN as error:
        return f"does not import ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return found


def _cannot_run(name: str, device: torch.device, dtype: torch.dtype) -> Refusal | None:
    backend = BACKENDS[name]
    if backend.source is None:
        return None
    if device.type != "cuda" or dtype not in _16_BIT:
        return Refusal(f"needs a GPU and 16-bit weights, but the model is {dtype} on {device}", 'use "auto" or "sdpa"')
    major = _major(device)
    if major is not None and major not in backend.max_head:
        kinds = ", ".join(_GPUS[known] for known in sorted(backend.max_head))
        return Refusal(
            f"has no kernels for {torch.cuda.get_device_name(device)} (compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}), only for {kinds}",
            'use "auto"',
        )
    if isinstance(found := _imported(*backend.source), str):
        return _not_imported(name, found)
    if name == "cudnn" and (version := torch.backends.cudnn.version() or 0) < _CUDNN:
        return Refusal(f"needs cuDNN 9, and torch has version {version}", 'install a newer torch, or use "auto"')
    return _blocked_varlen() if backend.source == _VARLEN else None


def _not_imported(name: str, why: str) -> Refusal:
    return Refusal(f"cannot run: {BACKENDS[name].title} {why}", f'{BACKENDS[name].install}, or use "auto"')


def _blocked_varlen() -> Refusal | None:
    """Return a refusal if flash-attn 4 has replaced the kernels of torch's varlen attention, which cannot train then.

    torch 2.11 hands windows of -1 to a backward that refuses any window but None. torch 2.13 expects two results of the
    forward, and flash-attn-4 4.0.0b36 returns five.
    """
    active = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    if active == "FA4":
        return Refusal(
            'cannot run after activate_flash_attention_impl("FA4"), with which torch raises an error',
            'call torch.nn.attention.restore_flash_attention_impl(), or use "flash4"',
        )
    return None


def _lacks(name: str, features: Features, major: int | None) -> Refusal | None:
    """Return which feature the kernels of a backend lack. Without a known GPU the widest limits count."""
    backend, remedy = BACKENDS[name], 'use "auto"'
    if backend.source is None:
        return None
    for wanted, what, has in (
        (features.softcap, "soft caps on attention scores", backend.softcap),
        (features.sinks, "attention sinks", backend.sinks),
    ):
        if wanted and not has:
            return Refusal(f"has no {what}, which the model uses", remedy)
    head, value = features.head_dim, features.value_dim or features.head_dim
    bound = backend.deterministic_max
    if features.deterministic and (not bound or head > bound):
        limit = f" for head dimensions above {bound}, and the model's is {head}" if bound else ""
        return Refusal(f"has no deterministic backward{limit}", f"{remedy}, or set deterministic = false")
    limit_here = backend.max_head.get(major or 0, max(backend.max_head.values()))
    if head == value and head <= limit_here and head % backend.head_multiple == 0:
        return None
    if (head, value) in backend.other_heads and not (features.softcap or features.sinks):
        return None
    return Refusal(
        f"has no kernel for heads of {head} (queries and keys) and {value} (values) dimensions; here it takes "
        f"multiples of {backend.head_multiple} up to {limit_here}, the same for both",
        remedy,
    )


def _major(device: torch.device) -> int | None:
    """Return the major compute capability; None on other devices, without a visible GPU, and on AMD's."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return _capability(device)[0]


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
