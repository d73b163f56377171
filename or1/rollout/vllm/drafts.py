"""Speculative decoding: counts of drafted and accepted tokens, and a check of vLLM's sampling on a CPU.

From the source of vLLM 0.32: a draft changes no distribution (rejection sampling, arXiv 2211.17192). Log-probs of mode
"processed_logprobs" are those of the model at the sampling temperature, for accepted, recovered and bonus tokens.
N-gram drafts are a function of the response itself, so a response stays a function of its seed. Suffix drafts are not,
since their cache is shared by all responses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from or1.core.errors import EngineError

_PREFIX = "vllm:spec_decode_num_"
_LINE = re.compile(rf"^{_PREFIX}(drafts|draft_tokens|accepted_tokens)(?:_total)?(?:{{[^}}]*}})? (\S+)$", re.MULTILINE)


class DraftCounts(NamedTuple):
    """Counts of speculative decoding since an engine's start, or between two moments.

    drafts    drafts that the model checked
    tokens    tokens in them
    accepted  tokens of them that the responses took
    """

    drafts: float = 0.0
    tokens: float = 0.0
    accepted: float = 0.0

    def since(self, before: DraftCounts) -> DraftCounts:
        """Return the counts after `before`. An engine that was started again counts from zero."""
        if self.drafts < before.drafts:
            return self
        return DraftCounts(*(now - then for now, then in zip(self, before, strict=True)))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the counts; none without drafts."""
        if not self.tokens:
            return {}
        # As vLLM and the literature count: the token that the model samples after a draft belongs to its length.
        length = 1 + self.accepted / self.drafts
        return {"rollout/draft_accepted": self.accepted / self.tokens, "rollout/draft_len": length}


def counts_of(metrics: Iterable[Any]) -> DraftCounts:
    """Return the counts in the metrics of `vllm.LLM.get_metrics()`."""
    found = {each.name.removeprefix(_PREFIX): each for each in metrics}
    names = ("drafts", "draft_tokens", "accepted_tokens")
    return DraftCounts(*(float(found[name].value) if name in found else 0.0 for name in names))


def counts_on(page: str) -> DraftCounts:
    """Return the counts on the page /metrics of a vLLM server, summed over its engines."""
    sums = {"drafts": 0.0, "draft_tokens": 0.0, "accepted_tokens": 0.0}
    for name, value in _LINE.findall(page):
        sums[name] += float(value)
    return DraftCounts(*sums.values())


def taken_from(engine: object) -> DraftCounts:
    """Return the counts of an engine since the last call; zeros for an engine without drafts."""
    take = getattr(engine, "take_drafts", None)
    return DraftCounts() if take is None else take()


def require_sound_sampling() -> None:
    """Raise EngineError if the installed vLLM cannot sample after drafts on a CPU.

    vLLM 0.32 and 0.33: `_expand_kernel_impl` in vllm/utils/cpu_triton_utils.py writes the temperatures of drafted
    tokens into a converted copy of its output. The output keeps what the memory held before, and logits are divided
    by that.
    """
    import torch

    try:
        from vllm.utils.cpu_triton_utils import _expand_kernel_impl
    except ImportError:
        return  # A vLLM that is built otherwise, or for a GPU only.
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    output, ends = torch.zeros(3), torch.tensor([1, 3], dtype=torch.int32)
    _expand_kernel_impl(output, torch.tensor([0.5, 1.5]), ends, 0, 1)
    if output.tolist() != [0.5, 1.5, 1.5]:
        raise EngineError(
            "rollout.vllm.speculative: the installed vLLM divides the logits of drafted tokens by uninitialised "
            "memory on a CPU (vllm/utils/cpu_triton_utils.py, _expand_kernel_impl), so it would sample from another "
            'distribution; set method = "none", or use a GPU'
        )
