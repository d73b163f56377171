"""`[rollout]` and `[rollout.vllm]`: the generation engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from or1.config.section import MOST_SECONDS, MOST_STEPS, MOST_TOKENS, Section


class VllmConfig(Section):
    """`[rollout.vllm]`: has no effect with engine = "hf"."""

    placement: Literal["colocate", "server"] = "colocate"
    """colocate: inside the trainer, one per rank under torchrun. server: a process of its own."""
    url: str | None = Field(None, pattern=r"^https?://[^/\s]+$")
    """With placement = "server": a server started with `or1 serve`, as http://host:port, or as https://host:port behind
    a proxy that speaks TLS. Absent: or1 starts one."""
    transport: Literal["auto", "file", "broadcast"] = "auto"
    """How weights reach a server. file: safetensors in a shared folder. broadcast: NCCL, or gloo on a CPU. auto: file
    to a server that or1 started, else broadcast."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of a server that or1 starts; absent means the trainer's own."""
    tensor_parallel: int = Field(1, ge=1, le=1024)
    """GPUs that share one copy of the model; when colocated, a divisor of torchrun's ranks."""
    gpu_memory: float = Field(0.5, gt=0, lt=1)
    """Share of GPU memory for vLLM's weights and cache; when colocated, the trainer has all of it back in training."""
    allow_untested: bool = False
    """Use a vLLM outside the tested range; what breaks then is yours to find."""


class RolloutConfig(Section):
    """`[rollout]`"""

    engine: Literal["auto", "hf", "vllm"] = "auto"
    """hf: transformers' generate inside the trainer. auto: vllm where it is installed and there is a GPU, else hf."""
    temperature: float = Field(1.0, ge=1e-3, le=100)
    """Sampling temperature; the loss scales its logits by the same number."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens with this much probability. Below 1, vLLM reports log-probs among those, and
    policy/entropy is not that of the policy, which policy/entropy_exact is."""
    top_k: int = Field(0, ge=0, lt=2**31)
    """Sample from this many likeliest tokens; 0 means all. Above 0, log-probs and entropy as with top_p below 1."""
    batch_size: int = Field(256, ge=1, le=2**20)
    """Responses generated together."""
    deadline_s: float | None = Field(None, gt=0, le=MOST_SECONDS)
    """Seconds after which a step's unfinished responses are aborted and count as truncated; absent means never."""
    partial_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    """Partial rollouts: tokens that a response may grow in one step; an unfinished one goes on under the next policy,
    and its group is trained when complete. Needs loss.is_cap. Absent means off."""
    overlap: bool = False
    """Generate the next step's responses while training on this one's, with weights one step old. Needs vllm and
    loss.is_cap. Where a stage may end with a step, the step after it generates its own."""
    verify_every: int = Field(10, ge=0, le=MOST_STEPS)
    """Compare the log-probs of engine and trainer after every so many weight updates; 0 means never. hf shares the
    weights and needs no check."""
    reproducible: bool = True
    """Give each response its own seed. Without, vLLM samples faster on a GPU, and no run repeats another."""
    vllm: VllmConfig = VllmConfig()
