"""Test, before training, that a model isolates the documents of a packed row.

Some architectures get wrong gradients in packed rows. Examples are layers that carry a state from token to token
(Mamba), and models that ignore the given positions. No list of names can cover all of them. So the model computes a
short row with two responses that share a prompt, followed by another document:

  1. A token must not depend on other documents or on later tokens: the gradient of its hidden state there is exactly
     zero. That holds in any dtype, since zero gradients are never rounded.
  2. Log-probs and hidden states must equal, up to rounding, those of each sequence alone. Both references count: the
     embedded engine's attention, and the model's own plain attention ("eager").
"""

# T packed tokens, N trained tokens, H hidden

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from or1.config import ModelConfig
from or1.core.errors import ModelError, PackingError
from or1.core.types import TrainSequence
from or1.model import attention
from or1.model.attention_backends import require_features
from or1.model.folder import making, read_config, silence_dropout
from or1.model.forward import eval_mode, hidden_states, lm_head, trained_rows
from or1.model.prepare import prepare_model
from or1.model.rows import Microbatch, pack_indexed

EXACT, ROUNDED = 1e-3, 0.1
"""Largest relative difference that rounding explains: in fp32 and fp64 (measured 1e-6), and in 16 bits (0.01).
A wrong scale, wrong positions or a missing sliding window exceeds both limits."""
_LEAK = 1e-6
_SMALL = 50_000_000
# Prompt and response length of each sequence; the first two share their prompt.
_LENGTHS = ((5, 4), (5, 6), (3, 7))
_CANNOT = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True)
class _Finding:
    reason: str
    number: str


def require_isolation(model: PreTrainedModel, path: str) -> None:
    """Raise PackingError if documents of a packed row see each other, or differ from the same documents alone.

    `model` has its LMHead and its weights. Of a large model only the first layers are tested, up to the first layer of
    the last kind.
    """
    training = model.training
    with making(path, model.config, "its forward over a packed row fails: "):
        try:
            finding = _examine(model)
        finally:
            model.train(training)
    if finding is not None:
        raise PackingError(
            f"the model {path!r} ({model.config.model_type}, {type(model).__name__}) cannot be trained in packed rows: "
            f"{finding.reason} ({finding.number}). Gradients would be wrong. Train another architecture; "
            "docs/models.md lists those that work",
            finding.reason,
        )


def _examine(model: PreTrainedModel) -> _Finding | None:
    if sum(p.numel() for p in model.parameters()) > _SMALL:
        # Some architectures cannot run without all of their layers.
        with suppress(*_CANNOT), _few_layers(model):
            return _test(model)
    return _test(model)


def rehearse_model(config: ModelConfig) -> list[str]:
    """Check from config.json alone that `load_model` would accept the model; return remarks of one line.

    Tests the first layers with random weights, if they are small enough to be quick.
    Raises ModelError, AttentionError, MemoryOptionError.
    """
    settings, remarks = read_config(config.path, attention.register("sdpa"))
    require_features(config.attention, settings, torch.device("cpu"))
    dtype = getattr(torch, config.dtype)
    plain = config.model_copy(update={"device": "cpu", "liger": "off", "compile": False})
    with making(config.path, settings), torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(settings, dtype=dtype)
        prepare_model(whole, plain, torch.device("meta"))
        few = _with_fewer_layers(settings, whole)
    # Some architectures cannot run without all of their layers.
    with suppress(_NotWithFewer):
        return remarks + _rehearse_with(few, plain, dtype, last=False)
    return remarks + _rehearse_with(settings, plain, dtype, last=True)


class _NotWithFewer(Exception):
    """An architecture that cannot run with its first layers only."""


def _rehearse_with(settings: PreTrainedConfig, config: ModelConfig, dtype: torch.dtype, *, last: bool) -> list[str]:
    try:
        with making(config.path, settings):
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(copy.deepcopy(settings), dtype=dtype)
            size = sum(p.numel() for p in model.parameters())
            if size > _SMALL:
                return [
                    f"packed rows of {settings.model_type} are checked when the model is loaded: "
                    f"{size / 1e6:.0f} M parameters are too many for a dry run"
                ]
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
            silence_dropout(model)
            model = prepare_model(model, config, torch.device("cpu"))
        require_isolation(model, config.path)
    except PackingError:
        raise
    except ModelError as error:
        if last:
            raise
        raise _NotWithFewer from error
    return []


def _with_fewer_layers(settings: PreTrainedConfig, whole: PreTrainedModel) -> PreTrainedConfig:
    """Return a config with a small vocabulary and the fewest first layers that include one of each kind."""
    few = copy.deepcopy(settings)
    text = few.get_text_config()
    layers, number = getattr(whole.get_decoder(), "layers", None), getattr(text, "num_hidden_layers", 0)
    text.vocab_size = min(text.vocab_size, 512)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, key, None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != number:
        return few
    kept = _one_of_each(layers)
    text.num_hidden_layers = kept
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == number:
            setattr(text, key, value[:kept])
    return few


def _one_of_each(layers: nn.ModuleList) -> int:
    """Return the number of first layers that include one of each kind.

    Layers are of one kind if submodule types, parameter shapes and settings (strings, flags, window or none) agree.
    """

    def kind(layer: nn.Module) -> tuple:
        shapes = tuple((name, p.shape) for name, p in layer.named_parameters())
        settings = tuple(
            (name, value if isinstance(value, str | bool) else value is None)
            for module in layer.modules()
            for name, value in sorted(vars(module).items())
            if isinstance(value, str | bool | int | None) and not name.startswith("_")
        )
        return tuple(type(m) for m in layer.modules()), shapes, settings

    kinds = [kind(layer) for layer in layers]
    return max(kinds.index(each) for each in kinds) + 1


@contextmanager
def _few_layers(model: PreTrainedModel) -> Iterator[None]:
    decoder = model.get_decoder()
    layers = decoder.layers
    decoder.layers = nn.ModuleList(list(layers)[: _one_of_each(layers)])
    try:
        yield
    finally:
        decoder.layers = layers


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Set the attention implementation of a model; restore the former one on exit."""
    configs = {id(c): c for m in model.modules() if isinstance(c := getattr(m, "config", None), PreTrainedConfig)}
    former = {key: config._attn_implementation_internal for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = former[key]


def _test(model: PreTrainedModel) -> _Finding | None:
    # The main rank of several tests the model on its CPU, where only SDPA runs.
    name = attention.register("sdpa") if model.device.type == "cpu" else model.config._attn_implementation
    with _attention(model, name):
        sequences = _sequences(model)
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        ((indices, batch),) = pack_indexed(sequences, 1 << 20, model.device, dtype, "on")
        sequences = [sequences[i] for i in indices]
        model.train()
        hidden_TH, embedded_TH = _embedded(model, batch)
        if finding := _leak(batch, hidden_TH, embedded_TH):
            return finding
        with eval_mode(model):
            return _difference(model, batch, hidden_TH.detach(), sequences)


def _sequences(model: PreTrainedModel) -> list[TrainSequence]:
    random = np.random.default_rng(0)
    vocabulary = model.get_input_embeddings().get_parameter("weight").shape[0]
    drawn = [random.integers(0, vocabulary, sum(lengths), dtype=np.int32) for lengths in _LENGTHS]
    drawn[1][: _LENGTHS[1][0]] = drawn[0][: _LENGTHS[0][0]]
    return [
        TrainSequence(ids[:n], ids[n:], np.zeros(len(ids) - n, np.float32), 1.0)
        for ids, (n, _) in zip(drawn, _LENGTHS, strict=True)
    ]


def _embedded(model: PreTrainedModel, batch: Microbatch) -> tuple[Tensor, Tensor]:
    """Return hidden states of a packed row in training mode, and the token embeddings they were computed from."""
    seen: list[Tensor] = []
    # Frozen embeddings ([model.lora]) have outputs without a gradient; this makes no difference for others.
    hook = model.get_input_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.requires_grad_()))
    try:
        with torch.enable_grad():
            hidden_TH = hidden_states(model, batch)
    finally:
        hook.remove()
    return hidden_TH, seen[0]


def _leak(batch: Microbatch, hidden_TH: Tensor, embedded_TH: Tensor) -> _Finding | None:
    """Return a finding if a document's gradient reaches another document or a later token."""
    ends, key_ends = batch.cu_seqlens.tolist(), batch.cu_keys.tolist()
    rows_U = torch.arange(key_ends[-1]) if batch.kv_rows_U is None else batch.kv_rows_U.cpu()
    generator = torch.Generator().manual_seed(0)
    # Random weights: the plain sum of a norm's outputs has no gradient.
    weight_TH = torch.randn(hidden_TH.shape, generator=generator).to(hidden_TH)
    for document in range(len(ends) - 1):
        first, last = ends[document], (ends[document] + ends[document + 1]) // 2
        outputs = (hidden_TH[first : last + 1] * weight_TH[first : last + 1]).sum()
        (grad,) = torch.autograd.grad(outputs, embedded_TH, retain_graph=True, allow_unused=True)
        if grad is None or not (size_T := grad.reshape(len(hidden_TH), -1).float().abs().amax(dim=1).cpu()).any():
            return _Finding("no gradient reaches its token embeddings", "all are zero")
        own_T = torch.zeros(len(hidden_TH), dtype=torch.bool)
        own_T[rows_U[key_ends[document] : key_ends[document + 1]]] = True
        own_T[last + 1 :] = False
        largest = float(size_T.max())
        outside_T = torch.where(own_T, 0.0, size_T)
        if float(outside_T.max()) > _LEAK * largest:
            at = int(outside_T.argmax())
            later = ends[document] <= at < ends[document + 1]
            what = "a token sees later ones of its document" if later else "documents of a row see each other"
            return _Finding(what, f"gradient {float(outside_T.max()):.1e} where it must be 0, of at most {largest:.1e}")
    return None


def _difference(
    model: PreTrainedModel, batch: Microbatch, hidden_TH: Tensor, sequences: list[TrainSequence]
) -> _Finding | None:
    """Return a finding if log-probs or hidden states of the packed row differ from those of each sequence alone."""
    limit = EXACT if model.dtype in (torch.float32, torch.float64) else ROUNDED
    hidden_NH = trained_rows(hidden_TH, batch)
    logp_N = lm_head(model)(hidden_NH, batch.targets_N)[0]
    engine = _alone(model, sequences)
    found = max(_apart(hidden_NH, engine[0]), _apart(logp_N[:, None], engine[1][:, None]))
    if not found <= limit:
        return _Finding(
            "packed documents are not what the model computes for each alone",
            f"relative difference {found:.1e}, limit {limit:g}",
        )
    with suppress(*_CANNOT), _attention(model, "eager"):
        plain = _alone(model, sequences)
        found = max(_apart(hidden_NH, plain[0]), _apart(logp_N[:, None], plain[1][:, None]))
        if not found <= limit:
            return _Finding(
                "its own plain attention computes something that or1's packed attention leaves out",
                f"relative difference {found:.1e}, limit {limit:g}",
            )
    return None


def _alone(model: PreTrainedModel, sequences: list[TrainSequence]) -> tuple[Tensor, Tensor]:
    """Return inputs of the head and log-probs, float[N, H] and float[N], computed one sequence at a time."""
    given: list[Tensor] = []
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].reshape(-1, head.in_features)))
    hidden, logp = [], []
    try:
        for sequence in sequences:
            ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.response_ids])).long()
            ids = ids.to(model.device)
            given.clear()
            logits = model(input_ids=ids[None, :-1], attention_mask=torch.ones_like(ids)[None, :-1], use_cache=False)
            first = len(sequence.prompt_ids) - 1
            logp_LV = logits.logits[0, first:].float().log_softmax(-1)
            logp.append(logp_LV.gather(1, ids[first + 1 :, None])[:, 0])
            hidden.append(given[0][first:])
    finally:
        hook.remove()
    return torch.cat(hidden), torch.cat(logp)


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Return the root mean square of the difference over that of `theirs`, which counts as at least 1e-3."""
    ours, theirs = ours.double(), theirs.double()
    norm = math.sqrt(float(theirs.square().mean()))
    return math.sqrt(float((ours - theirs).square().mean())) / max(norm, 1e-3)
