"""`[rollout]` and `[rollout.vllm]`: the generation engine."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from or1.config.section import MOST_SECONDS, MOST_STEPS, MOST_TOKENS, FilePath, Section, UrlList

Quantization = Literal[
    "fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "mxfp8", "int8_per_channel_weight_only"
]
"""vLLM's quantizations of a 16-bit checkpoint. The others need a quantized checkpoint, which the trainer lacks."""


class SpeculativeConfig(Section):
    """`[rollout.vllm.speculative]`: a cheap method drafts tokens, and the model checks them in one pass."""

    method: Literal["none", "ngram", "suffix", "draft", "mtp"] = "none"
    """ngram: copy what followed the last tokens earlier in the response. suffix: the same, in all responses (package
    arctic-inference). draft: a small model. mtp: the checkpoint's own prediction layers. The distribution of the
    responses is that of the model in each case."""
    tokens: int = Field(3, ge=1, le=64)
    """Most tokens of a draft."""
    model: FilePath | None = None
    """With method = "draft": folder of the small model, which must have the same vocabulary and is not trained."""
    ngram_min: int = Field(2, ge=1, le=64)
    """With method = "ngram": fewest tokens that must match."""
    ngram_max: int = Field(4, ge=1, le=64)
    """With method = "ngram": most tokens that must match; longer matches are tried first."""


MOST_STALENESS = 64
"""Each step ahead takes a thread, and the responses of a rollout in memory."""


class VllmConfig(Section):
    """`[rollout.vllm]`: has no effect with engine = "hf"."""

    placement: Literal["colocate", "server"] = "colocate"
    """colocate: inside the trainer, one engine per rank under torchrun. server: a separate process."""
    url: UrlList | None = Field(None, min_length=1)
    """With placement = "server": a server started with `or1 serve`, as http://host:port, or as https://host:port behind
    a TLS proxy; or a list of several. Each response goes to a server that has room. A server that dies during a rollout
    is left out, and the others generate its responses again. Absent: or1 starts one."""
    transport: Literal["auto", "ipc", "broadcast", "file"] = "auto"
    """Transport of weights to a server. ipc: memory that both processes map, on one machine. broadcast: NCCL, or gloo
    on a CPU. file: safetensors in a shared folder. auto, on a GPU: the first of the three that works; on a CPU: file
    for a server that or1 started, else broadcast."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of a server that or1 starts; absent means that of the trainer."""
    tensor_parallel: int = Field(1, ge=1, le=1024)
    """GPUs that share one copy of the model; if colocated, a divisor of the number of ranks."""
    gpu_memory: float = Field(0.5, gt=0, lt=1)
    """Fraction of GPU memory for vLLM's weights and cache; if colocated, vLLM frees all of it during training."""
    quantization: Quantization | None = None
    """Quantize the engine's weights at every push. Needs loss.is_cap. Absent: the dtype of the model."""
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3", "fp8_e5m2"] = "auto"
    """Type of the engine's cache of keys and values; one of fp8 needs loss.is_cap. auto: the dtype of the model."""
    engine: dict[str, Any] = Field({})
    """Further arguments of vLLM's engine by their Python names, such as max_num_batched_tokens = 16384. Those that or1
    sets itself are refused."""
    allow_untested: bool = False
    """Accept a vLLM version outside the tested range, at your own risk."""
    speculative: SpeculativeConfig = SpeculativeConfig()

    @property
    def rounds(self) -> bool:
        """True if the engine rounds weights or cache, so that its log-probs are not those of the policy."""
        return self.quantization is not None or self.kv_cache_dtype != "auto"


class RolloutConfig(Section):
    """`[rollout]`"""

    engine: Literal["auto", "hf", "vllm"] = "auto"
    """hf: transformers' generate inside the trainer. auto: vllm if it is installed and there is a GPU, else hf."""
    temperature: float = Field(1.0, ge=1e-3, le=100)
    """Sampling temperature; the loss divides the logits by the same number."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling: sample from the most likely tokens with this total probability. Below 1, vLLM reports
    log-probs among these tokens only, so policy/entropy differs from the policy's entropy (policy/entropy_exact)."""
    top_k: int = Field(0, ge=0, lt=2**31)
    """Sample from this many most likely tokens; 0 means all. Above 0, log-probs and entropy as with top_p below 1."""
    batch_size: int = Field(256, ge=1, le=2**20)
    """Number of responses generated together."""
    deadline_s: float | None = Field(None, gt=0, le=MOST_SECONDS)
    """Seconds after which a step's unfinished responses are aborted and count as truncated; absent means never."""
    partial_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    """Partial rollouts: the most tokens that a response may gain in one step. An unfinished response continues under
    the next policy, and its group is trained when complete. Needs loss.is_cap. Absent means off."""
    max_staleness: int = Field(0, ge=0, le=MOST_STALENESS)
    """k: a token is sampled by a policy at most k updates of the engine before the one that trains on it. 0: on-policy.
    1: the next step's responses are generated while this step trains. 2 or more: rollouts of so many steps ahead are in
    the making while a server takes weights. Needs vllm and loss.is_cap; see docs/staleness.md."""
    overlap: bool = False
    """The same as max_staleness = 1. A step after which a stage may end has no overlap with the next one."""
    verify_every: int = Field(10, ge=0, le=MOST_STEPS)
    """Compare the log-probs of engine and trainer after every this many weight updates; 0 means never. hf shares the
    weights and needs no check."""
    reproducible: bool = True
    """Give each response its own seed. false: vLLM samples faster on a GPU, but runs are not reproducible."""
    vllm: VllmConfig = VllmConfig()

    @property
    def steps_ahead(self) -> int:
        """The largest number of steps that a rollout is made ahead of its own: max_staleness, or 1 with overlap."""
        return max(self.max_staleness, int(self.overlap))
