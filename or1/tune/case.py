"""The shapes of a run that its fastest implementations depend on. The weights are random, so no checkpoint is read."""

# T packed tokens, N rows of the head, H hidden, V vocab, I intermediate, Q width of all query heads

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from or1.config import Config
from or1.core.errors import ModelError
from or1.model.folder import read_config
from or1.model.load import resolve_device

# One run of a candidate must take a fraction of a second. A CPU gets fewer tokens, but at least these.
_MOST_FLOPS = {"cuda": 2e14, "cpu": 1e11}
_LEAST_TOKENS = {"cuda": 8192, "cpu": 256}
# A response has half of its limit, as `or1 plan` assumes.
_MEAN_SHARE = 0.5


@dataclass(frozen=True)
class Case:
    """Shapes of one rank's work on a packed row.

    device, dtype            "cuda" or "cpu", and the name of the weights' dtype
    tokens                   T, of a packed row
    head_tokens              N and T of the head; on a slow device less than T
    attention_tokens         T of the attention, with documents of `document` tokens
    mlp_tokens               T of the MLP
    intermediate             0: the model has no plain gated MLP
    heads, kv_heads          of this rank; 0: the attention is not plain (`why_no_attention`)
    checkpointed             whether backward computes the MLP a second time
    entropy                  whether the loss has an entropy bonus
    softcap, logit_scale     of the head
    """

    device: str
    dtype: str
    tokens: int
    head_tokens: int
    attention_tokens: int
    mlp_tokens: int
    document: int
    hidden: int
    vocab: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    checkpointed: bool
    entropy: bool
    objective: str
    temperature: float
    softcap: float | None = None
    logit_scale: float = 1.0
    why_no_attention: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)

    @property
    def head_flops(self) -> float:
        """Operations of the three matrix products of the head."""
        return 6.0 * self.head_tokens * self.vocab * self.hidden

    @property
    def mlp_flops(self) -> float:
        """Operations of forward and backward of a gated MLP."""
        return 18.0 * self.mlp_tokens * self.hidden * self.intermediate

    @property
    def attention_flops(self) -> float:
        """Operations of forward and backward of causal attention, counting the useful half; see `or1.plan.timing`."""
        squares = sum(length**2 for length in documents(self))
        return 7.0 * self.heads * self.head_dim * squares


def documents(case: Case) -> list[int]:
    """Return the lengths of the documents of the packed row."""
    whole, rest = divmod(case.attention_tokens, case.document)
    return [case.document] * whole + [rest] * (rest > 0)


def case_of(config: Config, sequence_size: int = 1) -> Case:
    """Return the case of a config, from the config.json of its model. Raises ModelError.

    sequence_size  ranks that share a packed row
    """
    device = resolve_device(config.model.device).type
    try:
        text = read_config(config.model.path, "sdpa")[0].get_text_config()
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        hidden, vocab = int(text.hidden_size), int(text.vocab_size)
        head_dim = getattr(text, "head_dim", None) or hidden // heads
    except AttributeError as error:
        raise ModelError(f"the config.json of {config.model.path!r} lacks what or1 tune needs ({error})") from error
    why_no_attention = _unusual(text)
    intermediate = _gated_width(text)
    row = config.optim.max_tokens_per_rank
    prompt, limit = config.data.max_prompt_tokens, max((s.max_response_tokens for s in config.stage), default=row)
    document = min(row, round(min(prompt, 256) + _MEAN_SHARE * limit))
    own = -(-row // sequence_size)
    stages = [config.in_stage(i) for i in range(max(len(config.stage), 1))]
    return Case(
        device=device,
        dtype=config.model.dtype,
        tokens=row,
        head_tokens=_bounded(device, own, 6.0 * vocab * hidden),
        attention_tokens=_bounded(device, row, 7.0 * heads * head_dim * document),
        mlp_tokens=_bounded(device, own, 24.0 * hidden * max(intermediate, 1)),
        document=min(document, _bounded(device, row, 7.0 * heads * head_dim * document)),
        hidden=hidden,
        vocab=vocab,
        intermediate=intermediate,
        heads=0 if why_no_attention else max(1, heads // sequence_size),
        kv_heads=max(1, kv_heads // sequence_size),
        head_dim=head_dim,
        checkpointed=config.model.gradient_checkpointing != "none",
        entropy=any(each.loss.entropy.control != "none" for each in stages),
        objective=stages[0].loss.kind,
        temperature=stages[0].rollout.temperature,
        softcap=getattr(text, "final_logit_softcapping", None),
        logit_scale=getattr(text, "logit_scale", None) or 1.0 / (getattr(text, "logits_scaling", None) or 1.0),
        why_no_attention=why_no_attention,
    )


def _bounded(device: str, tokens: int, flops_a_token: float) -> int:
    """Return the tokens that one run of a candidate processes."""
    return min(tokens, max(_LEAST_TOKENS[device], int(_MOST_FLOPS[device] / flops_a_token)))


def _gated_width(text: Any) -> int:
    """Return the width of the gated MLPs, 0 for experts."""
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    return 0 if experts else int(getattr(text, "intermediate_size", None) or 0)


def _unusual(text: Any) -> str:
    """Return what the attention of a model has that the bench does not, "" for plain causal attention."""
    if getattr(text, "attn_logit_softcapping", None):
        return "a soft cap"
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        return "a sliding window"
    return "sinks" if "gpt_oss" in text.model_type else ""


def dtype_of(case: Case) -> torch.dtype:
    """Return the dtype of the weights."""
    found = getattr(torch, case.dtype)
    assert isinstance(found, torch.dtype)
    return found
