"""Rules about `[model.lora]` and the settings that it makes meaningless or impossible."""

from __future__ import annotations

from collections.abc import Iterator

from or1.config import Config
from or1.core.errors import Problem


def adapters_fit(config: Config) -> Iterator[Problem]:
    """Refuse settings that cannot be combined with adapters."""
    lora = config.model.lora
    if lora is None:
        return
    if config.optim.weights == "stochastic":
        yield Problem(
            "optim.weights",
            '"stochastic" has no effect with [model.lora]: adapters are kept in fp32, and the frozen weights have no '
            "masters; remove it",
        )
    if lora.quantize == "nf4" and config.model.dtype != "bfloat16":
        yield Problem(
            "model.lora.quantize",
            f'"nf4" computes in 16 bits, but model.dtype = "{config.model.dtype}"; set model.dtype = "bfloat16", or '
            "remove it",
        )
    if lora.quantize == "nf4" and config.model.device == "cpu":
        yield Problem("model.lora.quantize", '"nf4" needs a GPU, but model.device = "cpu"; remove one of them')
    if lora.push == "adapter":
        yield from _adapter_can_be_pushed(config)


def _adapter_can_be_pushed(config: Config) -> Iterator[Problem]:
    rollout, lora = config.rollout, config.model.lora
    where = "model.lora.push"
    if rollout.engine == "hf":
        yield Problem(where, '"adapter" has no effect with rollout.engine = "hf", which computes with the adapters')
    if rollout.vllm.placement == "server":
        yield Problem(
            where,
            '"adapter" needs vLLM inside the trainer: a server takes weights by its worker methods, which know no '
            'adapters; set rollout.vllm.placement = "colocate", or push = "merged"',
        )
    if rollout.vllm.tensor_parallel > 1:
        yield Problem(
            where,
            f'"adapter" was tried with one GPU an engine only, but rollout.vllm.tensor_parallel = '
            f'{rollout.vllm.tensor_parallel}; set it to 1, or push = "merged"',
        )
    if lora is not None and lora.quantize == "nf4":
        yield Problem(
            where,
            '"adapter" with quantize = "nf4": vLLM would add the adapter to other weights than the rounded ones that '
            'it was trained on; set push = "merged"',
        )
