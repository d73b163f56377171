"""Rules about `[rollout.vllm]`: engine arguments that or1 owns, drafts, and engines that round their numbers."""

from __future__ import annotations

from collections.abc import Iterator

from or1.config import Config
from or1.core.errors import Problem

_ENGINE = "rollout.vllm.engine"
_DISTRIBUTION = "or1 needs responses of the unchanged policy"
_CODE = "or1 runs no code that a config names here"
_WEIGHTS = "or1 loads and pushes the weights"

OWNED = {
    "model": "set model.path",
    "model_weights": "set model.path",
    "tokenizer": "set model.path",
    "tokenizer_mode": "set model.path",
    "served_model_name": "remove it; or1 and its server agree on a name",
    "hf_config_path": "set model.path",
    "runner": "remove it; or1 only generates",
    "convert": "remove it; or1 only generates",
    "dtype": "set model.dtype",
    "seed": "set seed; each response has its own seed (rollout.reproducible)",
    "max_model_len": "set data.max_prompt_tokens and stage.max_response_tokens, whose sum it is",
    "max_num_seqs": "set rollout.batch_size",
    "tensor_parallel_size": "set rollout.vllm.tensor_parallel",
    "distributed_executor_backend": "remove it; or1 starts vLLM in its own ranks, or one server",
    "pipeline_parallel_size": "set rollout.vllm.tensor_parallel; or1 pushes to one pipeline stage only",
    "data_parallel_size": "remove it; colocated, each rank has an engine",
    "gpu_memory_utilization": "set rollout.vllm.gpu_memory",
    "enable_sleep_mode": "remove it; a colocated engine sleeps while the trainer trains, unless rollout.overlap is set",
    "sleep_mode_backend": "remove it; or1 decides how a colocated engine sleeps",
    "sleep_preserve_parameter_names": "remove it; or1 pushes all weights after a sleep",
    "logprobs_mode": "remove it; the loss needs log-probs at the sampling temperature",
    "max_logprobs": "remove it; or1 asks for the sampled token's log-prob",
    "generation_config": f"set rollout.temperature, top_p and top_k; {_DISTRIBUTION}",
    "override_generation_config": f"set rollout.temperature, top_p and top_k; {_DISTRIBUTION}",
    "logits_processors": f"remove it; {_DISTRIBUTION}",
    "watermark_config": f"remove it; {_DISTRIBUTION}",
    "reasoning_config": f"remove it; {_DISTRIBUTION}",
    "diffusion_config": f"remove it; {_DISTRIBUTION}",
    "enable_lora": f"remove it; {_WEIGHTS}",
    "hf_overrides": "change config.json of model.path, so that engine and trainer compute the same model",
    "model_class_overrides": f"remove it; {_CODE}",
    "trust_remote_code": f"remove it; {_CODE}",
    "io_processor_plugin": f"remove it; {_CODE}",
    "reasoning_parser_plugin": f"remove it; {_CODE}",
    "scheduler_cls": f"remove it; {_CODE}",
    "worker_cls": f"remove it; {_CODE}",
    "worker_extension_cls": "remove it; or1's own extension receives the weights",
    "load_format": f"remove it; {_WEIGHTS}",
    "config_format": "remove it; model.path is a Hugging Face folder",
    "revision": "set model.path to a local folder of that revision",
    "code_revision": f"remove it; {_CODE}",
    "tokenizer_revision": "set model.path to a local folder of that revision",
    "hf_token": "remove it; model.path is a local folder",
    "model_loader_extra_config": f"remove it; {_WEIGHTS}",
    "weight_transfer_config": "set rollout.vllm.transport",
    "quantization": "set rollout.vllm.quantization, which also asks for importance weights",
    "quantization_config": "set rollout.vllm.quantization, which also asks for importance weights",
    "kv_cache_dtype": "set rollout.vllm.kv_cache_dtype, which also asks for importance weights",
    "speculative_config": "set rollout.vllm.speculative, whose drafts keep the distribution",
    "spec_method": "set rollout.vllm.speculative.method",
    "spec_model": "set rollout.vllm.speculative.model",
    "spec_tokens": "set rollout.vllm.speculative.tokens",
    "stream_interval": "remove it; or1 sets how often tokens are reported",
    "disable_log_stats": "remove it; or1 turns the statistics on that it logs",
    "use_tqdm_on_load": "remove it; or1 has its own display",
    "skip_tokenizer_init": "remove it; vLLM's server needs a tokenizer",
}
"""Arguments of vLLM's engine that or1 sets itself: name -> what to do instead."""


def owned_arguments(config: Config) -> Iterator[Problem]:
    """Find engine arguments that or1 sets itself."""
    for name in config.rollout.vllm.engine:
        if name in OWNED:
            yield Problem(f"{_ENGINE}.{name}", f"is set by or1; {OWNED[name]}")


def rounded_engine(config: Config) -> Iterator[Problem]:
    """Find engines that round weights or cache, whose samples need importance weights."""
    vllm = config.rollout.vllm
    rounding = {"quantization": vllm.quantization, "kv_cache_dtype": vllm.kv_cache_dtype}
    for name, value in rounding.items():
        if value not in (None, "auto") and not config.loss.weighs_engine:
            yield Problem(
                f"rollout.vllm.{name}",
                f'"{value}" samples from a rounded policy, which needs importance weights; set loss.is_cap, for '
                "example to 2.0, or remove this",
            )
    if vllm.quantization is not None and config.model.dtype not in ("bfloat16", "float16"):
        yield Problem(
            "rollout.vllm.quantization",
            f'"{vllm.quantization}" quantizes 16-bit weights, but model.dtype = "{config.model.dtype}"; set '
            'model.dtype = "bfloat16", or remove this',
        )


def drafts(config: Config) -> Iterator[Problem]:
    """Find contradictions in `[rollout.vllm.speculative]`."""
    section, where = config.rollout.vllm.speculative, "rollout.vllm.speculative"
    if (section.method == "draft") != (section.model is not None):
        remedy = "missing; name the folder of a small model with the same vocabulary"
        if section.model is not None:
            remedy = f'{section.model!r} has no effect with method = "{section.method}"; set method = "draft"'
        yield Problem(f"{where}.model", remedy)
    if section.method == "ngram" and section.ngram_min > section.ngram_max:
        yield Problem(f"{where}.ngram_min", f"{section.ngram_min} is above ngram_max = {section.ngram_max}; lower it")
    if section.method == "suffix" and config.rollout.reproducible:
        yield Problem(
            f"{where}.method",
            '"suffix" drafts from the other responses of the engine, so that a response depends on its batch and not '
            'only on its seed; set rollout.reproducible = false, or method = "ngram"',
        )


VLLM_RULES = (owned_arguments, rounded_engine, drafts)
