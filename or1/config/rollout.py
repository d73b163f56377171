"""`[rollout]` and `[rollout.vllm]`: the generation engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from or1.config.section import MOST_SECONDS, MOST_STEPS, MOST_TOKENS, Section, UrlList


class VllmConfig(Section):
    """`[rollout.vllm]`: has no effect with engine = "hf"."""

    placement: Literal["colocate", "server"] = "colocate"
    """colocate: inside the trainer, one engine per rank under torchrun. server: a separate process."""
    url: UrlList | None = Field(None, min_length=1)
    """With placement = "server": a server started with `or1 serve`, as http://host:port, or as https://host:port behind
    a TLS proxy; or a list of several. Each response goes to a server that has room. A server that dies during a rollout
    is left out, and the others generate its responses again. Absent: or1 starts one."""
    transport: Literal["auto", "file", "broadcast"] = "auto"
    """Transport of weights to a server. file: safetensors in a shared folder. broadcast: NCCL, or gloo on a CPU. auto:
    file for a server that or1 started, else broadcast."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of a server that or1 starts; absent means that of the trainer."""
    tensor_parallel: int = Field(1, ge=1, le=1024)
    """GPUs that share one copy of the model; if colocated, a divisor of the number of ranks."""
    gpu_memory: float = Field(0.5, gt=0, lt=1)
    """Fraction of GPU memory for vLLM's weights and cache; if colocated, vLLM frees all of it during training."""
    allow_untested: bool = False
    """Accept a vLLM version outside the tested range, at your own risk."""


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
    overlap: bool = False
    """Generate the next step's responses while training on those of this step, with weights one step old. Needs vllm
    and loss.is_cap. A step after which a stage may end has no overlap with the next one."""
    verify_every: int = Field(10, ge=0, le=MOST_STEPS)
    """Compare the log-probs of engine and trainer after every this many weight updates; 0 means never. hf shares the
    weights and needs no check."""
    reproducible: bool = True
    """Give each response its own seed. false: vLLM samples faster on a GPU, but runs are not reproducible."""
    vllm: VllmConfig = VllmConfig()
