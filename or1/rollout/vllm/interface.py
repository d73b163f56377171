"""What or1 uses of vLLM, checked without an import of vLLM, which takes seconds and takes hold of the GPU."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from or1.core.errors import EngineError

FUNCTIONS = {
    ("entrypoints/llm.py", "LLM.__init__"): ("model",),
    ("v1/engine/llm_engine.py", "LLMEngine.add_request"): ("request_id", "prompt", "params"),
    ("v1/engine/llm_engine.py", "LLMEngine.step"): (),
    ("v1/engine/llm_engine.py", "LLMEngine.abort_request"): ("request_ids",),
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner.reload_weights"): ("weights_iterator",),
    ("v1/worker/gpu/model_runner.py", "GPUModelRunner.reload_weights"): ("weights_iterator",),
    ("v1/spec_decode/metrics.py", "SpecDecodingProm.observe"): ("spec_decoding_stats",),
}
"""(file, function) -> parameters that or1 passes by name."""
FIELDS = {
    ("sampling_params.py", "SamplingParams"): (
        "n",
        "temperature",
        "top_p",
        "top_k",
        "max_tokens",
        "seed",
        "logprobs",
        "flat_logprobs",
        "ignore_eos",
        "stop_token_ids",
        "detokenize",
        "output_kind",
        "stream_interval",
    ),
    ("logprobs.py", "FlatLogprobs"): ("logprobs", "token_ids", "start_indices", "end_indices"),
    ("outputs.py", "CompletionOutput"): ("token_ids", "logprobs", "finish_reason"),
    ("config/speculative.py", "SpeculativeConfig"): (
        "method",
        "model",
        "num_speculative_tokens",
        "prompt_lookup_min",
        "prompt_lookup_max",
        "rejection_sample_method",
    ),
    ("engine/arg_utils.py", "EngineArgs"): (
        "model",
        "dtype",
        "max_model_len",
        "max_num_seqs",
        "tensor_parallel_size",
        "seed",
        "logprobs_mode",
        "generation_config",
        "disable_log_stats",
        "speculative_config",
        "gpu_memory_utilization",
        "enable_chunked_prefill",
        "max_num_batched_tokens",
        "enforce_eager",
        "block_size",
        "quantization",
        "kv_cache_dtype",
        "enable_sleep_mode",
        "use_tqdm_on_load",
        "distributed_executor_backend",
        "stream_interval",
        "worker_extension_cls",
    ),
}
"""(file, class) -> fields that or1 reads or sets."""


def source_folder() -> Path | None:
    """Return the folder of the installed vLLM's source; None if vLLM is not installed."""
    found = find_spec("vllm")
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return Path(places[0]) if places else None


def differences(source: Path) -> list[str]:
    """Return what a vLLM lacks of the interface that or1 uses, one line each.

    source  folder `vllm` of an installed or unpacked vLLM
    """
    missing = []
    for (file, name), wanted in (*FUNCTIONS.items(), *FIELDS.items()):
        found = _names(source / file, name)
        if found is None:
            missing.append(f"{file} has no {name}")
        else:
            missing += [f"{name} in {file} has no {each!r}" for each in wanted if each not in found]
    return missing


def require_known(extra: Mapping[str, Any], source: Path | None = None) -> None:
    """Raise EngineError, with the nearest name, for arguments that the installed vLLM's engine does not have."""
    if not extra:
        return
    source = source_folder() if source is None else source
    known = None if source is None else _names(source / "engine/arg_utils.py", "EngineArgs")
    if known is None:
        raise EngineError("the arguments of vLLM's engine cannot be read; remove [rollout.vllm.engine]")
    for name in extra:
        if name not in known or name.startswith("_"):
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise EngineError(
                f"rollout.vllm.engine.{name}: vLLM's engine has no such argument; {hint}The names are those of "
                "vllm.EngineArgs"
            )


@cache
def _names(file: Path, name: str) -> frozenset[str] | None:
    """Return the fields of a class, or the parameters of a function "f" or "Class.f"; None if there is none."""
    try:
        body: list[ast.stmt] = ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError):
        return None
    found: ast.stmt | None = None
    for part in name.split("."):
        named = (s for s in body if isinstance(s, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef))
        found = next((s for s in named if s.name == part), None)
        if found is None:
            return None
        body = found.body
    if isinstance(found, ast.ClassDef):
        fields = (s.target for s in body if isinstance(s, ast.AnnAssign))
        return frozenset(target.id for target in fields if isinstance(target, ast.Name))
    assert isinstance(found, ast.FunctionDef | ast.AsyncFunctionDef)
    arguments = found.args
    return frozenset(a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
